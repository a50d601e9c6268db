"""Bits/dim of a model on held-out images: python train/evaluate.py --checkpoint DIR --data FOLDER."""

import argparse
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, with nothing installed

import torch
from tqdm import tqdm

import data
from imtx import CheckpointError, ImageTransformer
from imtx.images import area_means


def sources_of(images: data.Images, source_size: int) -> torch.Tensor | None:
    """(N, h, w, 3) uint8 -> (N, s, s, 3) uint8: rounded area means; None for a model without sources."""
    if not source_size:
        return None
    return torch.from_numpy(area_means(images.pixels.numpy(), images.pixels.shape[1] // source_size))


@torch.inference_mode()
def nats(model: ImageTransformer, images: data.Images, batch_size: int = 16, shuffle: bool = False) -> torch.Tensor:
    """-log p of each image, (N,) float64, summed from float32 log-probabilities of the positions.

    With `shuffle`, each image gets the label or source of the image before it in a fixed random order.
    """
    config, device = model.config, model.order.device
    sources, labels = sources_of(images, config.source_size), images.labels if config.classes else None
    if shuffle:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        other = torch.empty_like(order)
        other[order] = order.roll(1)
        sources, labels = (None if t is None else t[other] for t in (sources, labels))
    total = []
    for batch in tqdm(torch.arange(len(images)).split(batch_size), desc="evaluate", disable=None, leave=False):
        label, source = (None if t is None else t[batch].to(device) for t in (labels, sources))
        log_prob = model.log_prob(images.pixels[batch].to(device), label, source)  # (n, P)
        total.append(-log_prob.double().sum(dim=1).cpu())
    return torch.cat(total)


def bits_per_dim(model: ImageTransformer, images: data.Images, **options) -> float:
    """Total nats / (ln 2 x sub-pixels), every image counted once (paper section 5)."""
    return nats(model, images, **options).sum().item() / (math.log(2) * model.config.sub_pixels * len(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="model folder, bundled name or Hub id")
    parser.add_argument("--data", required=True, help="parquet file, or a folder: its test-* files")
    parser.add_argument("--limit", type=int, help="only the first N images, in file order")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1 or args.batch_size < 1:
        parser.error("--limit and --batch-size must be at least 1.")
    try:
        model = ImageTransformer.from_pretrained(args.checkpoint)
    except CheckpointError as error:
        raise SystemExit(str(error)) from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    images = data.load(args.data, "test", model.config.image_size, args.limit)
    if model.config.classes and images.labels is None:
        print("The data has no labels: evaluated with no class.")
    elif model.config.classes:
        data.check_labels(images, model.config.classes, args.data)

    started = time.time()
    result = {"bits_per_dim": bits_per_dim(model, images, batch_size=args.batch_size)}
    seconds = time.time() - started
    if len(images) > 1 and (model.config.source_size or images.labels is not None and model.config.classes):
        # A model that listens to its condition pays more for a wrong one.
        wrong = "shuffled_sources_bits_per_dim" if model.config.source_size else "shuffled_labels_bits_per_dim"
        result[wrong] = bits_per_dim(model, images, batch_size=args.batch_size, shuffle=True)
    result["images"] = len(images)
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["images_per_second"] = round(len(images) / seconds, 2)
    for name, value in result.items():
        print(f"{name:>32}  {value:.4f}" if isinstance(value, float) else f"{name:>32}  {value:,}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
