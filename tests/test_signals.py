"""Signals to a training: one ends it with a checkpoint, a second at once; processes and scripts around it hear of them."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from init_fixtures import files, start  # noqa: F401, fixtures

import interruption
import trainings
from run import Run


def test_sigterm_is_heeded_as_ctrl_c_is(start, here, monkeypatch, refusal, tmp_path):
    step = Run.train_step
    monkeypatch.setattr(Run, "train_step", lambda self: os.kill(os.getpid(), signal.SIGTERM) or step(self))
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("not taken over"))
    try:
        assert refusal(start, "--data", "flat", steps=9).startswith("Interrupted at step 1. --resume latest")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "run/checkpoints/step-00000001").is_dir()


def test_a_second_signal_ends_at_once_unless_a_launcher_hands_on_the_first(monkeypatch, capfd):
    now, ended = 100.0, []
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now)
    monkeypatch.setattr(interruption.signal, "raise_signal", lambda number: ended.append((number, signal.getsignal(number))))
    before = signal.getsignal(signal.SIGTERM)
    asked = interruption.Interruption(tells=True)
    try:
        asked.hear(signal.SIGTERM, None)
        now += 2.0  # torchrun, which got it too
        asked.hear(signal.SIGTERM, None)
        assert asked.heard and not ended and signal.getsignal(signal.SIGTERM) is before
        assert capfd.readouterr().err.count("Ends with a checkpoint") == 1
        now += 60.0
        asked.hear(signal.SIGINT, None)  # the first of its kind
        assert not ended
        asked.hear(signal.SIGTERM, None)
        assert ended == [(signal.SIGTERM, signal.SIG_DFL)]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("main", [True, False])
def test_processes_agree_on_the_clock_and_on_signals(main):
    other = torch.tensor([0.0 if main else 7.0, 1.0], dtype=torch.float64)  # seconds of the main one alone; it got a signal
    accelerator = SimpleNamespace(num_processes=2, is_main_process=main, device="cpu", reduce=lambda ours, how: ours + other)
    run = SimpleNamespace(accelerator=accelerator, progress=SimpleNamespace(seconds=7.0 if main else 6.5))
    run.interruption = interruption.Interruption(tells=main)
    assert Run.agree(run) and run.progress.seconds == 7.0
    assert not run.interruption.heard  # by this one


def test_a_training_under_a_script_is_waited_for(monkeypatch, tmp_path):
    class Training:
        returncode = 1

        def __init__(self, command, **_):
            Training.command = command

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def wait(self):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN

    monkeypatch.setattr(trainings.subprocess, "Popen", Training)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="ended early"):
        trainings.train(tmp_path, ["--preset", "tiny"])
    assert "--resume" not in Training.command
    (tmp_path / "checkpoints/step-00000002").mkdir(parents=True)
    with pytest.raises(SystemExit):
        trainings.train(tmp_path, ["--preset", "tiny"])
    assert Training.command[-2:] == ["--resume", "latest"] and signal.getsignal(signal.SIGINT) is before
