"""The sheet of samples on a model card: seeds 0, 1, 2, ... in order, none chosen."""

import numpy as np
import torch
from tqdm import tqdm

from data import Images
from imtx import ImageTransformer, draw
from imtx.images import NEAREST, enlarge, sheet
from likelihood import sources_of

ROWS, COLUMNS = 4, 8
MOST_CLASSES = 10  # columns, one a class


def sample_sheet(
    model: ImageTransformer, images: Images | None, temperature: float, guidance: float, show_data: bool, pictures: str
) -> tuple[np.ndarray, str]:
    """(h, w, 3) uint8, enlarged three times, and its caption. Sample i has seed i and the condition of its column.

    images: for a super-resolution model, the pictures whose sources it gets; none of them is in the sheet unless
    `show_data` asks for a first row of sources and a last one of the pictures themselves. pictures: what they are.
    """
    config, kinds, conditions, of_columns = model.config, 1, {}, ""
    if config.source_size:
        kinds = min(COLUMNS, len(images))
        of_columns = (
            f" Columns, in turn: the {pictures}, above the samples as sources and below as they are."
            if show_data else f" Columns, in turn: the sources of the {pictures}, which are not shown."
        )
    elif config.classes:
        kinds = min(MOST_CLASSES, len(config.classes))
        of_columns = f" Columns, in turn: {', '.join(config.classes[:kinds])}."
    columns = kinds * max(1, COLUMNS // kinds)
    shown = torch.arange(columns) % kinds
    if config.source_size:
        conditions["sources"] = sources_of(images, config.source_size)[shown]
    elif config.classes:
        conditions["labels"] = shown
    rows = []
    for row in tqdm(range(ROWS), desc="samples", unit="row", disable=None, leave=False):  # one by one, for want of memory
        seeds = range(row * columns, (row + 1) * columns)
        rows.append(draw(model, seeds, temperature=temperature, guidance=guidance, **conditions).numpy())
    if show_data:
        scale = config.image_size // config.source_size
        rows.insert(0, np.stack([enlarge(source, scale, NEAREST) for source in conditions["sources"].numpy()]))
        rows.append(images.pixels[shown].numpy())
    guided = f" and guidance {guidance:g}" * (guidance != 1)
    caption = (
        f"*Samples with seeds 0 to {ROWS * columns - 1}, row by row, at temperature {temperature:g}{guided}: drawn in "
        f"order, none chosen.{of_columns}*"
    )
    return sheet(np.concatenate(rows), columns, scale=3), caption
