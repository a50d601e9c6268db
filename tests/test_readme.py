"""README keeps its word: its Python runs as it stands, and its commands are those that exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import forks

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_three_lines_of_python_load_a_bundled_model_and_sample():
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "from_pretrained" in block)
    assert len(code.strip().splitlines()) == 3
    check = "\nassert pictures.shape == (4, 32, 32, 3) and str(pictures.dtype) == 'torch.uint8'"
    done = subprocess.run([sys.executable, "-c", code + check], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_the_set_up_commands_are_there_as_promised():
    lines = README.splitlines()
    assert "pip install -r requirements.txt && python app.py" in lines
    assert "pip install -r requirements-dev.txt && pytest -n 2 --dist loadfile" in lines


def test_the_commands_take_the_options_that_readme_names():
    commands = [shlex.split(line)[1:] for line in README.splitlines() if line.startswith("python train/")]

    known = {}
    for script in {script for script, *_ in commands}:
        helped = forks.run(ROOT / script, ["--help"], dict(os.environ))
        assert helped.returncode == 0, helped.stderr
        known[script] = set(re.findall(r"--[a-z-]+", helped.stdout))
    for script in ("train/ablation.py", "train/compare.py"):  # which hand on what they do not know
        known[script] |= known["train/train.py"]
    for script, *words in commands:
        assert {word for word in words if word.startswith("--")} <= known[script], (script, words)


def test_the_files_and_pictures_that_readme_points_to_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_front_matter_is_what_a_space_accepts():
    front = dict(line.split(": ", 1) for line in README.split("---")[1].strip().splitlines())
    assert front["sdk_version"] == "6.31.0" and f"gradio=={front['sdk_version']}" in (ROOT / "requirements.txt").read_text()
    assert len(front["short_description"]) <= 60 and (ROOT / front["app_file"]).is_file()
