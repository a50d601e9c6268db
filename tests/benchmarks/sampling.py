"""How fast pictures are drawn, and how fast they could be: python tests/benchmarks/sampling.py [--help].

Needs requirements-bench.txt; --no-peers needs requirements.txt only. Under 5 minutes on two quiet CPU cores, half a minute of
which is Numba's, the first time. Without --model and --preset: the bundled model of CIFAR-10 in batches, the bundled faces, two
models of about 10M parameters with random weights, and three small ones of equal size that differ in layout or task alone.

ms a step: seconds of a whole picture (or batch), noise and set-up included, over its positions: 1,024, or 3,072 with
categorical output. All cases take turns, and so do the measurements of the machine; the fastest turn of each counts, as
other work on the machine only ever adds. Eager PyTorch and peers run on one thread and on all, and the faster counts.

matrices: what those of the decoder's blocks are kept in. The compiled step halves them if all their numbers are bfloat16
numbers; for a row of bf16 they are rounded to some, for one of fp32 moved away from them. Arithmetic is float32 in both.

roofline: the least time in which a step's bytes can be read and its FLOPs be done (roofline.py counts both and measures
the machine) over the time that it takes, for the threads that it uses: one picture is drawn by one and by two, a batch by
all. `all threads` holds it against what the whole machine can do.

peers: peers.py; `times` is their ms a token over the ms a step of our compiled model with as many parameters, in bf16.
two visitors: one picture each, drawn at once by two Python threads: how many times as many pictures a second as one thread
draws. The last line is one JSON object with all figures.
"""

import argparse
import copy
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "train")]  # run from a checkout, with nothing installed

import numba
import torch

from imtx import PRESETS, Config, ImageTransformer, draw, fast
from imtx.checkpoint import CheckpointError, find
from imtx.costs import example
from imtx.fast.weights import MOST_PARTS
from peers import Peer, missing, peers, versions
from publishing import provenance
from roofline import Machine, Step, step_of

TURNS, SECONDS = 12, 150  # no turn but the second begins later
SLOW = 5  # eager PyTorch and peers take every so manieth turn
BUNDLED, LARGE, LARGE_CATEGORICAL, EQUAL = "cifar10-dmol-1d", "10M DMOL", "10M categorical", "equal size"
ALIKE = {  # blocks such that a step sees about as many keys
    "1D": Config(query_block=64, memory_block=128),
    "2D": Config(layout="2d", query_block=(8, 8), memory_block=(4, 8)),
    "super-resolution": Config(query_block=64, memory_block=128, source_size=8, encoder_layers=1),
}


def with_matrices(model: ImageTransformer, dtype: str) -> ImageTransformer:
    """A copy that the compiled step keeps in that dtype."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for weight in model.decoder.parameters():
            if weight.ndim == 2:
                weight.copy_(weight.bfloat16())
                if dtype == "fp32":
                    weight.mul_(1 + 2**-12)  # needs more bits than a bfloat16 has
    return model


def size(model: ImageTransformer) -> int:
    return sum(p.numel() for p in model.parameters())


def fresh(config: Config) -> ImageTransformer:
    torch.manual_seed(0)
    return ImageTransformer(config)


@dataclass
class Case:
    """A row of the table."""

    name: str
    model: ImageTransformer
    images: int
    engine: str
    seconds: dict[int, list[float]]  # by threads: of a whole batch
    step: Step = field(init=False)

    def __post_init__(self):
        self.step = step_of(self.model, self.images)

    def run(self, threads: int, visitors: int = 1) -> float:
        """Seconds in which each visitor gets a batch."""
        _, condition = example(self.model)

        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the compiled step

        def visit(_) -> None:
            torch.set_num_threads(threads if self.engine == "eager" else 1)  # here: MKL counts by thread
            draw(self.model, range(self.images), engine=self.engine, **condition)

        with ThreadPoolExecutor(visitors) as pool:
            begin = time.perf_counter()
            list(pool.map(visit, range(visitors)))
            return time.perf_counter() - begin

    def row(self, machine: Machine, everything: int) -> dict:
        threads = min(self.seconds, key=lambda threads: min(self.seconds[threads]))
        batch, positions = min(self.seconds[threads]), self.model.config.positions
        fractions = [positions * machine.floor(self.step, n) / batch for n in (threads, everything)]
        return {
            "model": self.name, "parameters": size(self.model), "images": self.images, "engine": self.engine,
            "matrices": self.step.dtype, "threads": threads, "ms_a_step": 1e3 * batch / positions, "batch_seconds": batch,
            "images_per_second": self.images / batch, "weight_bytes": self.step.weight_bytes, "bytes": self.step.bytes,
            "flops": self.step.flops, "roofline_fraction": fractions[0], "roofline_fraction_all_threads": fractions[1],
        }


class Benchmark:
    """All cases, and their turns."""

    def __init__(self, everything: int):
        self.everything = everything  # threads: as many as the compiled step takes at most
        self.cases: list[Case] = []
        self.peers: list[tuple[str, Peer]] = []  # each with the name of the model that it is as large as
        self.two_visitors: list[float] = []  # seconds of two, of the first case
        self.machine = Machine()

    def add(self, name: str, model: ImageTransformer, batches=(1,), dtypes=("bf16",), eager=False, against_peers=False) -> None:
        models = {dtype: with_matrices(model, dtype) for dtype in dtypes}
        for one in models.values():
            fast.warm(one)
        cases = [
            Case(name, one, n, "compiled", {threads: []}) for n in batches for one in models.values()
            for threads in (sorted({1, min(MOST_PARTS, self.everything)}) if n == 1 else [min(n, self.everything)])
        ]
        if eager:
            cases += [Case(name, models["fp32"], n, "eager", {t: [] for t in {1, self.everything}}) for n in batches]
        for case in cases:
            for threads in {*case.seconds, self.everything}:
                self.machine.expect(case.step.bytes, threads)
        self.cases += cases
        if against_peers:
            self.peers += [(name, peer) for peer in peers(model.config, size(model))]

    def run(self, turns: int) -> None:
        begin, turn = time.perf_counter(), 0
        while turn < min(2, turns) or turn < turns and time.perf_counter() - begin < SECONDS:
            print(f"turn {turn + 1}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            self.machine.measure()
            for case in self.cases:
                if case.engine == "compiled" or turn % SLOW == 0:
                    for threads, seconds in case.seconds.items():
                        seconds.append(case.run(threads))
            self.two_visitors.append(self.cases[0].run(self.everything, visitors=2))
            for _, peer in self.peers if turn % SLOW == 0 else ():
                for threads in {1, self.everything}:
                    peer.run(threads)
            turn += 1

    def results(self) -> dict:
        """What the last line says. The figures that stand alone are of the first model, in bf16."""
        rows = [case.row(self.machine, self.everything) for case in self.cases]
        compiled = {}  # the fastest in bf16
        for row in sorted(rows, key=lambda row: (row["matrices"] == "bf16", -row["batch_seconds"])):
            if row["engine"] == "compiled":
                compiled[row["model"], row["images"]] = row
        held = []
        for model, peer in self.peers:
            threads, seconds = min(peer.token_seconds.items(), key=lambda pair: pair[1])
            times = 1e3 * seconds / compiled[model, 1]["ms_a_step"]
            held.append({
                "peer": peer.name, "parameters": peer.parameters, "threads": threads, "ms_a_token": 1e3 * seconds,
                "as_large_as": model, "times": times,
            })
        one_thread = rows[0]
        first = compiled[one_thread["model"], 1]
        found = {
            "roofline_fraction_batch1": first["roofline_fraction"],
            "roofline_fraction_batch1_all_threads": first["roofline_fraction_all_threads"],
            "images_per_second_batch1": first["images_per_second"],
            "roofline_fraction_batch1_one_thread": one_thread["roofline_fraction"],
            "images_per_second_batch1_one_thread": one_thread["images_per_second"],
            "two_visitors_over_one": 2 * one_thread["batch_seconds"] / min(self.two_visitors),
        }
        if many := compiled.get((first["model"], 16)):
            found["images_per_second_batch16"] = many["images_per_second"]
            found["batch16_over_batch1"] = many["images_per_second"] / first["images_per_second"]
        for row in held:
            if row["peer"] == "ImageGPT" and row["as_large_as"] in (first["model"], LARGE):
                found["speedup_vs_imagegpt_" + ("10m" if row["as_large_as"] == LARGE else "batch1")] = row["times"]
        for key, name in (("dmol_10m_picture_seconds", LARGE), ("categorical_10m_picture_seconds", LARGE_CATEGORICAL)):
            if row := compiled.get((name, 1)):
                found[key] = row["batch_seconds"]
        if base := compiled.get((f"{EQUAL}, 1D", 1)):
            for key, kind in (("step_2d_over_1d", "2D"), ("step_super_resolution_over_1d", "super-resolution")):
                found[key] = compiled[f"{EQUAL}, {kind}", 1]["ms_a_step"] / base["ms_a_step"]
        machine = [
            {"bytes": size, "threads": threads, "bytes_per_second": self.machine.bandwidth(size, threads),
             "flops_per_second": self.machine.rate(threads)}
            for size, threads in sorted(self.machine.bandwidths)
        ]
        return found | {"machine": machine, "rows": rows, "peers": held}


def usual(benchmark: Benchmark, batches: list[int], against_peers: bool) -> None:
    bundled = ImageTransformer.from_pretrained(find(BUNDLED))
    benchmark.add(BUNDLED, bundled, batches, ("bf16", "fp32"), eager=True, against_peers=against_peers)
    for name in ("faces-sr-1d", "faces-sr-2d"):
        benchmark.add(name, ImageTransformer.from_pretrained(find(name)))
    large = PRESETS["cifar10-dmol-1d"]
    benchmark.add(LARGE, fresh(large), against_peers=against_peers)
    benchmark.add(LARGE_CATEGORICAL, fresh(replace(large, output="categorical")))  # 256 sub-pixels a block, as in the paper
    for kind, config in ALIKE.items():
        benchmark.add(f"{EQUAL}, {kind}", fresh(config))


def table(*rows: tuple) -> None:
    """The first is the head."""
    head, *cells = ([str(cell) for cell in row] for row in rows)
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    print(*(f"| {' | '.join(row)} |" for row in cells), "", sep="\n", flush=True)


def print_tables(found: dict) -> None:
    table(
        ("model", "parameters", "batch", "engine", "matrices", "threads", "ms a step", "images/s", "MB a step", "MFLOP a step",
         "of the roofline", "of all threads'"),
        *((r["model"], f"{r['parameters']:,}", r["images"], r["engine"],
           r["matrices"], r["threads"], f"{r['ms_a_step']:.3f}", f"{r['images_per_second']:.2f}", f"{r['bytes'] / 1e6:.1f}",
           f"{r['flops'] / 1e6:.1f}", f"{r['roofline_fraction']:.1%}", f"{r['roofline_fraction_all_threads']:.1%}")
          for r in found["rows"]),
    )
    table(
        ("working set", "threads", "read bandwidth", "matmul rate, float32"),
        *((f"{r['bytes'] / 1e6:.1f} MB", r["threads"], f"{r['bytes_per_second'] / 1e9:.0f} GB/s",
           f"{r['flops_per_second'] / 1e9:.0f} GFLOP/s") for r in found["machine"]),
    )
    if max(row["roofline_fraction"] for row in found["rows"]) > 1:
        print("More than 100 %: other work has slowed the measurements of the machine down. Repeat it when that is over.\n")
    if found["peers"]:
        table(
            ("peer", "parameters", "threads", "ms a token", "times ours", "of"),
            *((r["peer"], f"{r['parameters']:,}", r["threads"], f"{r['ms_a_token']:.2f}", f"{r['times']:.1f}", r["as_large_as"])
              for r in found["peers"]),
        )


def chart(found: dict, path: Path) -> None:
    """The first model: left, a step of one picture beside its peers and the roofline; right, pictures a second by batch."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot as plt

    rows = [row for row in found["rows"] if row["model"] == found["rows"][0]["model"]]
    fastest = {}
    for row in sorted(rows, key=lambda row: -row["batch_seconds"]):
        fastest[row["images"], row["engine"], row["matrices"]] = row
    rows, first = list(fastest.values()), fastest[1, "compiled", "bf16"]
    kinds = {("eager", "fp32"): ("PyTorch, eager", "#8fb8de"), ("compiled", "fp32"): ("compiled, fp32", "#2f6db3"),
             ("compiled", "bf16"): ("compiled, bf16", "#d1495b")}
    bars = [(peer["peer"], peer["ms_a_token"], "0.72") for peer in found["peers"] if peer["as_large_as"] == first["model"]]
    bars += [(kinds[row["engine"], row["matrices"]][0], row["ms_a_step"], kinds[row["engine"], row["matrices"]][1])
             for row in sorted(rows, key=lambda row: -row["ms_a_step"]) if row["images"] == 1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 2), layout="constrained")
    names, values, colours = zip(*bars)
    left.barh(range(len(bars)), values, color=colours)
    for place, value in enumerate(values):
        left.annotate(f"{value:.2f}", (value, place), xytext=(4, 0), textcoords="offset points", va="center")
    floor = first["ms_a_step"] * first["roofline_fraction"]
    left.axvline(floor, color="0.35", linestyle=":")
    left.annotate(
        f"roofline (bf16) {floor:.3f}", (floor, 1), (0, 3), ("data", "axes fraction"), "offset points", ha="center", color="0.35"
    )
    left.set(xscale="log", xlim=(floor / 2.5, max(values) * 2), yticks=range(len(bars)), xlabel="ms a step (peers: a token)")
    left.xaxis.set_major_formatter("{x:g}")
    left.set_yticklabels(names)
    left.invert_yaxis()
    left.set_title(f"One picture, {first['parameters'] / 1e6:.1f}M parameters", fontsize="medium", loc="right")
    batches = sorted({row["images"] for row in rows})
    for i, (kind, (label, colour)) in enumerate(kinds.items()):
        speeds = {row["images"]: row["images_per_second"] for row in rows if (row["engine"], row["matrices"]) == kind}
        drawn = right.bar([batches.index(n) + 0.28 * (i - 1) for n in speeds], speeds.values(), 0.26, color=colour, label=label)
        right.bar_label(drawn, fmt="{:.1f}", fontsize="x-small")
    right.set_xticks(range(len(batches)), labels=map(str, batches))
    right.set(xlabel="pictures at once", ylabel="pictures a second")
    right.set_title("Batches", fontsize="medium")
    right.margins(y=0.4)  # room for the legend
    right.legend(frameon=False, fontsize="small", loc="upper left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    instead = "in place of the usual list"
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help=f"folders, bundled names or Hub ids, {instead}")
    parser.add_argument("--preset", nargs="+", default=[], choices=PRESETS, metavar="NAME", help=f"random weights, {instead}")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16], metavar="N", help="beside 1; 4 and 16 by default")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--turns", type=int, default=TURNS, help=f"{TURNS} by default, as far as {SECONDS} seconds go")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draws the first model, its peers and batches")
    args = parser.parse_args()
    if min(*args.batch, args.turns) < 1:
        parser.error("--batch and --turns take whole numbers from 1 on.")
    absent = [] if args.no_peers else missing()
    absent += ["matplotlib"] if args.chart and not find_spec("matplotlib") else []
    if absent:
        parser.error(f"not installed: {', '.join(absent)}. pip install -r requirements-bench.txt, or leave out "
                     "what needs them (--no-peers, no --chart).")
    benchmark = Benchmark(everything=fast._threads())
    about = {
        "hardware": f"{provenance.processor()}, {os.cpu_count()} cores", "threads": benchmark.everything,
        "commit": provenance.commit(),
        "torch": torch.__version__, "numba": numba.__version__,
        **({} if args.no_peers else versions()),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()) + "\n", flush=True)
    batches = sorted({1, *args.batch})
    try:
        named = {name: ImageTransformer.from_pretrained(find(name)) for name in args.model}
    except CheckpointError as error:
        raise SystemExit(str(error)) from error
    named |= {f"preset {name}": fresh(PRESETS[name]) for name in args.preset}
    for name, model in named.items():
        benchmark.add(name, model, batches, ("bf16", "fp32"), eager=True, against_peers=not args.no_peers)
    if not named:
        usual(benchmark, batches, not args.no_peers)
    benchmark.run(args.turns)
    found = benchmark.results()
    print_tables(found)
    if args.chart:
        chart(found, args.chart)
    print(json.dumps(about | found))


if __name__ == "__main__":
    main()
