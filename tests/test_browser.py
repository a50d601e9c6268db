"""The page in a browser: pictures grow while drawn, Stop stops, bad uploads are told, nothing leaves the machine.

Chromium through Playwright. What a canvas shows is read from its `data-n`, the number of pixels drawn.
"""

import re
import time
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from server import drawn

pytest_plugins = "app_fixtures"

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]
TABS = {"Generate": "generate", "Complete": "complete", "Super-resolve": "super-resolve"}
PIXELS = 1024
SLOW = 60_000  # ms; a run takes 2 to 10 s, more on a busy machine
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


class Visitor:
    """A page of the demo, and everything that goes wrong in it."""

    def __init__(self, browser, url: str, width: int = 1100, query: str = ""):
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(SLOW)
        self.outside, self.errors = [], []
        own = (url, "data:", "blob:")
        self.page.on("request", lambda r: None if r.url.startswith(own) else self.outside.append(r.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url + query)
        self.open("Generate")

    def open(self, tab: str) -> None:
        self.task = TABS[tab]
        self.page.get_by_role("tab", name=tab, exact=True).click()
        self.page.wait_for_selector(f"{self.canvas}[data-n]")

    @property
    def canvas(self) -> str:
        return f"#canvas-{self.task} .imtx-canvas"

    @property
    def n(self) -> int:
        return int(self.page.locator(self.canvas).get_attribute("data-n"))

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def set(self, label: str, number: float) -> None:
        field = self.page.locator(f'input[aria-label="number input for {label}"]:visible')
        field.fill(str(number))
        field.press("Tab")

    @property
    def seed(self) -> str:
        return self.page.locator('input[type=number][aria-label="Seed"]:visible').input_value()

    def run(self) -> None:
        """Presses Run, and notes from then on when which number of pixels is shown: [{n, t}], t in ms since 1970."""
        self.page.evaluate("""(canvas) => {
            const root = document.querySelector(canvas);
            window.observer?.disconnect();
            window.seen = [];
            window.observer = new MutationObserver(() => {
                const n = +root.dataset.n;
                if (seen.at(-1)?.n !== n) seen.push({n, t: performance.timeOrigin + performance.now()});
            });
            observer.observe(root, {attributes: true, attributeFilter: ['data-n']});
        }""", self.canvas)
        self.press("Run")

    def wait_until_drawing(self, least: int = 1) -> None:
        self.page.wait_for_function(
            f"() => seen.length > 1 && seen.at(-1).n < {PIXELS} && seen.at(-1).n >= seen[0].n + {least}"
        )

    def wait_until_drawn(self) -> list[dict]:
        """What was seen of a whole run."""
        self.page.wait_for_function(f"() => seen.length > 1 && seen.at(-1).n === {PIXELS}")
        expect(self.text()).to_contain_text("1024 of 1024 pixels in")
        return self.page.evaluate("seen")

    def text(self):
        return self.page.locator(f"{self.canvas} .imtx-text")

    def picture(self, label: str):
        """The picture component of that label."""
        return self.page.locator(".block:visible").filter(
            has=self.page.get_by_test_id("block-label").filter(has_text=label)
        )

    def upload(self, label: str, path: Path) -> None:
        block = self.picture(label)
        if (remove := block.get_by_role("button", name="Remove Image")).is_visible():
            remove.click()
        block.locator("input[type=file]").set_input_files(path)

    def preview(self) -> np.ndarray:
        """The pixels of "What becomes 8x8", as the browser decodes them."""
        height, width, *data = self.page.evaluate("""async (image) => {
            await image.decode();
            const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const {data} = context.getImageData(0, 0, canvas.width, canvas.height);
            return [canvas.height, canvas.width, ...data];
        }""", self.picture("What becomes 8x8").locator("img").element_handle())
        return np.array(data, np.uint8).reshape(height, width, 4)[:, :, :3]

    def preview_source(self) -> str:
        return self.picture("What becomes 8x8").locator("img").get_attribute("src")

    def wait_for_another_preview(self, old: str) -> np.ndarray:
        expect(self.picture("What becomes 8x8").locator("img")).not_to_have_attribute("src", old)
        return self.preview()

    def assert_refused(self, words: str) -> None:
        """A toast says so, in a sentence; it is closed."""
        toast = self.page.locator(".toast-body")
        expect(toast).to_contain_text(words)
        assert "/" not in toast.inner_text() and "Traceback" not in toast.inner_text()
        toast.locator(".toast-close").click()
        expect(toast).to_have_count(0)

    def fits(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture
def visit(browser, app):
    """Opens the demo as a new visitor. At the end, nobody's page may have failed or asked another host for anything."""
    visitors = []

    def open_page(**options) -> Visitor:
        visitors.append(Visitor(browser, app.url, **options))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.context.close()
        assert not visitor.outside and not visitor.errors


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_all_tabs_with_a_picture_in_each(visit, theme):
    visitor = visit(width=360, query=f"/?__theme={theme}")
    assert visitor.n == PIXELS  # before the first click
    for tab in TABS:
        visitor.open(tab)
        assert visitor.n == PIXELS
        assert visitor.fits()
    assert visitor.page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")


@pytest.mark.parametrize("tab", TABS)
def test_frames_arrive_while_the_picture_is_drawn(visit, tab):
    visitor = visit(width=360)
    visitor.open(tab)
    visitor.set("Samples", 2)
    visitor.run()
    seen = visitor.wait_until_drawn()
    counts = [s["n"] for s in seen]
    first = PIXELS // 2 if tab == "Complete" else 0
    assert counts == sorted(counts) and counts[0] >= first
    between = [s for s in seen if first < s["n"] < PIXELS]
    assert len(between) >= 8
    assert seen[-1]["t"] - between[0]["t"] > 500  # not in one burst
    assert visitor.fits()
    expect(visitor.text()).to_contain_text(f"seed {visitor.seed}")  # randomised, and shown
    assert visitor.seed != "0"


def test_a_seed_of_ones_own_is_kept(visit):
    visitor = visit()
    visitor.page.locator("input[type=checkbox]:visible").uncheck()
    seed = visitor.page.locator('input[type=number][aria-label="Seed"]:visible')
    seed.fill("12345")
    seed.press("Tab")
    visitor.set("Samples", 1)
    visitor.run()
    visitor.wait_until_drawing()
    assert visitor.seed == "12345"
    visitor.press("Stop")


def test_stop(visit):
    visitor = visit()
    visitor.set("Samples", 4)
    visitor.run()
    visitor.wait_until_drawing(10)
    visitor.press("Stop")
    expect(visitor.text()).to_have_text("Stopped.")
    n = visitor.n
    assert 0 < n < PIXELS
    visitor.page.wait_for_timeout(1500)
    assert visitor.n == n and visitor.text().inner_text() == "Stopped."
    visitor.run()  # again in this tab
    visitor.wait_until_drawing(10)
    visitor.press("Stop")
    expect(visitor.text()).to_have_text("Stopped.")
    visitor.open("Complete")  # and in another
    visitor.set("Samples", 1)
    visitor.run()
    visitor.wait_until_drawn()
    visitor.open("Generate")
    assert visitor.text().inner_text() == "Stopped."


def test_whoever_leaves_makes_room(visit, app):
    client = Client(app.url, verbose=False)
    visitor = visit()
    visitor.set("Samples", 8)  # would go on for a long time
    visitor.run()
    visitor.wait_until_drawing()
    visitor.page.close()
    start = time.monotonic()
    job = client.submit("cat", 1.0, 1, 1, api_name="/generate")
    for value, _, _ in job:
        if drawn(value):
            job.cancel()
            break
    assert time.monotonic() - start < 4


def test_two_visitors_take_turns(visit):
    first, second = visit(), visit()
    first.set("Samples", 3)
    second.open("Complete")
    second.set("Samples", 1)
    first.run()
    first.wait_until_drawing()
    second.run()
    ended = first.wait_until_drawn()[-1]["t"]
    began = next(s for s in second.wait_until_drawn() if s["n"] > PIXELS // 2 and s["n"] < PIXELS)["t"]
    assert began > ended - 500  # the second one's first new pixel comes when the first one's picture is finished


def test_a_slow_line_shows_the_picture_grow(visit):
    visitor = visit()
    visitor.set("Samples", 1)
    session = visitor.context.new_cdp_session(visitor.page)
    session.send("Network.enable")
    slow = {"offline": False, "latency": 300, "downloadThroughput": 2e5, "uploadThroughput": 1e5}
    session.send("Network.emulateNetworkConditions", slow)
    visitor.page.evaluate("""(selector) => {
        window.painted = new Set();
        const look = () => {
            const canvas = document.querySelector(selector);
            painted.add(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.join());
            requestAnimationFrame(look);
        };
        look();
    }""", f"{visitor.canvas} canvas")
    visitor.run()
    visitor.wait_until_drawn()
    assert visitor.page.evaluate("painted.size") >= 15


def test_bad_uploads_are_told(visit, tmp_path):
    bad, cut = tmp_path / "bad.png", tmp_path / "cut.png"
    bad.write_text("This is no picture.")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(cut)
    cut.write_bytes(cut.read_bytes()[:6000])
    visitor = visit()
    visitor.open("Super-resolve")
    visitor.upload("Portrait", cut)
    visitor.assert_refused("cut short")  # before Run
    visitor.open("Complete")
    visitor.upload("Picture", bad)
    expect(visitor.picture("Picture").get_by_role("button", name="Remove Image")).to_be_visible()
    visitor.press("Run")
    visitor.assert_refused("not a picture")
    visitor.picture("Picture").get_by_role("button", name="Remove Image").click()
    visitor.press("Run")
    visitor.assert_refused("no picture yet")
    Image.fromarray(noise).save(tmp_path / "good.png")
    visitor.upload("Picture", tmp_path / "good.png")
    expect(visitor.picture("Picture").get_by_role("button", name="Remove Image")).to_be_visible()
    visitor.set("Samples", 1)
    visitor.run()
    visitor.wait_until_drawing()
    visitor.press("Stop")


def test_framing_a_portrait(visit, tmp_path):
    rng = np.random.default_rng(0)
    tiny = rng.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(tiny).save(tmp_path / "tiny.png")
    rows, columns = np.mgrid[0:1600, 0:1200]
    ramp = np.stack([rows * 255 // 1600, columns * 255 // 1200, np.zeros_like(rows)], axis=2).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "big.png")
    visitor = visit()
    visitor.open("Super-resolve")

    old = visitor.preview_source()
    visitor.upload("Portrait", tmp_path / "tiny.png")
    assert np.array_equal(visitor.wait_for_another_preview(old), tiny)  # 8x8 stays as it is
    visitor.set("Samples", 1)
    visitor.run()
    visitor.wait_until_drawing()
    visitor.press("Stop")
    expect(visitor.text()).to_have_text("Stopped.")

    old = visitor.preview_source()
    visitor.upload("Portrait", tmp_path / "big.png")
    crop = visitor.wait_for_another_preview(old)
    assert crop.shape == (32, 32, 3)
    visitor.page.get_by_role("button", name=re.compile("Frame the face")).click()
    for label, number, channel in (("Zoom", 4, None), ("Left to right", 1, 1), ("Top to bottom", 0, 0)):
        old = visitor.preview_source()
        visitor.set(label, number)
        changed = visitor.wait_for_another_preview(old)
        if channel is None:
            assert np.ptp(changed[:, :, 0]) < np.ptp(crop[:, :, 0]) / 2  # it shows less of the ramp
        else:
            moved = changed[:, :, channel].astype(int) - crop[:, :, channel]
            assert (moved.mean() > 20) if number else (moved.mean() < -20)
        crop = changed
    visitor.run()
    assert visitor.wait_until_drawn()


def test_examples(visit):
    visitor = visit()
    for tab, label in (("Complete", "Picture"), ("Super-resolve", "Portrait")):
        visitor.open(tab)
        image = visitor.picture(label).locator("img")
        old = image.get_attribute("src")
        visitor.page.locator(".gallery:visible button").nth(1).click()
        expect(image).not_to_have_attribute("src", old)
        expect(image).to_have_js_property("complete", True)
        assert image.evaluate("image => image.naturalWidth") > 0
