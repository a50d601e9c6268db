"""How much memory the demo takes: python tests/benchmarks/memory.py. Starts it and sends 100 mixed requests, one after another.

Tasks, models, classes, pictures, temperatures, counts (1 to 8) and seeds change from request to request. RSS is the app's
resident size in Linux's /proc, every 10 requests; the peak is its highest, start included. Flat: from the 50th request to the
last it has grown by less than 2 %, as all models are loaded and compiled and the largest batch was drawn by then; what
the first half adds, models and arrays, is not counted. The last line is one JSON object.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gradio_client import Client, handle_file

from server import ROOT, Server

REQUESTS, EVERY, FLAT = 100, 10, 1.02
CLASSES = ("surprise me", "no class", "cat", "ship")
PICTURES = {folder: sorted((ROOT / "assets/examples" / folder).iterdir()) for folder in ("objects", "faces")}
GENERATORS = ("cifar10-dmol-1d", "cifar10-cat-1d")
UPSCALERS = {"faces-sr-1d": "faces", "faces-sr-2d": "faces", "cifar10-sr-1d": "objects"}  # and what they are given


def request(number: int) -> tuple[str, list]:
    """An endpoint and what it is asked: the same at every start."""
    chance = random.Random(number)
    task = ("generate", "complete", "super_resolve")[number % 3]
    models = list(UPSCALERS) if task == "super_resolve" else GENERATORS
    model = models[number // 3 % len(models)]
    pictures = PICTURES[UPSCALERS.get(model, "objects")]
    given = chance.choice(CLASSES) if task == "generate" else handle_file(chance.choice(pictures))
    count = 8 if number < 9 else chance.randint(1, 8)  # the largest batch of every task and model first
    arguments = [given, chance.uniform(0.5, 1.5), count, chance.choice((None, chance.randrange(2**32))), model]
    return task, arguments + ["cat" if number < 9 else chance.choice(CLASSES)] * (task == "complete")


def main() -> None:
    resident = {}
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as app:
        client = Client(app.url, verbose=False)
        resident[0] = app.memory("VmRSS")
        for number in range(REQUESTS):
            task, arguments = request(number)
            client.predict(*arguments, api_name=f"/{task}")
            if (number + 1) % EVERY == 0:
                resident[number + 1] = app.memory("VmRSS")
                print(f"after {number + 1:>3} requests: {resident[number + 1] / 1e6:.0f} MB", flush=True)
        peak = app.memory("VmHWM")
    growth = resident[REQUESTS] / resident[REQUESTS // 2]
    flat = growth < FLAT
    print(f"peak {peak / 1e6:.0f} MB; {'flat' if flat else 'NOT flat'}: {growth - 1:+.1%} in the second half")
    print(json.dumps({"resident_bytes": resident, "peak_bytes": peak, "second_half_growth": growth - 1, "flat": flat}))


if __name__ == "__main__":
    main()
