"""The Image Transformer in a browser: python app.py [--model PATH_OR_HUB_ID]."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported: no request leaves this machine

import argparse
from pathlib import Path

import gradio as gr
import torch

from imtx.checkpoint import HUB_IDS
from imtx.demo.canvas import canvas
from imtx.demo.requests import MAX_COUNT, NO_CLASS, SURPRISE, TEMPERATURES
from imtx.demo.tasks import GENERATOR, UPSCALER, Loaded, Tasks
from imtx.images import MAX_ZOOM

ASSETS = Path(__file__).parent / "assets"
ABOUT = """
# Image Transformer

Watch a neural network draw a 32x32 picture one pixel at a time, left to right, top to bottom. It looks only at pixels
nearby that it has drawn already, works out how likely every colour is for the next one, and rolls dice.
"""
HOW = """
The model is a decoder-only (or, to enlarge faces, an encoder-decoder) transformer over pixels with *local* attention,
after Parmar et al., [Image Transformer](https://arxiv.org/abs/1802.05751), ICML 2018. For each pixel it gives a
distribution over all 16.7 million colours, a discretized mixture of logistics. **Temperature** sharpens that
distribution below 1 (calm, flat pictures) and flattens it above 1 (busy, noisy ones). The same seed always gives the
same picture. The weights were trained by this repository; pictures are 32x32 because the training data are.
"""
MODEL_HELP = f"""a model folder, a bundled name or a Hub id, in place of the bundled weights of its task
(our own Hub ids, not yet published: {", ".join(HUB_IDS.values())})"""
RANDOM_SEED = "(randomise, seed) => randomise ? Math.floor(Math.random() * 2 ** 32) : seed"
STOPPED = """(value) => {
    const v = typeof value === 'string' ? JSON.parse(value) : value;
    if (v.hex.length === 6 * v.count * (v.size ** 2 - v.given)) return v;  // nothing to stop: it is complete
    return {...v, msg: 'Stopped.', stopped: true};
}"""
CSS = ".crisp img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain }"


def screen_and_buttons(task: str, ready: dict | None) -> tuple[gr.HTML, gr.Button, gr.Button]:
    """Buttons below the pictures: whoever presses one sees what it does, on a phone too."""
    screen = canvas(task, ready)
    with gr.Row():
        return screen, gr.Button("Run", variant="primary", min_width=100), gr.Button("Stop", min_width=100)


def controls() -> tuple[gr.Slider, gr.Slider, gr.Number, gr.Checkbox]:
    temperature = gr.Slider(*TEMPERATURES, value=0.9, step=0.05, label="Temperature", info="Low is calm, high is wild.")
    count = gr.Slider(1, MAX_COUNT, value=4, step=1, label="Samples")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, min_width=140)
        randomise = gr.Checkbox(True, label="Randomise the seed", min_width=140)
    return temperature, count, seed, randomise


def connect(task, name: str, given, widgets, screen: gr.HTML, run: gr.Button, stop: gr.Button, files: gr.File) -> None:
    """Run and Stop of a tab. One visitor is served at a time, over all tabs: two would share the same cores."""
    temperature, count, seed, randomise = widgets
    drawing = run.click(None, [randomise, seed], seed, js=RANDOM_SEED, api_visibility="private").then(
        task, [given, temperature, count, seed], [screen, files, seed],
        api_name=name, preprocess=False, show_progress="minimal", show_progress_on=temperature,
        concurrency_id="model", concurrency_limit=1,
    )
    stop.click(None, screen, screen, js=STOPPED, cancels=[drawing], api_visibility="private")


def picture_input(label: str, folder: str) -> tuple[gr.Image, str]:
    """An upload with examples below it, of which the first is chosen already; and that one's path."""
    examples = sorted(str(p) for p in (ASSETS / "examples" / folder).iterdir())
    sources = ["upload", "clipboard"]
    picture = gr.Image(examples[0], type="filepath", label=label, sources=sources, height=260, elem_classes="crisp")
    gr.Examples(examples, picture, cache_examples=False)
    return picture, examples[0]


def png_files() -> gr.File:
    with gr.Accordion("Download the samples", open=False):
        return gr.File(label="PNG files, 32x32", file_count="multiple", interactive=False)


def build(tasks: Tasks, classes: tuple[str, ...]) -> gr.Blocks:
    ready = tasks.ready(ASSETS / "gallery")  # something good before the first click
    with gr.Blocks(title="Image Transformer", delete_cache=(3600, 3600)) as demo:
        gr.Markdown(ABOUT)
        with gr.Tab("Generate"), gr.Row():
            with gr.Column():
                screen = screen_and_buttons("generate", ready["generate"])
            with gr.Column():
                name = gr.Dropdown([SURPRISE, *classes, NO_CLASS], value=SURPRISE, label="Class")
                widgets = controls()
                files = png_files()
        connect(tasks.generate, "generate", name, widgets, *screen, files)

        with gr.Tab("Complete"), gr.Row():
            with gr.Column():
                screen = screen_and_buttons("complete", ready["complete"])
                widgets = controls()
            with gr.Column():
                image, _ = picture_input("Picture", "objects")
                files = png_files()
        connect(tasks.complete, "complete", image, widgets, *screen, files)

        with gr.Tab("Super-resolve"), gr.Row():
            with gr.Column():
                screen = screen_and_buttons("super-resolve", ready["super-resolve"])
                widgets = controls()
            with gr.Column():
                picture, example = picture_input("Portrait", "faces")
                with gr.Accordion("Frame the face: eyes at half the height, chin just inside", open=False):
                    zoom = gr.Slider(1, MAX_ZOOM, value=1, step=0.05, label="Zoom")
                    x = gr.Slider(0, 1, value=0.5, step=0.01, label="Left to right")
                    y = gr.Slider(0, 1, value=0.5, step=0.01, label="Top to bottom")
                image = gr.Image(
                    example, type="filepath", format="png", label="What becomes 8x8", height=140,
                    interactive=False, buttons=[], elem_classes="crisp",
                )
                files = png_files()
        for change in (demo.load, picture.change, zoom.change, x.change, y.change):
            change(
                tasks.frame, [picture, zoom, x, y], image,
                preprocess=False, show_progress="hidden", trigger_mode="always_last", api_visibility="private",
            )
        connect(tasks.super_resolve, "super_resolve", image, widgets, *screen, files)

        with gr.Accordion("How it works", open=False):
            gr.Markdown(HOW)
    return demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help=MODEL_HELP)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a step is many tiny operations: a second thread makes them slower
    generator, upscaler = Loaded(GENERATOR), Loaded(UPSCALER)
    if args.model is not None:
        chosen = Loaded(args.model)
        if not chosen.loaded:
            raise SystemExit(chosen.error)
        if chosen.model.config.source_size:
            upscaler = chosen
        else:
            generator = chosen
    print(f"Generate, Complete: {generator}\nSuper-resolve: {upscaler}", flush=True)
    classes = () if not generator.loaded else generator.model.config.classes
    demo = build(Tasks(generator, upscaler, examples=ASSETS / "examples"), classes)
    demo.queue(max_size=32).launch(css=CSS, ssr_mode=False, show_error=False, max_file_size="8mb")


if __name__ == "__main__":
    main()
