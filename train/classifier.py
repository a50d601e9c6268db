"""Trains a small classifier of pictures, for train/judge.py: python train/classifier.py --data FOLDER --output FILE.safetensors.

A residual network of 1.9 million parameters: SGD with flips and crops, and a rate that falls to zero as the budget is used
up. The last 2,000 training images are held out, as they are from the generators that it will judge; nothing is chosen on
test images. The last line of output is one JSON object.
"""

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, with nothing installed

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import data
from files import try_out, write_whole
from imtx import Config
from imtx.presets import CIFAR10_CLASSES
from optimization import batch_indices, rate_factor
from publishing.provenance import commit, hardware

VALIDATION = 2000  # held out, unless that is more than a tenth
BATCH, RATE, WARMUP, MOMENTUM, WEIGHT_DECAY = 128, 0.2, 200, 0.9, 5e-4
WIDTHS = (32, 64, 128, 256)
ABOUT = "imtx_classifier"  # key of the file's metadata


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inside = nn.Sequential(*convolution(width, width), *convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


def convolution(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


class Classifier(nn.Module):
    """about: what the file tells beside the weights; "classes" (names) and "image_size" are always there."""

    def __init__(self, about: dict):
        super().__init__()
        self.about = about
        parts = [*convolution(3, WIDTHS[0])]
        for inputs, outputs in pairwise(WIDTHS):  # each halves the sides
            parts += [*convolution(inputs, outputs, stride=2), Residual(outputs)]
        self.body = nn.Sequential(*parts)
        self.head = nn.Linear(WIDTHS[-1], len(about["classes"]))
        self.to(memory_format=torch.channels_last)  # which is faster

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.about["classes"])

    def features(self, pixels: Tensor) -> Tensor:
        """(N, h, w, 3) uint8 -> (N, 256): what the last layer sees, means over the picture."""
        return self.body((pixels.permute(0, 3, 1, 2).float() - 128) / 64).float().mean(dim=(2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, h, w, 3) uint8 -> (N, classes) logits."""
        return self.head(self.features(pixels))

    def save(self, file: Path) -> None:
        """Raises OSError."""
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        write_whole(file, safetensors.torch.save(weights, {ABOUT: json.dumps(self.about)}))

    @classmethod
    def load(cls, file: Path) -> "Classifier":
        """In eval mode. Raises SystemExit with a sentence for a file that `save` did not write."""
        try:
            with safe_open(file, framework="pt") as opened:
                about = (opened.metadata() or {}).get(ABOUT)
                weights = {name: opened.get_tensor(name) for name in opened.keys()}
        except FileNotFoundError as error:
            raise SystemExit(f"There is no file {file}: train/classifier.py makes one.") from error
        except (SafetensorError, OSError) as error:
            raise SystemExit(f"{file} cannot be read as a classifier ({error}): train/classifier.py makes one.") from error
        if about is None:
            raise SystemExit(f"{file} holds other weights than a classifier's: train/classifier.py makes one.")
        model = cls(json.loads(about))
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:  # torch's word for names and shapes that do not fit
            raise SystemExit(f"{file} holds a classifier of other layers: train it anew with train/classifier.py.") from error
        return model.eval()


def varied(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """(N, s, s, 3) uint8 -> the same pictures, half of them mirrored, moved by at most s / 8 pixels each way.

    What moves in at an edge mirrors what is inside of it.
    """
    images, size = pixels.shape[:2]
    shift = size // 8
    moved = torch.arange(size) + torch.randint(-shift, shift + 1, (2, images, 1), generator=generator)
    rows, columns = size - 1 - (size - 1 - moved.abs()).abs()  # (N, s) each
    mirrored = torch.rand(images, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return pixels[torch.arange(images)[:, None, None], rows[:, :, None], columns[:, None, :]]


@torch.no_grad()
def predict(model: Classifier, pixels: Tensor, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """(N, h, w, 3) uint8 -> the likeliest classes (N,) int64 and the features (N, 256)."""
    features = torch.cat([model.features(batch) for batch in pixels.split(batch_size)])
    return model.head(features).argmax(dim=1), features


def accuracy(model: Classifier, images: data.Images) -> float:
    model.eval()
    return (predict(model, images.pixels)[0] == images.labels).double().mean().item()


def fit(
    model: Classifier, images: data.Images, validation: data.Images, *, seed: int, max_steps: int | None,
    max_minutes: float | None, autocast: bool,
) -> dict:
    """Trains until the budget of steps or of minutes of processor time is used up; what there is to tell of it."""
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    began, step, epoch, progress, loss_sum, losses = time.process_time(), 0, 1, 0.0, 0.0, 0
    while progress < 1:
        chosen = batch_indices(step, BATCH, len(images), seed)
        pixels, labels = varied(images.pixels[chosen], generator), images.labels[chosen]
        optimizer.param_groups[0]["lr"] = RATE * rate_factor("cosine", step, WARMUP, progress)
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(pixels).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, loss_sum, losses = step + 1, loss_sum + loss.item(), losses + 1
        minutes = (time.process_time() - began) / 60
        progress = max(step / max_steps if max_steps else 0.0, minutes / max_minutes if max_minutes else 0.0)
        if step * BATCH >= epoch * len(images):
            found = f"loss {loss_sum / losses:.3f}, validation accuracy {accuracy(model, validation):.3f}"
            print(f"epoch {epoch}, step {step}, {minutes:.1f} minutes: {found}", file=sys.stderr, flush=True)
            epoch, loss_sum, losses = epoch + 1, 0.0, 0
    return {
        "seed": seed, "steps": step, "batch_size": BATCH, "images": len(images), "processor_minutes": round(minutes, 2),
        "validation_images": len(validation), "validation_accuracy": accuracy(model, validation),
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_options(parser, split="train")
    parser.add_argument("--output", metavar="FILE.safetensors", type=Path, required=True)
    parser.add_argument("--max-steps", metavar="N", type=int, help=f"of {BATCH} images")
    parser.add_argument(
        "--max-minutes", metavar="N", type=float, help="of processor time, all threads together, so that other work on the "
        "machine takes nothing from it; 15 if no budget is named",
    )
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no", help="bf16: bfloat16 autocast (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.max_steps is None and args.max_minutes is None:
        args.max_minutes = 15.0
    for name in ("max_steps", "max_minutes"):
        if (value := getattr(args, name)) is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    config = Config()
    images = data.load(args.data, args.split, config, **data.options(args))
    classes = images.classes or CIFAR10_CLASSES  # copies of CIFAR-10 need not name them
    data.check_labels(images, classes, args.data)
    images, validation = data.hold_out(images, data.validation_size(len(images), VALIDATION))
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        try_out(args.output)
    except OSError as error:
        raise SystemExit(f"--output: {args.output} cannot be written: {error.strerror}.") from error
    torch.manual_seed(args.seed)
    model = Classifier({"classes": classes, "image_size": config.image_size})
    budget = {"max_steps": args.max_steps, "max_minutes": args.max_minutes}
    try:
        found = fit(model, images, validation, seed=args.seed, autocast=args.mixed_precision == "bf16", **budget)
    except KeyboardInterrupt as error:
        raise SystemExit("Interrupted before its end: no classifier is kept.") from error
    model.about |= found | {"commit": commit(), "hardware": hardware(torch.device("cpu"))}
    try:
        model.save(args.output)
    except OSError as error:
        raise SystemExit(f"--output: {args.output} cannot be written: {error.strerror}. No classifier is kept.") from error
    print(json.dumps(found | {"output": str(args.output)}))


if __name__ == "__main__":
    main()
