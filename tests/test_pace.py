"""How soon pictures come: the page's pace, visitors at the same time, and those who come before the step is compiled."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError  # in Python 3.10 not the built-in one

import numpy as np
import pytest
from gradio_client import Client, handle_file
from playwright.sync_api import expect

import app as demo
from app_client import FACE, run
from imtx import fast
from imtx.demo import tasks
from imtx.demo.models import Installed
from server import ROOT, pictures_in
from visitor import PIXELS, TABS

pytest_plugins = "app_fixtures", "browser_fixtures"

OPAQUE = """(canvas) => Array.from(document.querySelectorAll(`${canvas} canvas.sample`), (sample) => {
    const {data} = sample.getContext('2d').getImageData(0, 0, sample.width, sample.height);
    return data.filter((value, i) => i % 4 === 3 && value === 255).length;
})"""


# ---- the pace of the page -----------------------------------------------------------------------------------


def drawn_but_not_shown(visitor, count: int = 2) -> None:
    """Run, until the server has sent all: files to download are there, but nothing is shown of what it drew."""
    files = visitor.picture("PNG files")
    if not files.count():
        visitor.page.get_by_text("Download the samples").filter(visible=True).click()
    visitor.set("Samples", count)
    visitor.run()
    visitor.page.wait_for_function("() => held")
    expect(files.get_by_test_id("download-link")).to_have_count(count)


@pytest.mark.parametrize("tab", TABS)
def test_the_page_unveils_what_the_server_drew(visit, tab):
    visitor = visit(still=True)
    visitor.open(tab)
    assert visitor.n == PIXELS  # the gallery's pictures are not unveiled
    drawn_but_not_shown(visitor)
    given = PIXELS // 2 if tab == "Complete" else 0
    new = PIXELS - given
    assert visitor.pass_time(0) == visitor.n == given
    shown = visitor.pass_time(0.5)
    assert shown == given + new // 4  # about two seconds a picture
    assert visitor.text().inner_text() == f"Pixel {shown} of {PIXELS}"
    assert visitor.page.evaluate(OPAQUE, visitor.canvas) == [shown + 1] * 2  # both samples; with the mark of the next
    assert not visitor.page.locator(f"{visitor.canvas} .imtx-replay").is_visible()
    visitor.set_pace("slow")
    assert visitor.pass_time(1) == int(shown + new / 10)
    visitor.set_pace("as it comes")
    assert visitor.pass_time(0.001) == PIXELS
    expect(visitor.text()).to_contain_text(f"{PIXELS} of {PIXELS} pixels in")  # how long the server took
    assert visitor.page.locator(f"{visitor.canvas} .imtx-replay").is_visible()
    assert visitor.page.evaluate("held") is None


def test_stop_and_run_while_the_page_unveils(visit):
    visitor = visit(still=True)
    drawn_but_not_shown(visitor)
    visitor.pass_time(0)
    shown = visitor.pass_time(1)
    visitor.press("Stop")
    expect(visitor.text()).to_have_text("Stopped.")
    assert visitor.page.evaluate("held") is None and visitor.n == shown == PIXELS // 2
    drawn_but_not_shown(visitor, count=1)
    visitor.pass_time(0)
    assert visitor.pass_time(0.5) == PIXELS // 4
    drawn_but_not_shown(visitor, count=3)  # Run, before the one before is shown to its end
    assert visitor.n == 0
    visitor.pass_time(0)
    assert visitor.pass_time(3) == PIXELS
    expect(visitor.text()).to_contain_text(f"{PIXELS} of {PIXELS} pixels in")
    visitor.press("Replay")
    visitor.pass_time(0)
    assert visitor.pass_time(1) == PIXELS // 2
    visitor.press("Stop")  # the replay; the run is over
    visitor.page.wait_for_function("() => !held")
    expect(visitor.text()).to_contain_text(f"{PIXELS} of {PIXELS} pixels in")


def test_a_page_that_nobody_sees_does_not_wait_for_frames(visit):
    visitor = visit(still=True)
    drawn_but_not_shown(visitor)
    visitor.pass_time(0)
    assert visitor.pass_time(1) == PIXELS // 2
    visitor.page.evaluate("""() => {
        Object.defineProperty(document, 'hidden', {get: () => true});
        document.dispatchEvent(new Event('visibilitychange'));
    }""")
    assert visitor.n == PIXELS  # in the middle of a run
    visitor.run()  # and from the start of one
    assert visitor.wait_until_drawn()
    assert visitor.page.evaluate("held") is None


def test_who_wants_no_motion_sees_pixels_as_they_come(visit):
    visitor = visit(still=True, reduced_motion="reduce")
    visitor.set("Samples", 1)
    visitor.run()
    assert visitor.wait_until_drawn()
    assert visitor.page.evaluate("held") is None


# ---- several visitors ---------------------------------------------------------------------------------------


class Here:
    """The demo in this process, with two small models and room for two visitors, where a test can hold the compiler and
    whoever draws."""

    def __init__(self, patch, models: dict):
        self.engines, self.complete = [], []  # of each run, when it begins; whether it was, when it ends
        self.half_way = lambda: None  # every run comes by
        self.endless = False  # runs do not come any further
        self.may_compile = threading.Event()
        warm, sample = fast.warm, tasks.sample

        def warm_later(model) -> None:
            self.may_compile.wait()
            warm(model)

        def watched(model, seeds, **options):
            self.engines.append(options["engine"])
            snapshots, endless = sample(model, seeds, **options), self.endless
            done = total = None
            try:
                for step, snapshot in enumerate(snapshots):
                    if step == tasks.LOOKS // 2:
                        self.half_way()
                    yield snapshot
                    while endless and step == tasks.LOOKS // 2:
                        time.sleep(0.05)
                        yield snapshot
                    done, total = snapshot.done, snapshot.total
            finally:
                self.complete.append(done == total)

        patch.setattr(fast, "_compiled", set())  # as in a new process
        patch.setattr(fast, "warm", warm_later)
        patch.setattr(tasks, "sample", watched)
        patch.setattr(demo, "AT_ONCE", 2)
        self.generator, upscaler = (Installed(name, models[name]) for name in ("blocks-dmol", "sr-rows-dmol"))
        both = ({model.name: model} for model in (self.generator, upscaler))
        page = demo.build(tasks.Tasks(*both, examples=ROOT / "assets" / "examples"))
        _, self.url, _ = page.queue().launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", ssr_mode=False)
        self.url = self.url.rstrip("/")
        self.close = page.close

    def compile(self) -> None:
        self.may_compile.set()
        while self.generator.engine is not None:
            time.sleep(0.1)

    def pictures(self, *request) -> np.ndarray:
        """What a client gets."""
        return pictures_in(run(Client(self.url, verbose=False), *request)[-1][0])


@pytest.fixture
def here(monkeypatch, small_models, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    here = Here(monkeypatch, small_models)
    yield here
    here.may_compile.set()
    here.close()


def test_two_visitors_at_once_and_neither_waits_for_the_compiler(here):
    # Guidance 1: what is above multiplies the rounding in which the engines differ, until a draw falls to the other side.
    requests = [("generate", "sparrow", 0.9, 2, 5, None, 1), ("super_resolve", handle_file(FACE), 0.8, 1, 7)]
    alone = [here.pictures(*request) for request in requests]
    both = threading.Barrier(2, timeout=120)  # each stops half-way until the other has come so far
    here.half_way = both.wait
    with ThreadPoolExecutor(2) as pool:
        for engine in ("eager", None):
            if engine is None:
                here.compile()
            here.engines.clear()
            together = list(pool.map(lambda request: here.pictures(*request), requests))
            assert here.engines == [engine] * 2
            assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))


def test_whoever_leaves_or_stops_makes_room(visit, here):
    here.endless = True
    visitors = [visit(url=here.url) for _ in range(2)]
    for visitor in visitors:
        visitor.run()
        visitor.wait_until_drawing()
    here.endless = False
    client = Client(here.url, verbose=False)
    waiting = client.submit(handle_file(FACE), 1.0, 1, 1, api_name="/super_resolve")
    with pytest.raises(TimeoutError):  # there is room for two, whatever their tabs
        waiting.result(timeout=2)
    visitors[0].page.close()
    waiting.result(timeout=120)
    assert here.complete == [False, True]
    visitors[1].press("Stop")
    expect(visitors[1].text()).to_have_text("Stopped.")
    run(client, "generate", "cat", 1.0, 1, 1)
    assert sorted(here.complete) == [False, False, True, True]
