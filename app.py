"""The Image Transformer in a browser: python app.py [--model PATH_OR_HUB_ID]... (see --help)."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported: no request leaves this machine

import argparse
from pathlib import Path

import gradio as gr
import torch

from imtx import fast
from imtx.checkpoint import CheckpointError
from imtx.demo.canvas import canvas
from imtx.demo.gallery import sheets
from imtx.demo.models import GENERATOR, UPSCALER, Installed, installed
from imtx.demo.requests import GUIDANCES, MAX_COUNT, NO_CLASS, TEMPERATURES, choices
from imtx.demo.tasks import Tasks
from imtx.images import MAX_ZOOM

ASSETS, PAGE = Path(__file__).parent / "assets", Path(__file__).parent / "imtx" / "demo"
ABOUT = """
# Image Transformer

Watch a neural network draw a picture one pixel at a time, row by row or block by block. It looks only at pixels
nearby that it has drawn already, works out how likely every colour is for the next one, and rolls dice.
"""
HOW = """
The models are decoder-only (or, to enlarge, encoder-decoder) transformers over pixels with *local* attention,
after Parmar et al., [Image Transformer](https://arxiv.org/abs/1802.05751), ICML 2018. A **1D layout** draws row by
row, a **2D layout** one rectangle after another. For each pixel a model with **DMOL output** gives a distribution over
all 16.7 million colours, a discretized mixture of logistics; one with **categorical output** gives three, over the
256 levels of red, green and blue in turn, and takes three steps a pixel. **Temperature** sharpens that distribution
below 1 (calm, flat pictures) and flattens it above 1 (busy, noisy ones). **Guidance** (Ho and Salimans, 2022) asks the
model twice, with the class and without, and goes beyond what the class changes: 1 is what the model has learned, more makes
pictures that look more like their class. The same seed gives the same picture again.
Drawing may outrun the eye: **Pace** is how fast this page shows it, and the line below says how long it really took.
The bundled weights were trained by this repository; pictures are 32x32 because the training data are.
"""
MODEL_HELP = """a model folder, a bundled name or a Hub id, listed in front of the bundled models of its task; may be
given several times, and the first of a task is what it starts with"""
RANDOM_SEED = "(randomise, seed) => randomise || seed === null ? Math.floor(Math.random() * 2 ** 32) : seed"
# canvas.js stops; it hears of what changes, so each press of Stop is another value.
STOPPED = "(value) => ({...(typeof value === 'string' ? JSON.parse(value) : value), stopped: Date.now()})"
AT_ONCE = max(fast.processors(), 2)  # visitors; compiled code does not hold Python's lock, and a short request passes a long one


def screen_and_buttons(task: str, ready: dict | None) -> tuple[gr.HTML, gr.Button, gr.Button, gr.File, gr.Number]:
    """Buttons below the pictures: whoever presses one sees what it does, on a phone too. The pictures as files; the seed
    that was used, for the API: in its field it would undo what is typed while a picture grows."""
    screen, used = canvas(task, ready), gr.Number(visible=False, label="seed")
    with gr.Row(elem_classes="run"):
        run, stop = gr.Button("Run", variant="primary", min_width=100), gr.Button("Stop", min_width=100)
    with gr.Accordion("Download the samples", open=False):
        return screen, run, stop, gr.File(label="PNG files", file_count="multiple", interactive=False), used


def model_dropdown(models: dict[str, Installed]) -> gr.Dropdown:
    first = next(iter(models.values()))
    return gr.Dropdown(list(models), value=first.name, label="Model", info=first.about, filterable=False)


def controls(temperature: float = 0.9) -> tuple[gr.Slider, gr.Slider, gr.Number, gr.Checkbox]:
    temperature = gr.Slider(*TEMPERATURES, value=temperature, step=0.05, label="Temperature", info="Low is calm, high is wild.")
    count = gr.Slider(1, MAX_COUNT, value=4, step=1, label="Samples")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, min_width=140, info="Of the first sample.")
        randomise = gr.Checkbox(True, label="Randomise the seed", min_width=140)
    return temperature, count, seed, randomise


def connect(
    task, name: str, given, widgets, model: gr.Dropdown, screen: gr.HTML, run: gr.Button, stop: gr.Button, files: gr.File,
    used: gr.Number, *more,
) -> None:
    """Run and Stop of a tab; more: widgets of this tab alone."""
    temperature, count, seed, randomise = widgets
    drawing = run.click(None, [randomise, seed], seed, js=RANDOM_SEED, api_visibility="private").then(
        task, [given, temperature, count, seed, model, *more], [screen, files, used], trigger_mode="multiple",
        api_name=name, preprocess=False, show_progress="minimal", show_progress_on=temperature,
        concurrency_id="model", concurrency_limit=AT_ONCE,  # over all tabs
    )
    run.click(None, cancels=[drawing], api_visibility="private")  # pressed again, it begins anew
    stop.click(None, screen, screen, js=STOPPED, cancels=[drawing], api_visibility="private")


def class_and_guidance(names: list[str], value: str) -> tuple[gr.Dropdown, gr.Slider]:
    some = len(names) > 1
    # Where samples look right to train/judge.py, as README shows: more guidance gains little.
    return gr.Dropdown(names, value=value, label="Class", interactive=some), gr.Slider(
        *GUIDANCES, value=5, step=0.5, label="Guidance", interactive=some,
        info="How closely the class is followed; 1 is what was learned, 0 ignores it.",
    )


def picture_input(label: str, *folders: str) -> tuple[gr.Image, str]:
    """An upload with the examples of some folders below it, of which the first is chosen already; and that one's path."""
    examples = {name: sorted(str(p) for p in (ASSETS / "examples" / name).iterdir()) for name in folders}
    first = examples[folders[0]][0]
    # No "clipboard": its button empties the box, and says nothing where the browser does not let it read.
    picture = gr.Image(first, type="filepath", label=label, sources=["upload"], height=260, elem_classes="crisp")
    for name, files in examples.items():
        gr.Examples(files, picture, cache_examples=False, label=name.capitalize())
    return picture, first


def build(tasks: Tasks) -> gr.Blocks:
    ready = tasks.ready(ASSETS / "gallery")  # something good before the first click
    quiet = dict(preprocess=False, show_progress="hidden", trigger_mode="always_last", api_visibility="private")
    generator = next(iter(tasks.generators.values()))
    names = choices(generator.classes)
    with gr.Blocks(title="Image Transformer", delete_cache=(3600, 3600)) as demo:
        gr.Markdown(ABOUT)
        of_example = gr.Textbox(visible=False)  # the class that the picture to complete came with, if it is an example
        with gr.Tabs(overflow_behavior="wrap"):  # a menu would hide a tab on a phone whose style sheet comes late
            with gr.Tab("Generate"), gr.Row(elem_classes="task"):
                with gr.Column():
                    screen = screen_and_buttons("generate", ready["generate"])
                with gr.Column():
                    model = model_dropdown(tasks.generators)
                    name, guidance = class_and_guidance(names, names[0])
                    widgets = controls(temperature=1.0)
            model.change(tasks.choose_generator, [model, name], [model, name, guidance], **quiet)
            connect(tasks.generate, "generate", name, widgets, model, *screen, guidance)

            with gr.Tab("Complete"), gr.Row(elem_classes="task"):
                with gr.Column():
                    screen = screen_and_buttons("complete", ready["complete"])
                with gr.Column():
                    kept = gr.Markdown(generator.about_completing)
                    image, _ = picture_input("Picture", "objects")
                with gr.Column():
                    model = model_dropdown(tasks.generators)
                    name, guidance = class_and_guidance(names, NO_CLASS)
                    widgets = controls()
            model.change(tasks.choose_completer, [model, name], [model, name, guidance, kept], **quiet)
            gr.on(
                [demo.load, image.change], tasks.class_of, [image, model, name, of_example], [name, of_example], **quiet
            )
            connect(tasks.complete, "complete", image, widgets, model, *screen, name, guidance)

            with gr.Tab("Super-resolve"), gr.Row(elem_classes="task"):
                with gr.Column():
                    screen = screen_and_buttons("super-resolve", ready["super-resolve"])
                with gr.Column():
                    picture, example = picture_input("Portrait or object", "faces", "objects")
                    with gr.Accordion("Frame the face: eyes at half the height, chin just inside", open=False):
                        zoom = gr.Slider(1, MAX_ZOOM, value=1, step=0.05, label="Zoom")
                        x = gr.Slider(0, 1, value=0.5, step=0.01, label="Left to right")
                        y = gr.Slider(0, 1, value=0.5, step=0.01, label="Top to bottom")
                    image = gr.Image(
                        example, type="filepath", format="png", label="What becomes 8x8", height=140,
                        interactive=False, buttons=[], elem_classes="crisp",
                    )
                with gr.Column():
                    model = model_dropdown(tasks.upscalers)
                    widgets = controls()
            model.change(tasks.choose_upscaler, model, model, **quiet)
            # One listener: with one for each of them an answer to what came earlier might arrive last.
            changes = [demo.load, picture.change, zoom.change, x.change, y.change, model.change]
            gr.on(changes, tasks.frame, [picture, zoom, x, y, model], image, **quiet)
            connect(tasks.super_resolve, "super_resolve", image, widgets, model, *screen)

        with gr.Accordion("What the bundled models draw: seeds in order, none chosen", open=False):
            gr.Gallery(
                sheets(ASSETS / "figures", (GENERATOR, UPSCALER)), columns=3, height="auto", object_fit="contain",
                show_label=False, elem_classes="sheets", buttons=["download", "fullscreen"],
            )
        with gr.Accordion("How it works", open=False):
            gr.Markdown(HOW)
    return demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[], metavar="PATH_OR_HUB_ID", help=MODEL_HELP)
    args = parser.parse_args()
    torch.set_num_threads(1)  # until the step is compiled, PyTorch's tiny operations would only be slower on more threads
    try:
        generators, upscalers = installed(args.model)
    except CheckpointError as error:
        raise SystemExit(str(error)) from error
    for task, models in (("Generate, Complete", generators), ("Super-resolve", upscalers)):
        print(f"{task}:", *models.values(), sep="\n    ", flush=True)
    demo = build(Tasks(generators, upscalers, examples=ASSETS / "examples"))
    demo.queue(max_size=32).launch(
        css=(PAGE / "page.css").read_text(), js=(PAGE / "page.js").read_text(), ssr_mode=False, show_error=False,
        max_file_size="8mb", prevent_thread_lock=True,
    )
    for models in (generators, upscalers):
        next(iter(models.values())).warm_up()  # while visitors come in; not before, as it would keep the page from starting
    demo.block_thread()


if __name__ == "__main__":
    main()
