"""Draws the sheets of samples that README shows: python train/figures.py --output assets/figures

Of each installed generator MODEL-classes.png, by class and temperature; MODEL-guidance.png, if it has classes; and
MODEL-completions.png, endings for the objects in assets/examples, without a class and, if it knows them, with theirs. Of each
upscaler MODEL-super-resolution.png, on the portraits there if its name begins with "faces", else on the objects. Seeds 0, 1,
2, ... in order, none chosen. No data set is needed.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, with nothing installed

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from averaging import open_model
from imtx import ImageTransformer, draw
from imtx.checkpoint import BUNDLED
from imtx.images import BICUBIC, NEAREST, area_means, enlarge, open_image, save_png, square_crop
from imtx.sampling import whole_rows

EXAMPLES = ROOT / "assets/examples"
TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
UPSCALING_TEMPERATURES = (0.8, 0.9, 1.0)  # the paper's
COMPLETION_TEMPERATURE = 0.9  # where the demo's slider stands
GUIDANCE = 5  # so does this, for samples of a class
GUIDANCES = (1, 3, 5, 8)  # 1: as the model has learned
MOST_COLUMNS = 10  # of classes
CLASS_ROWS, ENDINGS, ENLARGED = 2, 3, 2  # samples of a class, or for a picture, at one temperature
SCALE, GAP, FONT = 3, 4, 15  # of a pixel's side; between pictures and of text, in pixels of the sheet
EMPTY, INK, PAPER = 224, "black", "white"


def examples(kind: str, size: int) -> dict[str, np.ndarray]:
    """Name -> (size, size, 3) uint8 of assets/examples/`kind`, "objects" or "faces", in order."""
    files = sorted((EXAMPLES / kind).glob("*.*"))
    return {file.stem: square_crop(open_image(file), size) for file in files}


def labelled_sheet(title: str, columns: list[str], rows: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """(h, w, 3) uint8: a title, the names of the columns, and rows of a name and pictures (columns, s, s, 3) uint8, enlarged."""
    font = ImageFont.load_default(FONT)
    side = rows[0][1].shape[1] * SCALE
    line = sum(font.getmetrics())
    heads = max(name.count("\n") + 1 for name in columns) * (line + GAP)
    left = max(round(font.getlength(line)) for name, _ in rows for line in name.split("\n")) + 3 * GAP
    top = line + heads + 4 * GAP
    width = max(left + len(columns) * (side + GAP), round(font.getlength(title)) + 3 * GAP)
    page = Image.new("RGB", (width, top + len(rows) * (side + GAP)), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((GAP, GAP), title, INK, font)
    for i, name in enumerate(columns):
        middle = left + i * (side + GAP) + side // 2
        pen.multiline_text((middle, top - GAP), name, INK, font, anchor="md", align="center", spacing=GAP)
    for j, (name, pictures) in enumerate(rows):
        y = top + j * (side + GAP)
        pen.multiline_text((left - 2 * GAP, y + side // 2), name, INK, font, anchor="rm", align="right", spacing=GAP)
        for i, picture in enumerate(pictures):
            page.paste(Image.fromarray(enlarge(picture, SCALE, NEAREST)), (left + i * (side + GAP), y))
    return np.array(page)


def by_class(name: str, model: ImageTransformer, settings: list[dict[str, float]]) -> np.ndarray:
    """A column a class, at each setting (temperature, guidance) the same seeds; of a model without classes, a column a seed."""
    classes = model.config.classes[:MOST_COLUMNS]
    columns, rows = len(classes) or MOST_COLUMNS, []
    labels = list(range(columns)) if classes else None
    for setting in settings:
        for i in range(CLASS_ROWS):
            seeds = range(i * columns, (i + 1) * columns)
            pictures = draw(model, seeds, labels=labels, **setting)
            head = "\n".join(f"{what} {value}" for what, value in setting.items())
            rows.append((f"{head}\nseeds {seeds[0]} to {seeds[-1]}", pictures.numpy()))
    title = f"{name}: samples{' of each class' * bool(classes)}, seeds in order, none chosen"
    return labelled_sheet(title, [*classes] or [""] * columns, rows)


def completions(name: str, model: ImageTransformer) -> np.ndarray | None:
    """A column a picture: what is given, its endings, the truth; None if the model cannot keep a top half."""
    size = model.config.image_size
    kept = whole_rows(model, size // 2)
    if not kept:
        return None
    truths = examples("objects", size)
    pictures = np.stack(list(truths.values()))
    given = pictures.copy()
    given[:, kept:] = EMPTY
    rows, classes = [("given", given)], model.config.classes
    conditions = {"no class": {}}
    if set(truths) <= set(classes):
        conditions["its class"] = {"labels": [classes.index(shown) for shown in truths], "guidance": GUIDANCE}
    for head, condition in conditions.items():
        for i in range(ENDINGS):
            seeds = range(i * len(pictures), (i + 1) * len(pictures))
            endings = draw(
                model, seeds, given=torch.from_numpy(pictures), given_pixels=kept * size,
                temperature=COMPLETION_TEMPERATURE, **condition,
            )
            rows.append((f"{head}\nseeds {seeds[0]} to {seeds[-1]}", endings.numpy()))
    title = f"{name}: {kept} of {size} rows given, temperature {COMPLETION_TEMPERATURE}, "
    title += f"classes with guidance {GUIDANCE:g}, " * (len(conditions) > 1) + "seeds in order, none chosen"
    return labelled_sheet(title, list(truths), [*rows, ("truth", pictures)])


def super_resolution(name: str, model: ImageTransformer) -> np.ndarray:
    """A row a picture: the source, enlarged bicubically, samples at each temperature, the truth."""
    size, side = model.config.image_size, model.config.source_size
    truths = examples("faces" if name.startswith("faces") else "objects", size)
    pictures = np.stack(list(truths.values()))
    sources = area_means(pictures, size // side)
    columns = {f"{side}x{side}\ninput": NEAREST, "\nbicubic": BICUBIC}
    columns = {head: [enlarge(source, size // side, way) for source in sources] for head, way in columns.items()}
    for temperature in UPSCALING_TEMPERATURES:
        for seed in range(ENLARGED):
            seeds = [seed] * len(pictures)
            drawn = draw(model, seeds, sources=torch.from_numpy(sources), temperature=temperature)
            columns[f"temp. {temperature}\nseed {seed}"] = list(drawn.numpy())
    columns["\ntruth"] = list(pictures)
    rows = [(example, np.stack(row)) for example, row in zip(truths, zip(*columns.values()))]
    title = f"{name}: {side}x{side} to {size}x{size}, seeds in order at each temperature, none chosen"
    return labelled_sheet(title, list(columns), rows)


def sheets(name: str, model: ImageTransformer) -> dict[str, np.ndarray]:
    """File name -> sheet, of what the model does."""
    if model.config.source_size:
        return {f"{name}-super-resolution.png": super_resolution(name, model)}
    guided = {"guidance": GUIDANCE} if model.config.classes else {}
    drawn = {
        f"{name}-classes.png": by_class(name, model, [{"temperature": t, **guided} for t in TEMPERATURES]),
        f"{name}-completions.png": completions(name, model),
    }
    if guided:
        drawn[f"{name}-guidance.png"] = by_class(name, model, [{"temperature": 1.0, "guidance": g} for g in GUIDANCES])
    return {file: sheet for file, sheet in drawn.items() if sheet is not None}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True)
    parser.add_argument("--weights", metavar="FOLDER", type=Path, default=BUNDLED, help="of model folders (the bundled ones)")
    args = parser.parse_args(argv)
    folders = [config.parent for config in sorted(args.weights.glob("*/config.json"))]
    if not folders:
        raise SystemExit(f"--weights: {args.weights} holds no model folder.")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            for file, sheet in sheets(folder.name, open_model(folder)).items():
                save_png(sheet, args.output / file)
                print(args.output / file, flush=True)
    except OSError as error:
        raise SystemExit(f"--output: {args.output} cannot be written to: {error.strerror or error}.") from error


if __name__ == "__main__":
    main()
