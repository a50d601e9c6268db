"""Resuming: a run goes on bit for bit from where it was interrupted or killed; if it goes another way, nothing is lost.

As in test_train.py, `tiny` is a model of 8x8 pictures here.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from test_train import ROOT, altered, assert_equal, data, last_line, run, train, trained, weights  # noqa: F401, two are fixtures

from checkpoints import PROGRESS, Checkpoints, step_of
from imtx import ImageTransformer


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(data, trained, tmp_path):
    interrupted = tmp_path / "run"
    shutil.copytree(trained / "checkpoints/step-00000004", interrupted / "checkpoints/step-00000004")
    assert train(data, interrupted, "--max-steps", 8, "--resume", "latest")["steps"] == 8
    last = "checkpoints/step-00000008"
    assert_equal(weights(interrupted / last), weights(trained / last))


@pytest.mark.parametrize(
    "name, steps, sentence",
    [
        ("lates", 12, "lates; there are step-00000004, before-decay, step-00000008."),
        ("latest", 8, "the budget is spent, 8 steps and 0.0 minutes. To prolong the run, raise --max-steps or"),
    ],
)
def test_a_resume_that_is_refused_leaves_the_finished_run_as_it_was(name, steps, sentence, data, trained, tmp_path):
    finished = tmp_path / "run"
    shutil.copytree(trained, finished)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    done = run(data.with_name("small.py"), "--preset", "tiny", "--data", data, "--output", finished, "--max-steps", steps,
               "--batch-size", 4, "--resume", name)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_run_killed_in_its_last_validation_is_resumed_to_its_end(data, trained, tmp_path):
    killed = tmp_path / "run"
    shutil.copytree(trained, killed, ignore=shutil.ignore_patterns("training.json"))
    assert train(data, killed, "--max-steps", 8, "--resume", "latest")["steps"] == 8
    assert (killed / "training.json").exists() and (killed / "model/training.json").exists()


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(data, trained, tmp_path):
    killed = altered(tmp_path / "killed.py", """
save = imtx.ImageTransformer.save_pretrained
def save_pretrained(model, folder):
    save(model, folder)
    if "step-00000008" in str(folder):
        os.kill(os.getpid(), 9)
imtx.ImageTransformer.save_pretrained = save_pretrained
""")
    output = tmp_path / "run"
    options = ("--preset", "tiny", "--data", data, "--output", output, "--max-steps", 8,
               "--validation", 4, "--batch-size", 4, "--warmup", 2, "--every", 4)
    assert run(killed, *options).returncode == -signal.SIGKILL
    left = {path.name for path in (output / "checkpoints").iterdir()}
    assert left == {"step-00000004", "before-decay", ".step-00000008.part"}
    (output / "checkpoints/.step-00000008.part/stale").touch()  # what is left is not written into again
    assert last_line(run(data.with_name("small.py"), *options, "--resume", "latest"))["steps"] == 8
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"step-00000004", "before-decay", "step-00000008"}
    last = "checkpoints/step-00000008"
    assert not (output / last / "stale").exists()
    assert_equal(weights(output / last), weights(trained / last))


@pytest.fixture
def folders(tmp_path) -> Checkpoints:
    """Checkpoints of which only the folders are looked at, and the step in them."""
    def save_state(folder):
        Path(folder).mkdir(parents=True)
        step = int(Path(folder).stem.removeprefix(".step-")) if "step-" in folder else 4
        torch.save({"step": step}, Path(folder) / PROGRESS)

    accelerator = SimpleNamespace(
        register_save_state_pre_hook=lambda hook: None, register_load_state_pre_hook=lambda hook: None,
        wait_for_everyone=lambda: None, is_main_process=True, save_state=save_state,
    )
    return Checkpoints(tmp_path / "run/checkpoints", accelerator, raw=None, ema=None, kept=3)


@pytest.mark.parametrize(
    "left, after",
    [
        ({".step-00000004.part", "step-00000002"}, {"step-00000002": "step-00000002"}),
        ({".step-00000004.gone", ".before-decay.part"}, {}),
        ({".before-decay.part", ".before-decay.old"}, {"before-decay": ".before-decay.old"}),  # between the two renames
        ({"before-decay", ".before-decay.old"}, {"before-decay": "before-decay"}),  # after them
    ],
)
def test_what_a_killed_run_left_is_cleared_up_and_nothing_whole_is_lost(left, after, folders):
    for name in left:
        (folders.folder / name).mkdir(parents=True)
        (folders.folder / name / "was").write_text(name)
    assert folders.in_use() == bool(after)
    folders.tidy()
    assert {path.name: (path / "was").read_text() for path in folders.folder.iterdir()} == after
    assert folders.in_use() == bool(after)


def test_checkpoints_are_replaced_kept_and_removed_whole(folders, monkeypatch):
    for step in range(1, 6):
        folders.save(f"step-{step:08d}")
    assert [path.name for path in folders.steps()] == ["step-00000003", "step-00000004", "step-00000005"]
    (folders.find("latest") / "old").touch()
    folders.save("step-00000005")
    assert {path.name for path in folders.folder.iterdir()} == {path.name for path in folders.steps()}
    assert not (folders.find("step-00000005") / "old").exists()

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)  # a folder that is removed has lost its name before its files
    with pytest.raises(KeyboardInterrupt):
        folders.save("step-00000006")
    assert [path.name for path in folders.steps()] == ["step-00000004", "step-00000005", "step-00000006"]


@pytest.mark.parametrize("renames", [0, 1, 2, 3, 9])  # before the run is killed
def test_the_future_of_a_run_that_goes_another_way_is_kept_whole(renames, folders, monkeypatch):
    for name in ("step-00000003", "step-00000005", "before-decay", "step-00000006"):  # before-decay: step 4
        folders.save(name)
    output, replace = folders.folder.parent, os.replace
    (output / "run.json").write_text("began")
    calls = []

    def killed(*names):
        calls.append(names)
        if len(calls) > renames:
            raise KeyboardInterrupt
        replace(*names)

    monkeypatch.setattr(os, "replace", killed)
    try:
        folders.set_aside_after(3, ("run.json", "training.json"), ended=False)
    except KeyboardInterrupt:
        assert folders.find("latest").name == "step-00000006"  # as if nothing had been asked for
    else:
        assert folders.find("latest").name == "step-00000003"
    monkeypatch.undo()
    folders.tidy()
    assert {path.name for path in output.iterdir()} == {"checkpoints", "run.json", *["former-1"][:renames]}
    assert sorted(path.parent.name for path in output.rglob(PROGRESS)) == [
        "before-decay", "step-00000003", "step-00000005", "step-00000006"
    ]
    folders.set_aside_after(3, ("run.json",), ended=False)
    assert folders.find("latest").name == "step-00000003" and len(list(output.rglob(PROGRESS))) == 4
    assert all((former / "run.json").read_text() == "began" for former in output.glob("former-*"))


def test_the_latest_checkpoint_is_that_of_the_last_step_by_any_name(folders):
    for name in ("step-00000003", "before-decay", "step-00000005"):  # before-decay: step 4
        folders.save(name)
    folders.set_aside_after(4, (), ended=False)
    assert folders.find("latest").name == "before-decay"


def test_a_run_is_prolonged_from_before_its_decay_and_its_old_end_is_a_run_of_its_own(data, trained, tmp_path):
    longer, former, last = tmp_path / "run", tmp_path / "run/former-1", "checkpoints/step-00000008"
    shutil.copytree(trained, longer)  # before-decay is of step 7, the last one of step 8
    assert train(data, longer, "--max-steps", 9, "--resume", "before-decay", "--every", 100)["steps"] == 9
    assert {p.name for p in longer.glob("checkpoints/step-*")} == {"step-00000004", "step-00000009"}
    assert (longer / "checkpoints/before-decay").is_dir()  # and it can be prolonged once more
    assert_equal(weights(former / last), weights(trained / last))
    assert_kept(former, trained)
    assert validated(longer) == [4, 9] and validated(former) == [4, 8]
    assert {sheet.name for sheet in longer.glob("samples/*")} == {"00000004.png", "00000009.png"}

    assert train(data, former, "--max-steps", 20, "--resume", "latest", "--every", 100)["steps"] == 20
    assert step_of(former / "checkpoints/before-decay") == 17  # with a larger budget the rate falls once more


def test_the_end_of_a_run_that_goes_on_from_it_is_kept(data, trained, tmp_path):
    longer = tmp_path / "run"
    shutil.copytree(trained, longer)
    assert train(data, longer, "--max-steps", 9, "--resume", "latest", "--every", 100)["steps"] == 9
    assert_kept(longer / "former-1", trained)
    last = "checkpoints/step-00000008"
    assert_equal(weights(longer / "former-1" / last), weights(trained / last))
    assert (longer / last).is_dir()  # it is where the run went on from


def assert_kept(former: Path, trained: Path) -> None:
    """All that a finished run has, with its log and its sheets."""
    names = {"checkpoints", "log.jsonl", "model", "run.json", "samples", "training.json"}
    assert {p.name for p in former.iterdir()} == names
    for name in ("model/training.json", "model/model.safetensors", "log.jsonl", "samples/00000008.png"):
        assert (former / name).read_bytes() == (trained / name).read_bytes()


def validated(output: Path) -> list[int]:
    """Steps at which, by its log, a run was validated."""
    lines = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "validation_bits_per_dim" in line]


def test_a_resumed_run_goes_on_at_its_rate_unless_told_and_tells_all_its_commands(data, tmp_path):
    def commands() -> list[str]:
        return json.loads((output / "training.json").read_text())["command"].split(" && ")

    output, script = tmp_path / "run", data.with_name("small.py")
    options = ("--preset", "tiny", "--data", data, "--output", output, "--batch-size", 4, "--every", 100)
    assert run(script, *options, "--max-steps", 4, "--learning-rate", "1e-4", "--clip", "0.5").returncode == 0
    assert len(commands()) == 1
    ended = run(script, *options, "--max-steps", 6, "--resume", "latest")
    assert ended.returncode == 0 and "This run goes on with" not in ended.stderr
    noted = json.loads((output / "run.json").read_text())
    assert (noted["learning_rate"], noted["clip"]) == (1e-4, 0.5)
    ended = run(script, *options, "--max-steps", 8, "--resume", "latest", "--learning-rate", "2e-4")
    assert "This run goes on with --learning-rate 0.0002; it had 0.0001." in ended.stderr
    assert [command.count("--resume latest") for command in commands()] == [0, 1, 1]
    assert "1e-4" in commands()[0] and "2e-4" in commands()[2]
    ended = run(script, *options, "--max-steps", 8, "--resume", "before-decay", "--learning-rate", "2e-4")
    assert len(commands()) == 3  # the last one once more, from elsewhere


def test_a_continuation_that_diverged_is_no_part_of_the_record(data, trained, tmp_path):
    output, script = tmp_path / "run", data.with_name("small.py")
    shutil.copytree(trained, output)
    options = ("--preset", "tiny", "--data", data, "--output", output, "--batch-size", 4, "--resume", "latest")
    assert run(script, *options, "--max-steps", 12, "--learning-rate", 1e30).returncode == 1
    before = json.loads((trained / "run.json").read_text())
    assert json.loads((output / "run.json").read_text()) == before
    done = run(script, *options, "--max-steps", 10)
    assert last_line(done)["steps"] == 10 and "This run goes on with" not in done.stderr
    command = json.loads((output / "training.json").read_text())["command"]
    assert command.count("train.py") == 2 and "1e+30" not in command


def test_a_run_begun_anew_after_one_that_left_no_checkpoint_has_a_log_of_its_own(data, tmp_path):
    spoilt = ("--preset", "tiny", "--data", data, "--output", tmp_path, "--batch-size", 4, "--max-steps", 40)
    assert run(data.with_name("small.py"), *spoilt, "--every", 2, "--learning-rate", 1e30).returncode == 1
    (tmp_path / "samples/00000099.png").write_bytes(b"")
    (tmp_path / "log.jsonl").write_text('{"step": 99}\n')
    train(data, tmp_path, "--max-steps", 2)
    assert {json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()} == {2}
    assert {sheet.name for sheet in tmp_path.glob("samples/*")} == {"00000002.png"}


@pytest.mark.parametrize("file, content, wrong", [
    ("optimizer.bin", b"cut", "optimizer.bin has 3 bytes in place of"),
    (PROGRESS, b"", f"{PROGRESS} has 0 bytes in place of"),
    ("ema/model.safetensors", None, "ema/model.safetensors is missing"),
    ("files.json", b"", "files.json cannot be read"),
    ("optimizer.bin", bytes, "optimizer.bin does not hold what was written to it"),  # nothing but zeros, as many as there were
    ("ema/model.safetensors", bytes, "ema/model.safetensors does not hold what was written to it"),
])
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(file, content, wrong, data, trained, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    damaged = output / "checkpoints/step-00000008"
    size = (damaged / file).stat().st_size
    (damaged / file).unlink()
    if content is not None:
        (damaged / file).write_bytes(bytes(size) if content is bytes else content)
    options = ("--preset", "tiny", "--data", data, "--output", output, "--max-steps", 10, "--batch-size", 4)
    refused = run(data.with_name("small.py"), *options, "--resume", "latest")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert f"{damaged} is damaged: {wrong}" in refused.stderr
    assert "Remove that folder. Whole is: step-00000004, before-decay." in refused.stderr
    # What was damaged goes where the rest of that future does, and is not counted as one of those to keep.
    assert train(data, output, "--max-steps", 7, "--keep", 1, "--resume", "step-00000004")["steps"] == 7
    assert {folder.name for folder in output.glob("checkpoints/*")} == {"step-00000007", "before-decay"}
    assert (output / "former-1/checkpoints/step-00000008").exists()
    assert train(data, output, *options[6:8], "--resume", "latest")["steps"] == 10


def test_one_folder_is_trained_in_by_one_process_at_a_time(data, trained, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    with FileLock(output / ".lock"):
        before = sorted(output.rglob("*"))
        refused = run(data.with_name("small.py"), "--preset", "tiny", "--data", data, "--output", output, "--max-steps", 9,
                      "--batch-size", 4, "--resume", "latest")
        assert refused.returncode == 1 and "another process trains there" in refused.stderr
        assert "Traceback" not in refused.stderr and sorted(output.rglob("*")) == before
    assert train(data, output, "--max-steps", 9, "--resume", "latest")["steps"] == 9


def test_ctrl_c_in_the_last_validation_is_told_in_a_sentence(data, tmp_path):
    slow = altered(tmp_path / "slow.py", """
import run
def bits_per_dim(model, images):
    if len(images) == 12:
        os.kill(os.getpid(), 2)
    return 1.0
run.bits_per_dim = bits_per_dim
""")
    done = run(slow, "--preset", "tiny", "--data", data, "--output", tmp_path / "run", "--max-steps", 2, "--batch-size", 4,
               "--validation", 12)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Interrupted. --resume latest goes on from the last checkpoint in")


def test_a_run_killed_while_its_model_is_replaced_has_it_back_when_it_goes_on(data, tmp_path):
    killed = altered(tmp_path / "killed.py", """
from pathlib import Path
rename = Path.rename
def rename_or_die(path, target):
    if str(target).endswith("run/model") and Path(path).with_name("old").exists():
        os.kill(os.getpid(), 9)
    return rename(path, target)
Path.rename = rename_or_die
""")
    output = tmp_path / "run"
    options = ("--preset", "tiny", "--data", data, "--output", output, "--max-steps", 9, "--batch-size", 4, "--every", 2)
    assert run(killed, *options).returncode == -signal.SIGKILL
    assert len(list(output.glob(".model-*"))) == 1 and not (output / "model").exists()
    assert "there is no checkpoint" in run(data.with_name("small.py"), *options, "--resume", "none").stderr
    assert not list(output.glob(".model-*"))
    ema = ImageTransformer.from_pretrained(output / "checkpoints/step-00000004/ema").state_dict()
    assert_equal(ImageTransformer.from_pretrained(output / "model").state_dict(), ema)


def test_ctrl_c_ends_with_a_checkpoint_and_the_run_goes_on(data, tmp_path):
    options = ["--preset", "tiny", "--data", data, "--output", tmp_path, "--validation", 4, "--batch-size", 4]
    command = [sys.executable, data.with_name("small.py"), *map(str, options), "--max-steps"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([*command, "100000"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while "1/100000" not in running.stderr.read(1) + running.stderr.readline():  # the bar's first step
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, rest = running.communicate(timeout=100)
    assert running.returncode != 0 and "Interrupted at step" in rest and "Traceback" not in rest
    assert rest.index("Ends with a checkpoint, after the step") < rest.index("Interrupted at step")
    (checkpoint,) = tmp_path.glob("checkpoints/step-*")
    steps = int(checkpoint.name.removeprefix("step-"))
    done = run(data.with_name("small.py"), *options, "--max-steps", steps + 2, "--resume", "latest")
    assert last_line(done)["steps"] == steps + 2
