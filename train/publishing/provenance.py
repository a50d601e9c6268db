"""Where a run comes from: the commit of the checkout and the hardware, in words for its training.json."""

import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str | None:
    """The checkout's commit, as in "694299f", or "694299f-dirty" if tracked files differ from it.

    None without git, and for a copy that is no checkout: a repository around it has commits of something else.
    """
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def hardware(device: torch.device, processes: int = 1) -> str:
    """As in "8 x NVIDIA H200" or "1 thread on AMD EPYC, 2 cores". Every process has a device like this one."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return f"{processes} x {device.type} on {platform.machine()}"
    threads = torch.get_num_threads()
    each = f"{threads} thread{'s' if threads > 1 else ''}"
    of = f"{processes} processes of {each}" if processes > 1 else each
    return f"{of} on {processor()}, {os.cpu_count()} cores"


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()  # Linux: platform.processor() is empty there
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
