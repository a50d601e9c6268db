"""Options of train.py that are refused, that may not change on a resume, and that depend on others."""

import sys

import pytest
from init_fixtures import files, start  # noqa: F401, fixtures

import train


def test_batches_that_cannot_be_shared_are_refused(start, here, refusal):
    assert "--batch-size 3 must be a multiple of 2" in refusal(start, "--data", "flat", "--batch-size", 3, "--accumulate", 2)


@pytest.mark.parametrize("option", ["--every", "--validate-on", "--keep", "--batch-size", "--max-minutes"])
def test_numbers_that_must_be_above_0(option, start, here, capsys):
    with pytest.raises(SystemExit):
        start("--data", "flat", option, 0)
    assert f"{option} must be above 0, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("option, there, now", [
    ("--seed", 0, 1), ("--batch-size", 2, 4), ("--schedule", "constant", "cosine"), ("--optimizer", "muon", "adamw"),
])
def test_what_is_computed_stays_on_a_resume(option, there, now, start, here, refusal):
    start("--data", "flat", steps=1)
    said = refusal(start, "--data", "flat", "--resume", "latest", option, now)
    assert said.startswith(f"--resume: this run has {option} {there}, not {option} {now}. ")


def test_what_is_trained_on_has_a_lower_rate(monkeypatch, tmp_path):
    for begin, expected in ((("--init", "x"), (1e-3, 20)), (("--preset", "tiny"), (2e-3, 100))):
        monkeypatch.setattr(sys, "argv", ["train.py", *begin, "--data", "x", "--output", str(tmp_path), "--max-steps", "1"])
        args = train.arguments()
        assert (args.learning_rate, args.warmup) == expected
