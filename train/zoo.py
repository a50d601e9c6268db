"""The table of weights in README.md, from the cards of the bundled models: python train/zoo.py writes it anew."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, with nothing installed

from imtx.checkpoint import BUNDLED
from files import write_whole
from publishing.cards import GENERATION, SUPER_RESOLUTION, Entry
from publishing.records import read_text

FIRST, LAST = "<!-- zoo -->", "<!-- /zoo -->"
TASKS = {GENERATION: "Generate, Complete", SUPER_RESOLUTION: "Super-resolve"}  # as the demo calls them
PUBLISHED: frozenset[str] = frozenset()  # the Hub ids that exist by now
HEADER = (
    "| folder in `assets/weights` | task | preset | parameters | MB | test bits/dim | shuffled | consistency | Hub id |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def row(folder: Path) -> str:
    """A line of the table. Raises SystemExit with a sentence if the folder's card cannot be read."""
    entry = Entry.read(folder / "README.md")
    figures, shuffled, consistency = "not measured", "", ""
    if figure := entry.evaluation:
        likelihood = figure.likelihood.replace("|", r"\|")
        of = "" if figure.split == "test" else f"{figure.split} "
        figures = f"**{figure.bits_per_dim:.3f}** {likelihood} ({figure.images:,} {of}images)"
        shuffled = "{}: {:.3f}".format(*figure.shuffled) if figure.shuffled else ""
        consistency = "" if figure.consistency_rmse is None else f"{figure.consistency_rmse:.2f}"
    cells = (
        f"[`{folder.name}`](assets/weights/{folder.name})",
        TASKS[entry.task],
        f"`{entry.preset}`" if entry.preset else "not recorded",
        f"{entry.parameters:,}",
        f"{sum(shard.stat().st_size for shard in folder.glob('*.safetensors')) / 1e6:.1f}",
        figures,
        shuffled,
        consistency,
        f"`{entry.hub_id}`" + ("" if entry.hub_id in PUBLISHED else ", not yet published"),
    )
    return f"| {' | '.join(cells)} |\n"


def table(weights: Path = BUNDLED) -> str:
    """Of all model folders in `weights`, by name."""
    return HEADER + "".join(row(config.parent) for config in sorted(weights.glob("*/config.json")))


def renewed(readme: str, table: str) -> str:
    """The text with `table` between its two marks. Raises SystemExit with a sentence if it lacks them."""
    if not 0 <= readme.find(FIRST) < readme.find(LAST):
        raise SystemExit(f"README.md has lost the marks {FIRST} and {LAST} around its table of weights.")
    return readme[: readme.index(FIRST)] + f"{FIRST}\n{table}{LAST}" + readme[readme.index(LAST) + len(LAST) :]


def main() -> None:
    readme = ROOT / "README.md"
    write_whole(readme, renewed(read_text(readme), table()))


if __name__ == "__main__":
    main()
