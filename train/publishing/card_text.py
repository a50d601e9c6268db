"""The text of model cards, below the front matter: what the model is, how to use it, where its figures come from."""

from pathlib import PurePosixPath

from .cards import GENERATION, SUPER_RESOLUTION, Entry
from .known_data import Data, Licence
from .records import Training
from imtx import Config
from imtx.checkpoint import Origin

SAMPLING = "in float32; by default compiled on a CPU, where the matrices are read as they are stored, and by PyTorch elsewhere"
PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}  # of accelerate
CHECKED = "all training images as decoded, held-out ones included, and of their labels, if they have any"
LIMITS = {
    GENERATION: "For demonstration and research. It draws pictures like those that it was trained on, their biases "
    "included, and knows of nothing else.",
    SUPER_RESOLUTION: "For demonstration and research. It invents plausible detail, never the true one: do not use it to "
    "recognise people, nor as evidence of what a picture shows.",
}


def body(
    entry: Entry, config: Config, training: Training | None, data: Data, licence: Licence, *, caption: str,
    title: str | None = None, about: str | None = None, origin: Origin | None = None, logged: bool = False,
) -> str:
    """The card's Markdown below its front matter. What was not recorded or measured is said to be so.

    caption: under samples.png. about: Markdown of the author's own, at the end. origin: what the weights were made from.
    logged: whether log.jsonl lies beside it.
    """
    started = "What it started from shows in it too, the more the less it was trained." if entry.init else None
    limits = " ".join(text for text in (LIMITS[entry.task], started, data.limits) if text)
    cells = {name: cell.replace("|", r"\|") for name, cell in table(entry, training, data, licence, origin, logged).items()}
    rows = "\n".join(f"| {name} | {cell} |" for name, cell in cells.items())
    parts = [
        f"# {entry.name}: {title or default_title(entry, config, data)}",
        architecture(config),
        f"![Samples](samples.png)\n\n{caption}",
        f"With `imtx` installed:\n\n```python\n{usage(entry.hub_id, config)}\n```",
        f"| | |\n|---|---|\n{rows}",
        curve(training),
        f"**Use and limits.** {limits}",
        about and about.strip(),
    ]
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def default_title(entry: Entry, config: Config, data: Data) -> str:
    size, source = config.image_size, config.source_size
    what = f"{source}x{source} to {size}x{size}" if source else f"{size}x{size} pictures"
    return f"{what}, fine-tuned from {entry.init} on {data.name}" if entry.init else f"{what}, trained on {data.name}"


def architecture(config: Config) -> str:
    size, source = config.image_size, config.source_size
    block = f"in the *{config.family}* block of `imtx`"
    output = f"a discretized mixture of {config.mixtures} logistics" if config.output == "dmol" else (
        f"a softmax over {config.levels} levels"
    )
    unit = "sub-pixels" if config.layout == "1d" and config.channels == 3 else "pixels"
    blocks = f"{config.layout.upper()} local attention (query block {words(config.query_block)}, memory block "
    blocks += f"{words(config.memory_block)} {unit})"
    if source:
        scale = size // source
        return (
            f"An Image Transformer (Parmar et al., 2018) for {scale}x super-resolution: an encoder over the {source}x{source} "
            f"source (the means of {scale}x{scale} pixels, rounded) and a decoder with {blocks} and cross-attention, {block}, "
            f"with {output} as output. "
            f"{config.encoder_layers} + {config.layers} layers of width {config.width}."
        )
    of = "of a class or of none" if config.classes else "of no class"
    return (
        f"An Image Transformer (Parmar et al., 2018) with {blocks} {block}, and {output} as output. {config.layers} layers "
        f"of width {config.width}. It draws {size}x{size} pictures {of}, and completes pictures."
    )


def words(block: int | tuple[int, int]) -> str:
    return str(block) if isinstance(block, int) else "x".join(map(str, block))


def usage(hub_id: str, config: Config) -> str:
    size, source = config.image_size, config.source_size
    condition, of = "", ""
    if source:
        condition, of = ", sources=source", f"; source: ({source}, {source}, 3) uint8"
    elif config.classes:
        condition, of = ", labels=[0, 0, 0, 0]", f": {config.classes[0]}"
    return (
        "from imtx import ImageTransformer, draw\n"
        f'model = ImageTransformer.from_pretrained("{hub_id}")\n'
        f"pictures = draw(model, seeds=[0, 1, 2, 3]{condition})  # (4, {size}, {size}, 3) uint8{of}"
    )


def table(
    entry: Entry, training: Training | None, data: Data, licence: Licence, origin: Origin | None, logged: bool
) -> dict[str, str]:
    """Name of a row -> its cell, before bars are escaped."""
    about = f"{data.name} ({data.citation})" if data.citation else data.name
    about += f", {entry.data_note}" if entry.data_note else ""
    stored = "bfloat16 (matrices of the blocks) and float32" if entry.dtype == "bfloat16" else entry.dtype
    run = dict.fromkeys(("Command", "Steps", "Hardware", "Commit"), "not recorded")
    if training:
        about += f": {training.images:,} training images, {training.validation_images:,} held out for validation"
        precision = PRECISIONS.get(training.precision, training.precision)
        run = {
            "Command": f"`{training.command}`",
            "Steps": f"{training.steps:,} of {training.batch_size} images ({training.images_seen:,} images seen), "
            f"seed {training.seed}" + checkpoint(training),
            "Hardware": f"{training.hardware}, {precision}, {training.minutes:.0f} minutes of training",
            "Commit": f"`{training.commit}`" if training.commit else "not recorded",
        }
        if training.data_checksum:
            run = {"Checksum": f"`{training.data_checksum}`, SHA-256 of {CHECKED}", **run}
    figures, measured = "not measured", {}
    if figure := entry.evaluation:
        figures = (
            f"**{figure.bits_per_dim:.3f}** for {figure.likelihood} "
            f"on {figure.images:,} {figure.split} images, each counted once"
        )
        if figure.shuffled:
            condition, value = figure.shuffled
            figures += f"; with {condition} shuffled {value:.3f}"
        if figure.consistency_rmse is not None:
            measured["Consistency"] = (
                f"{figure.consistency_rmse:.2f} levels (0 to 255): RMSE between {figure.consistency_samples} samples, "
                "reduced to the size of the source, and their sources"
            )
        options = f" {figure.options}" if figure.options else ""
        measured["Measured with"] = f"`python train/evaluate.py --checkpoint {entry.hub_id} --data DATA{options}`, float32"
    started = {}
    if origin and origin.average_of:
        started["Average"] = f"the mean of the weights of {', '.join(f'`{name}`' for name in origin.average_of)}"
    if origin and origin.init:
        started["Started from"] = f"fine-tuned from `{origin.init}`, " + (
            f"whose licence is `{origin.licence['name'] or origin.licence['id']}`; its card tells what that was trained on"
            if origin.licence else "whose licence is not recorded: it may bind these weights too"
        )
    return {
        "Data": about,
        **started,
        "Licence": f"weights: {licence.text}; data: {data.licence}",
        "Parameters": f"{entry.parameters:,}, stored as {stored}",
        "Sampling": SAMPLING,
        **run,
        **({"Log": "[log.jsonl](log.jsonl): the loss of the steps, and validation, as they came"} if logged else {}),
        "Bits/dim": figures,
        **measured,
    }


def checkpoint(training: Training) -> str:
    """Which one of the run's, in words; nothing if it is the run's end."""
    kinds = {"ema": "the moving average of the weights", "raw": "the weights themselves"}
    name = training.checkpoint
    return f"; checkpoint `{name}` of that run, {kinds[PurePosixPath(name).name]}" if name else ""


def curve(training: Training | None) -> str | None:
    if training is None:
        return None
    parts = []
    if training.curve:
        points = ", ".join(f"{bits:.2f} at {step:,}" for step, bits in training.curve)
        parts.append(f"on the first held-out images, by step: {points}")
    if (end := training.validation_bits_per_dim) is not None:
        parts.append(f"on all {training.validation_images:,} held-out images at the end: {end:.3f}")
    return "Validation bits/dim of the moving average of the weights, " + ";\n".join(parts) + "." if parts else None
