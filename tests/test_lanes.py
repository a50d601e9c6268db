"""One picture by two threads at once (imtx/fast/lanes.py, meeting.py): the same picture, and only while it is quicker."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import FAMILIES, KINDS, LAYOUTS, conditions, small
from imtx import ImageTransformer, draw, sample
from imtx.fast import lanes
from imtx.fast.lanes import CALLS_OF_REST, Lanes, drawing
from imtx.fast.step import advance
from imtx.fast.weights import allocate, cache_size, pack
from imtx.sampling import noise
from server import ROOT


FORKED = """
import os
from dataclasses import replace
from imtx import PRESETS, ImageTransformer, draw, fast
small = replace(PRESETS["tiny"], image_size=8, layers=1, query_block=16, memory_block=16)
model = ImageTransformer(replace(small, ffn=2048)).eval()  # so large that PyTorch would sum up its weights by two threads
before = [draw(model, range(images)).tolist() for images in (1, 3)]
with fast._buffers._lock:  # as another thread may, at that moment
    child = os.fork()
if child == 0:
    os._exit([draw(model, range(images)).tolist() for images in (1, 3)] != before)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_draws_though_its_parent_had_other_threads():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", FORKED], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@torch.inference_mode()
def memory(model: ImageTransformer, images: int, guidance: float = 1.0) -> tuple:
    condition = conditions(model, images)
    context = model.context(images, condition.get("labels"), condition.get("sources"), guidance)
    shape, weights = pack(model)
    pixels = np.zeros((images, model.config.sub_pixels), np.uint8)
    buffer = np.empty(cache_size(model, weights, context.copies * images), np.uint8)
    return shape, weights, *allocate(model, weights, context, noise(model, range(images)), pixels, slice(0, images), buffer)


def together(
    model: ImageTransformer, images: int, calls: list[tuple[int, int, int]], guidance: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, and the last parameters of each lane, of calls (threads, first step, last step)."""
    shape, weights, state, scratch = memory(model, images, guidance)
    with ThreadPoolExecutor(2) as pool:
        for of, start, stop in calls:
            rest = (of, start, stop, 0, 1.0, guidance)
            waiting = [pool.submit(advance, shape, weights, state, scratch[lane], lane, *rest) for lane in range(of)]
            for one in waiting:
                one.result()
    return state.pixels, np.stack([own.params for own in scratch[: calls[-1][0]]])


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_two_lanes_draw_what_one_draws_to_the_last_bit(kind, images):
    family, output, layout, task = kind
    model = small(output, task, **FAMILIES[family], **LAYOUTS[layout]).float()
    steps = model.config.positions
    pixels, params = together(model, images, [(1, 0, steps)])
    two_pixels, two_params = together(model, images, [(2, 0, steps)])
    assert (two_pixels == pixels).all() and (two_params == params).all()
    cuts = [0, 1, steps // 3, steps // 2, steps]  # from one lane to two and back
    changing = [(1 + i % 2, start, stop) for i, (start, stop) in enumerate(zip(cuts, cuts[1:]))]
    assert (together(model, images, changing)[0] == pixels).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[3] == "class"], ids="-".join)
def test_two_lanes_draw_with_guidance_what_one_draws(kind):
    family, output, layout, task = kind
    model = small(output, task, **FAMILIES[family], **LAYOUTS[layout]).float()
    one, two = (together(model, 2, [(lanes, 0, model.config.positions)], guidance=3.0)[0] for lanes in (1, 2))
    assert (one == two).all() and (one[:2] == one[2:]).all()  # both copies of an image are the same


def test_heads_that_cannot_be_halved_stay_in_one_part():
    model = small("dmol", "class", heads=1).float()
    assert len(memory(model, 1)[3]) == 1 and pack(model)[1].qkv.shape[1] == 1
    assert torch.equal(draw(model, [0], engine="compiled"), draw(model, [0], engine="eager"))


class Clock:
    """Time that passes only while a call is at work: so long a pixel, by the number of lanes."""

    def __init__(self, monkeypatch, one: float, two: float):
        self.now, self.takes, self.calls = 0.0, {1: one, 2: two}, []
        monkeypatch.setattr(lanes.time, "perf_counter", lambda: self.now)

    def work(self, lane: int, of: int) -> None:
        if lane == 0:
            self.now += 8 * self.takes[of]
            self.calls.append(of)


def test_two_lanes_work_while_they_are_quicker(monkeypatch):
    clock, crew = Clock(monkeypatch, one=1.0, two=0.6), Lanes(2, abandon=pytest.fail)
    with drawing():
        for _ in range(5):
            crew.run(clock.work, 8)
        assert clock.calls == [1, 2, 2, 2, 2]
        clock.takes[2] = 1.1  # someone else has taken a processor
        for _ in range(CALLS_OF_REST + 2):
            crew.run(clock.work, 8)
        assert clock.calls[5:] == [2] + CALLS_OF_REST * [1] + [2]


def test_one_lane_is_never_two(monkeypatch):
    clock, crew = Clock(monkeypatch, one=1.0, two=0.1), Lanes(1, abandon=pytest.fail)
    with drawing():
        for _ in range(3):
            crew.run(clock.work, 8)
    assert clock.calls == [1, 1, 1]


def test_while_another_picture_is_drawn_one_lane_works(monkeypatch):
    clock, crew = Clock(monkeypatch, one=1.0, two=0.1), Lanes(2, abandon=pytest.fail)
    with drawing():
        crew.run(clock.work, 8)
        other = sample(small("dmol", "class").float(), [0], every=1, engine="compiled")
        next(other)
        crew.run(clock.work, 8)
        other.close()
        crew.run(clock.work, 8)
    assert clock.calls == [1, 1, 2]


def test_ctrl_c_before_a_lane_has_begun_leaves_no_thread_that_waits_for_it(monkeypatch):
    model, waiting = small("dmol", "class").float(), []
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    expected = draw(model, [0], engine="compiled")
    submit = lanes._other_lane.submit

    def interrupted(*call):
        waiting.append(submit(*call))
        raise KeyboardInterrupt

    monkeypatch.setattr(lanes, "_other_lane", SimpleNamespace(submit=interrupted))
    with pytest.raises(KeyboardInterrupt):
        draw(model, [0], engine="compiled")
    waiting[0].result(timeout=60)
    monkeypatch.undo()
    assert torch.equal(draw(model, [0], engine="compiled"), expected)


def test_a_lane_waits_for_one_that_is_late():
    model = small("dmol", "class").float()
    shape, weights, state, scratch = memory(model, 1)

    def work(lane: int, after: float) -> float:
        """Seconds that the first step took."""
        time.sleep(after)
        begin = time.perf_counter()
        advance(shape, weights, state, scratch[lane], lane, 2, 0, 1, 0, 1.0, 1.0)
        return time.perf_counter() - begin

    with ThreadPoolExecutor(2) as pool:
        waited, _ = pool.map(work, [0, 1], [0.0, 0.2])
    assert waited > 0.1 and (state.arrived[:, 0] == state.arrived[0, 0]).all()
