"""How long a visitor waits: python tests/benchmarks/waiting.py. Starts the demo and asks it for pictures of each task: once
for one on a machine that has never compiled the step, while it does so, and, when it is compiled, five times for one and
five times for four, as many as the page asks for unless told. This is the API; the page shows pictures at the pace that its
visitor chose.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

from gradio_client import Client, handle_file

from imtx import ImageTransformer, fast
from imtx.demo.models import GENERATOR, UPSCALER
from server import ROOT, Server

RUNS = 5
PAGE = 4  # samples, where its slider stands
EXAMPLES = ROOT / "assets/examples"
TASKS = {  # as on the page: of a class with its guidance, and of an example, which comes with its class
    "generate": {"class_name": "cat"},
    "complete": {"image": handle_file(EXAMPLES / "objects/cat.png"), "class_name": "cat"},
    "super_resolve": {"image": handle_file(EXAMPLES / "faces/collins.jpg")},
}


def wait(client: Client, task: str, given: dict, count: int, seed: int) -> tuple[float, float]:
    """Seconds from the request to the first new pixels, and to the PNG files of `count` pictures."""
    started, first = time.monotonic(), None
    for canvas, _, _ in client.submit(**given, temperature=1.0, count=count, seed=seed, api_name=f"/{task}"):
        if first is None and canvas["hex"]:
            first = time.monotonic() - started
    return first, time.monotonic() - started


def measure(app: Server, runs: int, count: int = 1) -> dict[str, dict[str, float]]:
    client, result = Client(app.url, verbose=False), {}
    for task, given in TASKS.items():
        waits = [wait(client, task, given, count, seed) for seed in range(runs)]
        first, done = (round(statistics.median(column), 2) for column in zip(*waits))
        print(f"{task:>14}: first pixels after {first} s, done after {done} s (median of {runs})")
        result[task] = {"first_pixels_s": first, "done_s": done}
    return result


def main() -> None:
    result = {"machine": platform.processor() or platform.machine()}
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder), NUMBA_CACHE_DIR=f"{folder}/code") as app:
        print("while the step is compiled:")
        result["while_compiling"] = measure(app, 1)
    for name in (GENERATOR, UPSCALER):
        fast.warm(ImageTransformer.from_pretrained(ROOT / "assets/weights" / name))  # what the next start reads
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as app:
        print("just started, the code in the cache:")
        measure(app, 1)  # until the server has read it
        for count in (1, PAGE):
            print(f"compiled, pictures at once: {count}")
            result[f"compiled_{count}"] = measure(app, RUNS, count)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
