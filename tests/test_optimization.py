"""The rate's schedules, who optimizes what, which images a step sees, and launches that only pretend to be parallel."""

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from conftest import pictures, small
from test_train import ROOT

sys.path.insert(0, str(ROOT / "train"))

import optimization
import processes as launches
import report
from imtx.costs import forward_flops


def factors(schedule: str, steps: int = 1000, warmup: int = 100) -> list[float]:
    return [optimization.rate_factor(schedule, step, warmup, step / steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "paper"])
def test_the_rate_warms_up_linearly_and_never_exceeds_its_peak(schedule):
    found = factors(schedule)
    assert found[0] == pytest.approx(0.01, rel=0.01) and found[49] == pytest.approx(0.5, rel=0.02)
    assert 0 <= min(found) and 0.9 < max(found) <= 1


def test_the_rate_after_warm_up():
    constant, cosine, paper = (factors(schedule) for schedule in ("constant", "cosine", "paper"))
    assert constant[100:850] == [1.0] * 750 and constant[925] == pytest.approx(0.5) and constant[-1] < 0.01
    assert cosine[500] == pytest.approx(0.5) and cosine[250] == pytest.approx((1 + math.sqrt(0.5)) / 2) and cosine[-1] < 0.01
    assert paper[399] == pytest.approx(0.5) and paper[899] == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", ["muon", "adamw", "paper"])
@pytest.mark.parametrize("family", [{}, {"family": "paper", "position_encoding": "learned"}])
def test_every_weight_has_one_optimizer(kind, family):
    model = small("categorical", "sr", **family)
    found = optimization.optimizers(model, kind, 1e-3, 0.1)
    groups = [group for optimizer in found for group in optimizer.param_groups]
    weights = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(weights) == sorted(id(parameter) for parameter in model.parameters())
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    matrices = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and name.split(".")[0] in ("decoder", "encoder")}
    assert decayed == (set() if kind == "paper" else matrices)
    muon = {id(p) for o in found if isinstance(o, torch.optim.Muon) for group in o.param_groups for p in group["params"]}
    assert muon == (matrices if kind == "muon" else set())


def test_muons_updates_are_of_adamws_size():
    model = small("dmol", "class", width=128).float().requires_grad_(True)
    muon, _ = optimization.optimizers(model, "muon", 1e-3, 0.0)
    before = model.decoder[0].ffn.up.weight.clone()
    model.log_prob(pictures(2)).sum().backward()
    muon.step()
    moved = (model.decoder[0].ffn.up.weight - before).square().mean().sqrt().item()
    assert moved == pytest.approx(0.2e-3, rel=0.35)  # a root mean square of 0.2, as AdamW's; 0.07 with Muon's own


def test_every_epoch_has_every_image_once_in_another_order():
    seen = torch.cat([optimization.batch_indices(step, 4, 10, seed=3) for step in range(10)]).view(4, 10)
    assert torch.equal(seen.sort(dim=1).values, torch.arange(10).expand(4, 10))
    assert len({tuple(epoch) for epoch in seen.tolist()}) == 4
    assert torch.equal(optimization.batch_indices(7, 4, 10, seed=3), seen.flatten()[28:32])  # of its arguments alone
    others = torch.cat([optimization.batch_indices(step, 4, 10, seed=4) for step in range(10)]).view(4, 10)
    assert not {tuple(epoch) for epoch in seen.tolist()} & {tuple(epoch) for epoch in others.tolist()}


def check(processes: int, batch_size: int = 8, accumulate: int = 1) -> None:
    accelerator = SimpleNamespace(num_processes=processes)
    launches.check_launch(accelerator)
    launches.check_batch(accelerator, batch_size, accumulate)


LAUNCHES = {  # what the launchers leave in the environment
    "torchrun without ACCELERATE_USE_CPU": {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
    "accelerate launch --cpu --num_processes 2": {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"},
}


@pytest.mark.parametrize("environment", LAUNCHES.values(), ids=LAUNCHES)
def test_a_launch_of_several_processes_that_are_one_each_is_refused(monkeypatch, environment):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    check(1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="ACCELERATE_USE_CPU=true torchrun"):
        check(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(2)


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused():
    check(2, batch_size=8, accumulate=4)
    with pytest.raises(SystemExit, match="--batch-size 6.*multiple of 4.*2 processes.*--accumulate 2"):
        check(2, batch_size=6, accumulate=2)


def test_a_tracker_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report.require_tracker(None)
    with pytest.raises(SystemExit, match="pip install tensorboard"):
        report.require_tracker("tensorboard")


def test_time_left_is_told_at_the_recent_pace(tmp_path):
    """A run that was stopped may go on at another pace than it had."""
    bar = report.Report(tmp_path, Accelerator(cpu=True), small("dmol", "class"), "no", 4)
    bar.begin(100, 8000.0, 0.5, 200)
    bar.step(torch.tensor(3.0))
    bar.losses_to(110, 8010.0, 0.625)
    assert bar.bar.postfix.endswith("0:00:30 left")
    bar.step(torch.tensor(3.0))
    bar.losses_to(200, 8020.0, 1.0)
    assert bar.bar.postfix.endswith("0:00:00 left")


def test_speed_and_mfu_are_logged_and_told_to_trackers(tmp_path, monkeypatch):
    model, told = small("dmol", "class"), []
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "log", lambda values, step: told.append((step, values)))
    bar = report.Report(tmp_path, accelerator, model, "no", 4)
    assert bar.flops == 3 * forward_flops(model)
    bar.peak = 8 * bar.flops
    bar.begin(100, 8000.0, 0.5, 200)
    bar.step(torch.tensor(3.0))
    bar.losses_to(110, 8010.0, 0.625)
    entry = json.loads((tmp_path / "log.jsonl").read_text())
    assert (entry["images_per_second"], entry["mfu"]) == (4.0, 0.5)
    assert told == [(110, {"bits_per_dim": 3.0, "images_per_second": 4.0, "mfu": 0.5})]
