"""Bits/dim of a model on held-out images: python train/evaluate.py --checkpoint FOLDER --data FOLDER.

The figure is the negative log-likelihood in bits, over all images, each counted once, divided by the number of
sub-pixels: of p(image), of p(image | class) for a model with classes and labelled data, and of p(high | low) for a
super-resolution model, where low is the image reduced by area means. The same with labels or sources shuffled tells
whether the model listens to them. The last line of output is one JSON object.

Several processes share the images and find the same figures: `accelerate launch train/evaluate.py ...`, or on CPUs
`ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 train/evaluate.py ...`.
"""

if __name__ == "__main__":
    import ctrl_c

    ctrl_c.ends_quietly()

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, with nothing installed

import torch
from accelerate import Accelerator
from tqdm import tqdm

import data
from averaging import average, open_model
from files import try_out, write_whole
from imtx import ImageTransformer, draw
from likelihood import bits, bits_per_dim, breakdown, measure, sources_of
from memory import keep_freed_memory
from processes import check_launch, our_share, rank, summed, told_by_the_launcher
from publishing import origins

SAMPLES = 64  # for the consistency of a super-resolution model


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--checkpoint", metavar="MODEL",
        help="model folder, bundled name or Hub id; of a training run OUTPUT/checkpoints/step-.../raw, the trained weights, "
        "or .../ema, their moving average",
    )
    which.add_argument(
        "--average", metavar="MODEL", nargs="+", help="two or more of these: evaluate the arithmetic mean of their weights"
    )
    parser.add_argument("--save", metavar="FOLDER", type=Path, help="with --average: write that model to a new folder")
    data.add_options(parser, split="test")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N images")
    parser.add_argument("--compile", action="store_true", help="torch.compile, for many images; needs a C++ compiler")
    parser.add_argument("--batch-size", metavar="N", type=int, help="images at a time (1 on a CPU, else 16); changes no figure")
    parser.add_argument("--no-class", action="store_true", help="p(image) of a model with classes: leave the labels out")
    parser.add_argument(
        "--breakdown", metavar="FILE.json", type=Path,
        help="write bits/dim by class, by position and, for a categorical model, by colour, in raster order",
    )
    parser.add_argument(
        "--samples", metavar="N", type=int,
        help="super-resolution: draw one sample for each of the first N images and report its consistency, the RMSE in "
        f"levels (0..255) between the sample reduced by area means and the source; {SAMPLES} unless told, 0 for none",
    )
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1 or args.batch_size is not None and args.batch_size < 1:
        parser.error("--limit and --batch-size must be at least 1.")
    if args.samples is not None and args.samples < 0:
        parser.error(f"--samples must be at least 0, got {args.samples}.")
    if args.average is not None and len(args.average) < 2:
        parser.error("--average takes two or more models; for one, use --checkpoint.")
    if args.save is not None and args.average is None:
        parser.error("--save goes with --average: it writes the averaged model.")
    return args


def consistency_rmse(model: ImageTransformer, images: data.Images, batch_size: int = 16) -> float:
    """How well samples keep to their sources: RMSE in levels (0..255) between a sample's area means and the source.

    One sample an image, at temperature 1, with the image's index as seed; rounded area means, as the sources are. Several
    processes share the batches.
    """
    size = model.config.source_size
    sources, squares = sources_of(images, size), torch.zeros((), dtype=torch.int64)
    batches = our_share(torch.arange(len(images)).split(batch_size))
    for batch in tqdm(batches, desc="samples", disable=True if rank() else None, leave=False):
        drawn = draw(model, batch.tolist(), sources=sources[batch])
        reduced = sources_of(data.Images(drawn, None), size)
        squares += (reduced.long() - sources[batch].long()).square().sum()
    return (summed(squares, model.order.device).item() / sources.numel()) ** 0.5


def write_breakdown(file: Path, parts: dict | None = None) -> None:
    """Raises SystemExit with a sentence if `file` cannot be written. Without `parts` it only tries: better now than after
    an evaluation of hours."""
    try:
        if parts is None:
            try_out(file)
        else:
            write_whole(file, json.dumps(parts) + "\n")
    except OSError as error:
        raise SystemExit(f"--breakdown: {file} cannot be written: {error.strerror}.") from error


def save_average(model: ImageTransformer, names: list[str], folder: Path) -> None:
    """Writes the mean of the named models, which keeps their names and licence for publish.py.

    Raises SystemExit with a sentence for a folder that holds something or cannot be written to, and for licences at odds.
    """
    model.origin = origins.mean(names)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SystemExit(f"--save: {folder} exists already: name a new folder.")
        model.save_pretrained(folder)
    except OSError as error:
        raise SystemExit(f"--save: {folder} cannot be written: {error.strerror or error}.") from error


@told_by_the_launcher
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    keep_freed_memory()
    accelerator = Accelerator()
    check_launch(accelerator)
    main_process = accelerator.is_main_process
    if args.breakdown is not None and main_process:
        write_breakdown(args.breakdown)
    model = open_model(args.checkpoint) if args.average is None else average(args.average)
    config = model.config
    if args.samples and not config.source_size:
        raise SystemExit("--samples is for super-resolution models: this one has no sources that a sample could keep to.")
    images = data.load(args.data, args.split, config, args.limit, **data.options(args))
    if args.no_class:
        if not config.classes:
            raise SystemExit("--no-class is for models with classes: this one has none.")
        images = data.Images(images.pixels, None)
    elif config.classes and images.labels is None:
        accelerator.print("The data has no labels: evaluated with no class.")
    elif config.classes:
        images = data.match_labels(images, config.classes, args.data)
    if args.save is not None and main_process:
        save_average(model, args.average, args.save)
    model.to(accelerator.device)

    condition = "source" if config.source_size else "label" if config.classes and images.labels is not None else None
    started = time.monotonic()
    options = {"batch_size": args.batch_size, "compile": args.compile}
    nats = measure(model, images, **options)
    seconds = time.monotonic() - started
    result = {"bits_per_dim": bits(nats.images, config.sub_pixels)}
    if condition and len(images) > 1:
        # A model that listens to its condition pays more for a wrong one.
        result[f"shuffled_{condition}s_bits_per_dim"] = bits_per_dim(model, images, shuffle=True, **options)
    result["likelihood"] = {"source": "p(high | low)", "label": "p(image | class)", None: "p(image)"}[condition]
    result["images"] = len(images)
    result["split"] = args.split
    limited = [] if args.limit is None else ["--limit", str(args.limit)]
    if words := [*data.words(args, "test"), *limited, *["--no-class"] * args.no_class]:
        result["options"] = shlex.join(words)
    samples = min(SAMPLES if args.samples is None else args.samples, len(images)) if config.source_size else 0
    if samples:
        result["consistency_rmse"] = consistency_rmse(model, images[:samples], args.batch_size or 16)
        result["consistency_samples"] = samples
    result["parameters"] = sum(p.numel() for p in model.parameters())
    if args.average is not None:
        result["averaged_models"] = len(args.average)
    result["num_processes"] = accelerator.num_processes
    result["images_per_second"] = round(len(images) / seconds, 2)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # leaves the others in good order: only the main process has something to tell
    if not main_process:
        return

    if args.breakdown is not None:
        parts = breakdown(model, images, nats)
        write_breakdown(args.breakdown, parts)
        for name, of_class in parts.get("per_class", {}).items():
            print(f"{name:>32}  {of_class['bits_per_dim']:.4f}  of {of_class['images']:,} images")
    for name, value in result.items():
        shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        print(f"{name:>32}  {shown}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
