"""One training among several that a script runs one after another, each with train.py in a process of its own."""

import signal
import subprocess
import sys
from pathlib import Path

from publishing.records import RECORD, Training


def train(folder: Path, options: list[str]) -> Training:
    """The record of the training in `folder`, which is begun, or gone on with, unless it has ended before."""
    record = folder / RECORD
    if record.exists():  # it had ended when the script was killed
        return Training.load(record)
    command = [sys.executable, str(Path(__file__).with_name("train.py")), "--output", str(folder), *options]
    if any((folder / "checkpoints").glob("[!.]*")):
        command += ["--resume", "latest"]
    # Ctrl-C reaches the training too, which ends with a checkpoint: here it is waited for.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        ) as training:
            training.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if training.returncode:
        raise SystemExit(f"The training in {folder} has ended early; what it said stands above.")
    return Training.load(record)
