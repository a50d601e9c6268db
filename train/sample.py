"""Draws many samples into parquet files: python train/sample.py --checkpoint MODEL --count 50000 --output FOLDER.

For a FID, or to evaluate or train another model on them: evaluate.py and train.py read FOLDER/test-*.parquet, with the
columns image, label (for a model with classes), seed, and source (super-resolution: row of --sources). Sample i has seed
SEED + i; it depends on that and its label or source alone, not on the batch, the file or the process that it is drawn in,
but for the rounding of float32. FOLDER/samples.png shows the first 64.

Several processes share the work: `accelerate launch train/sample.py ...`, or on CPUs
`ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 train/sample.py ...`. Interrupted, the same command goes
on with the files that are not there yet.
"""

if __name__ == "__main__":
    import ctrl_c

    ctrl_c.ends_quietly()

import argparse
import hashlib
import io
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, with nothing installed

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

import data
from averaging import open_model
from files import write_whole
from imtx import ImageTransformer, draw
from imtx.images import save_png, sheet
from imtx.sampling import HOTTEST, MOST_GUIDANCE, SEEDS
from likelihood import sources_of
from processes import check_launch, told_by_the_launcher

SHEET = 64  # samples, in rows of 8


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="MODEL", required=True, help="model folder, bundled name or Hub id")
    parser.add_argument("--count", metavar="N", type=int, required=True, help="samples in all")
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True)
    parser.add_argument("--batch-size", metavar="N", type=int, default=64, help="samples at a time, of each process")
    parser.add_argument("--file-size", metavar="N", type=int, default=500, help="samples a file: what an interrupt costs")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--guidance", type=float, default=1.0, help="how far the class is followed, of a model with classes (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--class", metavar="NAME", dest="class_name", help="all of this class, not of each in turn")
    which.add_argument("--no-class", action="store_true", help="all of no class, not of each in turn")
    parser.add_argument(
        "--sources", metavar="DATA", help="super-resolution: pictures to take the sources from, in turn; parquet file, or a "
        "folder: its test-* files",
    )
    data.add_reading_options(parser, split="test")
    args = parser.parse_args(argv)
    if args.sources is None and (words := data.words(args, "test")):
        parser.error(f"{words[0]} goes with --sources: it says how those are read.")
    for name in ("count", "batch_size", "file_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    if not 1 / HOTTEST <= args.temperature <= HOTTEST:
        parser.error(f"--temperature must be from {1 / HOTTEST:g} to {HOTTEST:g}, got {args.temperature:g}.")
    if not 0 <= args.guidance <= MOST_GUIDANCE:
        parser.error(f"--guidance must be from 0 to {MOST_GUIDANCE}, got {args.guidance}.")
    if not 0 <= args.seed <= SEEDS - args.count:
        parser.error(f"--seed: seeds are 0 to {SEEDS - 1}, {args.seed} to {args.seed + args.count - 1} are asked for.")
    return args


class Samples:
    """The samples that a command asks for, by number 0..count-1, and the files that they lie in."""

    def __init__(self, args: argparse.Namespace, model: ImageTransformer):
        self.args, self.model, config = args, model, model.config
        self.sources = None
        if (args.sources is None) != (not config.source_size):
            raise SystemExit(
                "--sources DATA: this is a super-resolution model, say from which pictures." if config.source_size
                else "--sources: this model takes no source, leave it out."
            )
        if (args.class_name is not None or args.no_class) and not config.classes:
            raise SystemExit("--class, --no-class: this model has no classes, leave them out.")
        if args.guidance != 1 and (not config.classes or args.no_class):
            raise SystemExit("--guidance: there is no class that could be followed, leave it out.")
        if args.class_name is not None and args.class_name not in config.classes:
            raise SystemExit(f"--class: there is no {args.class_name}; the model's classes are {', '.join(config.classes)}.")
        if config.source_size:
            pictures = data.load(args.sources, args.split, config, args.count, **data.options(args))
            self.sources = sources_of(pictures, config.source_size)
        files = math.ceil(args.count / args.file_size)
        self.files = [args.output / f"test-{i:05d}-of-{files:05d}.parquet" for i in range(files)]

    def settings(self) -> dict:
        """All that the samples depend on, ready for JSON; fingerprints in place of the model and the sources."""
        args, weights = self.args, self.model.state_dict()
        model = fingerprint(repr(self.model.config).encode(), *(weights[name] for name in sorted(weights)))
        condition = {"class": args.class_name, "no_class": args.no_class, "guidance": args.guidance}
        if self.sources is not None:
            condition = {"sources": fingerprint(self.sources)}
        shared = {name: getattr(args, name) for name in ("count", "seed", "temperature", "file_size")}
        return {"model": model, **shared, **condition}

    def of_file(self, number: int) -> range:
        return range(self.args.count)[number * self.args.file_size : (number + 1) * self.args.file_size]

    def labels(self, samples: range) -> list[int] | None:
        """Of a model with classes; the class in turn, or the one that was asked for. None for no class."""
        classes = self.model.config.classes
        if not classes or self.args.no_class:
            return None
        return [i % len(classes) if self.args.class_name is None else classes.index(self.args.class_name) for i in samples]

    def columns(self, samples: range) -> dict[str, list]:
        """Draws them: the columns of a parquet file."""
        columns = {"image": [], "label": self.labels(samples), "seed": [self.args.seed + i for i in samples]}
        conditions = {"labels": columns["label"]}
        if self.sources is not None:
            columns["source"] = [i % len(self.sources) for i in samples]
            conditions = {"sources": self.sources[columns["source"]]}
        for start in range(0, len(samples), self.args.batch_size):
            batch = slice(start, start + self.args.batch_size)
            given = {name: None if value is None else value[batch] for name, value in conditions.items()}
            options = dict(temperature=self.args.temperature, guidance=self.args.guidance)
            pixels = draw(self.model, columns["seed"][batch], **options, **given)
            columns["image"] += [{"bytes": png(picture), "path": None} for picture in pixels.numpy()]
        return {name: column for name, column in columns.items() if column is not None}

    def write(self, number: int) -> None:
        """Draws the samples of a file, which is complete under its name or not there. Raises OSError."""
        samples, file, buffer = self.of_file(number), self.files[number], io.BytesIO()
        table = pa.table(self.columns(samples))
        pq.write_table(table.replace_schema_metadata(self.metadata(table.column_names)), buffer)
        write_whole(file, buffer.getvalue())

    def metadata(self, columns: list[str]) -> dict[str, str]:
        """What these columns hold, the names of the classes above all, as `datasets` and train/data write and read it."""
        features = {name: {"dtype": "int64", "_type": "Value"} for name in columns}
        features["image"] = {"_type": "Image"}
        if "label" in columns:
            features["label"] = {"names": list(self.model.config.classes), "_type": "ClassLabel"}
        return {"huggingface": json.dumps({"info": {"features": features}})}

    def save_sheet(self) -> None:
        """samples.png: the first ones, read back from the files. Raises OSError."""
        files = self.files[: math.ceil(SHEET / self.args.file_size)]
        cells = [cell for file in files for cell in pq.read_table(file, columns=["image"])["image"].to_pylist()][:SHEET]
        pictures = [np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in cells]
        save_png(sheet(np.stack(pictures), columns=8, scale=3), self.args.output / "samples.png")


def png(pixels: np.ndarray) -> bytes:
    """(h, w, 3) uint8 -> a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def fingerprint(*parts: bytes | torch.Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def claim(folder: Path, settings: dict) -> None:
    """Notes the settings in the folder. Raises SystemExit with a sentence if samples of others are in it."""
    note = folder / "samples.json"
    if not note.exists():
        if any(folder.glob("[!.]*")):
            raise SystemExit(f"--output: {folder} holds other files, name a new folder.")
        write_whole(note, json.dumps(settings, indent=2) + "\n")
        return
    try:
        before = json.loads(note.read_text())
    except json.JSONDecodeError as error:
        raise SystemExit(f"{note} is damaged: {error}.") from error
    if "guidance" in settings:
        before.setdefault("guidance", 1.0)  # of a folder from before there was any
    if before.keys() != settings.keys():
        raise SystemExit(f"--output: {folder} holds samples of a model of another kind.")
    for name, value in settings.items():
        if before[name] != value:
            raise SystemExit(f"--output: {folder} holds samples with {name} {before[name]}, now it is {value}.")


@told_by_the_launcher
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    accelerator = Accelerator()
    check_launch(accelerator)
    samples = Samples(args, open_model(args.checkpoint))
    since = time.monotonic()
    lock = FileLock(args.output / ".lock")  # the system, too, unlocks it when this process is gone, however it ends
    try:
        if accelerator.is_main_process:
            args.output.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            claim(args.output, samples.settings())
        accelerator.wait_for_everyone()
        samples.model.to(accelerator.device)
        missing = [number for number, file in enumerate(samples.files) if not file.exists()]
        accelerator.wait_for_everyone()  # all have looked before one writes
        share = missing[accelerator.process_index :: accelerator.num_processes]
        drawn, ours = (sum(len(samples.of_file(number)) for number in numbers) for numbers in (missing, share))
        with tqdm(total=ours, unit="sample", disable=None if accelerator.is_main_process else True) as bar:
            for number in share:
                samples.write(number)
                bar.update(len(samples.of_file(number)))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            samples.save_sheet()
    except Timeout as error:
        raise SystemExit(f"{args.output}: another process writes samples there. Wait for its end, or name another folder.") from error
    except OSError as error:
        raise SystemExit(f"{args.output} cannot be written to: {error.strerror or error}.") from error
    except KeyboardInterrupt as error:
        raise SystemExit("Interrupted. The same command goes on with the files that are not there yet.") from error
    finally:
        lock.release()
    if accelerator.is_main_process:
        print(json.dumps({
            "samples": args.count, "drawn": drawn, "files": len(samples.files), "output": str(args.output),
            "num_processes": accelerator.num_processes, "samples_per_second": round(drawn / (time.monotonic() - since), 2),
        }))


if __name__ == "__main__":
    main()
