"""Do samples look right to a machine? python train/judge.py --checkpoint MODEL --classifier FILE --data FOLDER

Draws samples of each class in turn with seeds 0, 1, 2, ... at several temperatures and guidances, and shows them to a
classifier that train/classifier.py trained on real images. It reports the share that the classifier assigns to the class
that was asked for, beside its accuracy on real test images; and the Frechet distance between the features of its last
layer, of samples and of as many test images, beside that between two sets of test images of the same size, as the distance
of any two sets falls with their size. Both are measures of our own: another classifier finds other figures, and this
distance is no FID. The last line of output is one JSON object.
"""

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, with nothing installed

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
from averaging import open_model
from classifier import Classifier, predict
from imtx import Config, ImageTransformer, draw
from imtx.sampling import HOTTEST, MOST_GUIDANCE
from publishing.records import shortened

TEMPERATURES = (0.7, 0.8, 0.9, 1.0)


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Between the Gaussians that have the means and covariances of two sets of features, (N, d) and (M, d).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), in float64; all roots are of symmetric matrices.
    """
    means, covariances = [], []
    for features in (one, other):
        features = np.asarray(features, np.float64)
        means.append(features.mean(axis=0))
        covariances.append(np.atleast_2d(np.cov(features, rowvar=False)))
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T  # rounding makes a zero a little less
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(min=0)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + sum(np.trace(c) for c in covariances) - 2 * cross)


def share(found: Tensor, asked: Tensor) -> tuple[float, float]:
    """(N,) classes each -> the share that agrees, and its standard error: that of N independent draws."""
    agreeing = (found == asked).double().mean().item()
    return agreeing, math.sqrt(agreeing * (1 - agreeing) / len(asked))


def in_turn(labels: Tensor, classes: int, count: int) -> Tensor:
    """(count,) int64: images by number, of class 0, 1, ... in turn, each class's in their order. Raises SystemExit."""
    members = [(labels == label).nonzero()[:, 0] for label in range(classes)]
    fewest = min(map(len, members))
    if fewest * classes < count:
        raise SystemExit(
            f"Two sets of --samples pictures are compared, and of some class there are only {fewest} test images: "
            f"give at most --samples {fewest * classes // 2}."
        )
    return torch.stack([numbers[:fewest] for numbers in members], dim=1).flatten()[:count]


def check(name: str, config: Config, classifier: Classifier) -> None:
    """Raises SystemExit with a sentence for a model whose samples the classifier cannot judge."""
    size, classes = classifier.about["image_size"], classifier.classes
    if config.source_size:
        raise SystemExit(f"--checkpoint: {name} enlarges pictures; it takes no class that could be recognised.")
    if (config.classes, config.image_size, config.levels) != (classes, size, 256):
        raise SystemExit(
            f"--checkpoint: {name} does not draw what the classifier knows, {size}x{size} pictures in 256 levels of the "
            f"classes {', '.join(classes)}. Train a classifier on the data of that model."
        )


def samples(model: ImageTransformer, labels: Tensor, temperature: float, guidance: float, batch_size: int) -> Tensor:
    """(N,) classes -> (N, h, w, 3) uint8: sample i has seed i."""
    batches = torch.arange(len(labels)).split(batch_size)
    bar = tqdm(batches, desc=f"temperature {temperature}, guidance {guidance}", unit="batch", disable=None, leave=False)
    options = dict(temperature=temperature, guidance=guidance)
    return torch.cat([draw(model, n.tolist(), labels=labels[n].tolist(), **options) for n in bar])


def table(result: dict) -> str:
    """In Markdown."""
    lines = ["| model | temperature | guidance | assigned to the asked class | Fréchet distance |", "|---|---|---|---|---|"]
    for row in result["judged"]:
        lines.append(
            f"| `{row['model']}` | {row['temperature']} | {row['guidance']:g} | {100 * row['share']:.1f} ± "
            f"{100 * row['standard_error']:.1f} % | {row['frechet_distance']:.2f} |"
        )
    right, error = 100 * result["accuracy"], 100 * result["accuracy_standard_error"]
    lines.append(f"| test images | | | {right:.1f} ± {error:.1f} % | {result['real_frechet_distance']:.2f} |")
    return "\n".join(lines)


def told_apart(names: list[str]) -> list[str]:
    """What the table calls the models: the end of each name or, where these are alike, the name. Raises SystemExit for twins."""
    for called in ([Path(name).name for name in names], [shortened(name) for name in names]):
        if len(set(called)) == len(called):
            return called
    raise SystemExit(f"--checkpoint: two models are called {max(called, key=called.count)}. Judge them one after the other.")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", metavar="MODEL", nargs="+", required=True, help="one or more generators: folder, bundled name or Hub id"
    )
    parser.add_argument("--classifier", metavar="FILE.safetensors", type=Path, required=True, help="of train/classifier.py")
    data.add_options(parser, split="test")
    parser.add_argument("--samples", metavar="N", type=int, default=1000, help="at each temperature and guidance (%(default)s)")
    parser.add_argument("--temperatures", metavar="T", type=float, nargs="+", default=TEMPERATURES, help="(0.7 0.8 0.9 1.0)")
    parser.add_argument("--guidances", metavar="G", type=float, nargs="+", default=[1.0], help="each at each temperature (1)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=16, help="samples at a time; changes no figure")
    args = parser.parse_args(argv)
    if args.samples < 2 or args.batch_size < 1:
        parser.error("--samples must be at least 2, --batch-size at least 1.")
    if not all(1 / HOTTEST <= temperature <= HOTTEST for temperature in args.temperatures):
        got = " ".join(map("{:g}".format, args.temperatures))
        parser.error(f"--temperatures must be from {1 / HOTTEST:g} to {HOTTEST:g}, got {got}.")
    if not all(0 <= guidance <= MOST_GUIDANCE for guidance in args.guidances):
        parser.error(f"--guidances must be from 0 to {MOST_GUIDANCE}, got {' '.join(map(str, args.guidances))}.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    classifier = Classifier.load(args.classifier)
    models = {told: open_model(name) for told, name in zip(told_apart(args.checkpoint), args.checkpoint)}
    for name, model in models.items():
        check(name, model.config, classifier)
    config = model.config  # of any of them: all draw the same kind of pictures
    images = data.match_labels(data.load(args.data, args.split, config, **data.options(args)), config.classes, args.data)
    chosen = in_turn(images.labels, len(config.classes), 2 * args.samples)

    found, features = predict(classifier, images.pixels)
    accuracy, error = share(found, images.labels)
    real, other = (features[numbers].numpy() for numbers in chosen.split(args.samples))
    result = {
        "accuracy": accuracy, "accuracy_standard_error": error, "images": len(images), "samples": args.samples,
        "real_frechet_distance": frechet_distance(real, other), "judged": [],
    }
    labels, began = torch.arange(args.samples) % len(config.classes), time.monotonic()
    for name, model in models.items():
        for temperature, guidance in itertools.product(args.temperatures, args.guidances):
            found, features = predict(classifier, samples(model, labels, temperature, guidance, args.batch_size))
            agreeing, error = share(found, labels)
            distance = frechet_distance(features.numpy(), real)
            row = {"model": name, "temperature": temperature, "guidance": guidance}
            result["judged"].append(row | {"share": agreeing, "standard_error": error, "frechet_distance": distance})
    drawn = args.samples * len(result["judged"])
    result["samples_per_second"] = round(drawn / (time.monotonic() - began), 2)
    print(f"{table(result)}\n{json.dumps(result)}")


if __name__ == "__main__":
    main()
