"""What every preset costs: python tests/benchmarks/presets.py [--run] [PRESET ...].

Prints README's table: parameters, FLOPs of one parallel forward over an image (two for a multiply and an add; masked
keys of a memory block count, as they are worked out), and the memory that the cache of one image takes while it is drawn.
With --run, each preset in its full size also takes a training step (batch 1, forward, backward, AdamW), evaluates an
image and draws one through the cache, in a process of its own; with the seconds and the peak memory of that process.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout, with nothing installed

import torch

from imtx import PRESETS, ImageTransformer, draw
from imtx.costs import cache_bytes, example, forward_flops


def costs(model: ImageTransformer) -> dict:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflop": forward_flops(model) / 1e9,
        "cache_mb": cache_bytes(model) / 1e6,
    }


def peak_memory() -> float:
    """GB that this process has taken at most so far. From Linux's own record: getrusage counts its parent's in."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9


def run(model: ImageTransformer) -> dict:
    """One training step, one evaluation, one picture: seconds each, and the peak memory in GB at the end of each."""
    pixels, condition = example(model)
    found = {}

    def timed(name: str, work) -> None:
        started = time.perf_counter()
        work()
        found[f"{name}_s"] = time.perf_counter() - started
        found[f"{name}_gb"] = peak_memory()

    def evaluate() -> None:
        with torch.inference_mode():
            model.log_prob(pixels, **condition)

    def train() -> None:
        optimizer = torch.optim.AdamW(model.train().parameters())
        (-model.log_prob(pixels, **condition).mean()).backward()
        optimizer.step()

    timed("draw", lambda: draw(model, [0], **condition))
    timed("evaluate", evaluate)
    timed("train", train)  # last, as it needs most memory
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="*", choices=[[], *PRESETS], help="all by default")
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--one", choices=PRESETS, help=argparse.SUPPRESS)  # what a process of its own is asked for
    args = parser.parse_args()
    if args.one:
        torch.manual_seed(0)
        print(json.dumps(run(ImageTransformer(PRESETS[args.one]).eval())))
        return
    head = ["preset", "layers", "parameters", "GFLOP an image", "cache an image"]
    if args.run:
        head += ["training step", "evaluation", "picture", "peak memory: picture, training"]
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n", flush=True)
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for name in args.preset or PRESETS:
        config = PRESETS[name]
        model = ImageTransformer(config).eval()
        cost = costs(model)
        del model
        layers = f"{config.encoder_layers} + {config.layers}" if config.source_size else str(config.layers)
        row = [f"`{name}`", layers, f"{cost['parameters']:,}", f"{cost['gflop']:.1f}", f"{cost['cache_mb']:.1f} MB"]
        if args.run:
            done = subprocess.run([sys.executable, __file__, "--one", name], check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            row += [f"{found[f'{work}_s']:.1f} s" for work in ("train", "evaluate", "draw")]
            row += [f"{found['draw_gb']:.1f}, {found['train_gb']:.1f} GB"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
