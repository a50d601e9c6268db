"""How long a visitor waits: python tests/benchmarks/waiting.py. Starts the demo and asks it for one picture, five times."""

import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gradio_client import Client, handle_file

from server import ROOT, Server

RUNS = 5
EXAMPLES = ROOT / "assets/examples"
TASKS = {
    "generate": "cat",
    "complete": handle_file(EXAMPLES / "objects/cat.png"),
    "super_resolve": handle_file(EXAMPLES / "faces/collins.jpg"),
}


def wait(client: Client, task: str, given, seed: int) -> tuple[float, float]:
    """Seconds from the request to the first new pixels, and to the PNG file of one picture."""
    started, first = time.monotonic(), None
    for canvas, _, _ in client.submit(given, 1.0, 1, seed, api_name=f"/{task}"):
        if first is None and canvas["hex"]:
            first = time.monotonic() - started
    return first, time.monotonic() - started


def main() -> None:
    result = {"machine": platform.processor() or platform.machine()}
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as app:
        client = Client(app.url, verbose=False)
        for task, given in TASKS.items():
            waits = [wait(client, task, given, seed) for seed in range(RUNS)]
            first, done = (round(statistics.median(column), 2) for column in zip(*waits))
            print(f"{task:>14}: first pixels after {first} s, done after {done} s (median of {RUNS})")
            result[task] = {"first_pixels_s": first, "done_s": done}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
