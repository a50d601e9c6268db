"""How fast the presets train, and on what: python tests/benchmarks/training.py [--attention | --profile] [PRESET ...].

Steps are those of train/run.py, on 512 pictures of noise: a `Run` of the trainer itself, timed on the device that it picks.

images/s: of the fastest of `--steps` steps, after two for set-up, as other work on the machine only ever adds. MFU: FLOPs
of the model's matrix products a second, a step's being three times a forward's (imtx/costs.py), over the rate of large
matrix products measured in the same run and precision.

Shares of a step are of parts timed in isolation on tensors of their true shapes, turn and turn about with the step:
data (fetching a batch, with its sources), local attention (from projected queries, keys and values to what the heads have
seen, forward and backward, all decoder layers), likelihood (`output.log_prob`, forward and backward), optimizer (clipping,
optimizer, moving average). `rest` is what is left to 100 %: linear layers, norms, embeddings, attention to a source. In
isolation a part is never overlapped or fused with its neighbours and finds other things in the caches, so that the
shares, and the rest with them, are true to a few per cent only.

--attention: local attention against dense causal attention of the same heads and positions, forward and backward, turn and
turn about (the ratio: the median of pairs), for each shape among the presets; without dropout, which no fused kernel of a
CPU has. --profile: torch's own table of one step of the first preset. The last line is one JSON object with all figures.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "train")]  # run from a checkout, with nothing installed

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import train as trainer
from imtx import PRESETS, Config
from imtx.attention import LocalSelfAttention
from imtx.bf16_attention import Bf16Attention
from imtx.costs import matmul_rate
from imtx.layout import build_layout
from memory import keep_freed_memory
from publishing import provenance
from report import DTYPES
from run import Run

PICTURES, WARM_UP = 512, 2
USUAL = ("tiny", "cifar10-dmol-1d-small", "faces-sr-2d-small", "cifar10-dmol-1d")  # minutes on two CPU cores


def noise(folder: Path, size: int) -> Path:
    """A parquet file of pictures of noise with labels 0..9, as a data set has them."""
    generator, rows = np.random.default_rng(0), []
    for _ in range(PICTURES):
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file := io.BytesIO(), "PNG")
        rows.append({"bytes": file.getvalue()})
    labels = generator.integers(0, 10, PICTURES)
    pyarrow.parquet.write_table(pyarrow.table({"image": rows, "label": labels}), folder / "noise.parquet")
    return folder / "noise.parquet"


def start(preset: str, folder: Path, args: argparse.Namespace) -> Run:
    """The trainer's own run of a preset, as its command line would start it."""
    data = noise(folder, PRESETS[preset].image_size)
    words = ["--preset", preset, "--data", str(data), "--cache", str(folder / "cache"), "--output", str(folder / "run")]
    words += ["--max-steps", "1000000", "--validation", "8", "--batch-size", str(args.batch_size)]
    words += ["--optimizer", args.optimizer, "--mixed-precision", args.precision] + ["--compile"] * args.compile
    own, sys.argv = sys.argv, ["train/train.py", *words]
    try:
        run = Run(trainer.arguments())
    finally:
        sys.argv = own
    run.likelihood.train()
    return run


def seconds(works: dict, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each piece of work, `steps` times, turn and turn about after WARM_UP rounds, the device waited for."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found = {name: [] for name in works}
    for i in range(WARM_UP + steps):
        for name, work in works.items():
            wait()
            begin = time.perf_counter()
            work()
            wait()
            if i >= WARM_UP:
                found[name].append(time.perf_counter() - begin)
    return found


def forward_backward(function, *inputs: Tensor):
    """One forward and backward of `function` at these inputs, as a piece of work; a loss of all ones."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]

    def work() -> None:
        result = function(*leaves)
        result.backward(torch.ones_like(result))
        for leaf in leaves:
            leaf.grad = None

    return work


def qkv(config: Config, images: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values, (N, P, H, D) each."""
    shape = (images, config.positions, config.heads, config.head_width)
    return [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)]


def pieces(run: Run, args: argparse.Namespace) -> dict:
    """A training step and its parts, each to be timed; one layer of local attention stands for all."""
    compiled = torch.compile if args.compile else lambda function: function
    device, dtype = run.accelerator.device, DTYPES[args.precision]
    pixels, labels, sources = run.batch()
    with torch.no_grad(), run.accelerator.autocast():
        params = run.model(pixels, labels, sources)
    parts = {"step": run.train_step, "data": run.batch}
    local = compiled(run.model.decoder[0].attention.local)
    attention = forward_backward(local, *qkv(run.config, len(pixels), device, dtype))

    def all_layers() -> None:
        for _ in run.model.decoder:
            attention()

    parts["attention"] = all_layers
    parts["likelihood"] = forward_backward(compiled(run.model.output.log_prob), params, run.model.targets(pixels))
    gradients = {p: torch.randn_like(p) for p in run.model.parameters()}  # a training step has left none

    def optimizer() -> None:  # as in Run.train_step
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        run.accelerator.clip_grad_norm_(run.likelihood.parameters(), run.args.clip)
        for each in run.optimizers:
            each.step()
            each.zero_grad()
        run.average.update(run.model, run.progress.step)

    return parts | {"optimizer": optimizer}


def training(preset: str, args: argparse.Namespace) -> dict:
    torch.compiler.reset()  # or what it has seen of the preset before makes it compile for any size, which is slower
    with tempfile.TemporaryDirectory() as folder:
        run = start(preset, Path(folder), args)
        torch.manual_seed(0)
        found = {name: min(s) for name, s in seconds(pieces(run, args), args.steps, run.accelerator.device).items()}
        # Before the steps and after: on a shared machine either can be too low.
        peak = max(run.report.peak, matmul_rate(run.accelerator.device, DTYPES[args.precision]))
    step = found.pop("step")
    rate = args.batch_size / step
    shares = {name: part / step for name, part in found.items()}
    return {
        "preset": preset, "width": run.config.width, "step_seconds": step, "images_per_second": rate,
        "matmul_tflops": peak / 1e12, "mfu": rate * run.report.flops / peak,
        "shares": shares | {"rest": 1 - sum(shares.values())},
    }


def print_training(args: argparse.Namespace) -> list[dict]:
    shares, rows = ("data", "attention", "likelihood", "optimizer", "rest"), []
    head = ["preset", "d", "step", "images/s", "matmul TFLOP/s", "MFU", *shares]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for preset in args.preset or USUAL:
        row = training(preset, args)
        cells = [f"`{preset}`", str(row["width"]), f"{row['step_seconds']:.3f} s", f"{row['images_per_second']:.1f}"]
        cells += [f"{row['matmul_tflops']:.2f}", f"{row['mfu']:.1%}", *(f"{row['shares'][name]:.1%}" for name in shares)]
        print(f"| {' | '.join(cells)} |", flush=True)
        rows.append(row)
    return rows


def shapes(names) -> dict[tuple, Config]:
    """A configuration for each shape of local attention among these presets, by positions, blocks and heads."""
    found = {}
    for config in (PRESETS[name] for name in names):
        blocks = (config.layout, config.query_block, config.memory_block)
        found.setdefault((config.positions, *blocks, config.heads, config.head_width), config)
    return found


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(N, P, H, D) -> (N, P, H D), every position seeing itself and all before it, by what is fastest there."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # faster than PyTorch's own, which spares what is not seen
        steps = torch.arange(q.shape[2])
        bias = torch.zeros(1, 1, len(steps), len(steps), dtype=q.dtype).masked_fill(steps[:, None] < steps, -torch.inf)
        return Bf16Attention.apply(q, k, v, bias).transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def print_attention(args: argparse.Namespace) -> list[dict]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.precision]
    compiled = torch.compile if args.compile else lambda function: function
    head, rows = ["positions", "layout", "query block", "memory block", "heads", "local", "dense", "local / dense"], []
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for (positions, layout, query, memory, heads, width), config in shapes(args.preset or PRESETS).items():
        torch.compiler.reset()  # as above
        local = LocalSelfAttention(config.width, heads * width, heads, build_layout(config), dropout=0.0, qk_norm=False)
        inputs = qkv(config, args.batch_size, device, dtype)
        functions = {"local": local.to(device).local, "dense": dense}
        found = seconds({n: forward_backward(compiled(f), *inputs) for n, f in functions.items()}, args.steps, device)
        ratio = statistics.median(a / b for a, b in zip(found["local"], found["dense"]))  # pairs share their disturbances
        row = {"positions": positions, "layout": layout, "query_block": query, "memory_block": memory, "heads": heads}
        row |= {"head_width": width, **{f"{n}_seconds": min(s) for n, s in found.items()}, "ratio": ratio}
        cells = [str(positions), layout, str(query), str(memory), f"{heads} x {width}"]
        cells += [f"{row[f'{n}_seconds'] * 1e3:.1f} ms" for n in functions]
        print(f"| {' | '.join([*cells, f'{ratio:.2f}'])} |", flush=True)
        rows.append(row)
    return rows


def print_profile(args: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        run = start((args.preset or USUAL)[0], Path(folder), args)
        for _ in range(WARM_UP):
            run.train_step()
        with torch.profiler.profile() as profile:  # of whatever there is, CPU and CUDA
            run.train_step()
            if run.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
    own = "self_device_time_total" if run.accelerator.device.type == "cuda" else "self_cpu_time_total"
    averages = profile.key_averages()
    print(averages.table(sort_by=own, row_limit=15, max_name_column_width=50))
    total = sum(getattr(event, own) for event in averages)
    highest = sorted(averages, key=lambda event: getattr(event, own), reverse=True)[:15]
    return [{"operator": event.key, "share": getattr(event, own) / total, "calls": event.count} for event in highest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="*", choices=[[], *PRESETS], help=f"{', '.join(USUAL)} by default; --attention: all")
    parser.add_argument("--all", action="store_true", help="all presets: an hour on a CPU")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--precision", default="no", choices=("no", "bf16"), help="no: float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile, as train.py has it")
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw", "paper"))
    parser.add_argument("--steps", type=int, default=7, help="timed; the fastest counts")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--attention", action="store_true", help="local against dense attention")
    mode.add_argument("--profile", action="store_true", help="the dearest operators of the first preset")
    args = parser.parse_args()
    args.preset = list(PRESETS) if args.all else args.preset
    kind, work = ("training", print_training)
    if args.attention or args.profile:
        kind, work = ("attention", print_attention) if args.attention else ("profile", print_profile)
    keep_freed_memory()  # as the trainer does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {"hardware": provenance.hardware(device), "torch": torch.__version__, "precision": args.precision}
    about |= {"batch_size": args.batch_size, "compile": args.compile, "optimizer": args.optimizer, "steps": args.steps}
    print(", ".join(f"{name} {value}" for name, value in about.items()) + "\n", flush=True)
    print("\n" + json.dumps(about | {kind: work(args)}))


if __name__ == "__main__":
    main()
