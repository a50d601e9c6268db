"""The demo's page as a visitor in a browser meets it: Chromium through Playwright."""

import re
from pathlib import Path

import numpy as np
from playwright.sync_api import Locator, expect

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]
TABS = {"Generate": "generate", "Complete": "complete", "Super-resolve": "super-resolve"}
PIXELS = 1024
SLOW = 60_000  # ms; a run takes 2 to 10 s, more on a busy machine
# Stops the clock of the canvases: their frames come when a test says so (`Visitor.pass_time`). All other frames come.
STILL = """
    const frame = requestAnimationFrame, cancel = cancelAnimationFrame;
    window.held = null;
    window.requestAnimationFrame = (f) => f.name === 'unveil' ? (window.held = f, -1) : frame(f);
    window.cancelAnimationFrame = (id) => id === -1 ? window.held = null : cancel(id);
"""
expect.set_options(timeout=20_000)


class Visitor:
    """A page of the demo, and everything that goes wrong in it. `still`: see STILL; options: of a browser's context."""

    def __init__(self, browser, url: str, width: int = 1100, query: str = "", still: bool = False, **options):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        if still:
            self.context.add_init_script(STILL)
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

    def unfold(self, name: str, inside: Locator) -> None:
        """Opens an accordion. Gradio may mount a tab's content anew while the page is young, and a click is lost."""
        for _ in range(3):
            self.page.get_by_role("button", name=re.compile(name)).click()
            try:
                return expect(inside).to_be_visible(timeout=7_000)
            except AssertionError:
                continue
        expect(inside).to_be_visible()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def number(self, label: str) -> Locator:
        return self.page.locator(f'input[aria-label="number input for {label}"]:visible')

    def set(self, label: str, number: float) -> None:
        field = self.number(label)
        field.fill(str(number))
        field.press("Tab")

    def set_pace(self, name: str) -> None:
        self.page.get_by_label("Pace").filter(visible=True).select_option(name)

    def pass_time(self, seconds: float) -> int:
        """Of a `still` page: how many pixels are shown so much later; the first call since Run begins to count."""
        return self.page.evaluate("""([canvas, seconds]) => {
            const f = held;
            clock = window.clock && seconds ? clock + 1000 * seconds : -1e9;
            held = null;
            f(clock);
            return +document.querySelector(canvas).dataset.n;
        }""", [self.canvas, seconds])

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

    def dropdown(self, label: str):
        return self.page.get_by_role("combobox", name=label, exact=True).filter(visible=True)

    def options(self, label: str, choose: str | None = None) -> list[str]:
        """The entries of a dropdown, of which one may be chosen."""
        self.dropdown(label).click()
        options = self.page.locator("[role=option]")  # gradio's; those of "Pace" are the browser's own
        names = [name.removeprefix("✓").strip() for name in options.all_inner_texts()]
        if choose is None:
            self.dropdown(label).blur()
        else:
            options.nth(names.index(choose)).click()
        expect(options).to_have_count(0)
        return names

    def text(self):
        return self.page.locator(f"{self.canvas} .imtx-text")

    def block(self, label: str):
        """The component of that label."""
        return self.page.locator(".block:visible").filter(has=self.page.get_by_label(label, exact=True))

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

    def preview(self, source_size: int = 8) -> np.ndarray:
        """The pixels of "What becomes 8x8", as the browser decodes them."""
        height, width, *data = self.page.evaluate("""async (image) => {
            await image.decode();
            const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const {data} = context.getImageData(0, 0, canvas.width, canvas.height);
            return [canvas.height, canvas.width, ...data];
        }""", self.picture(f"What becomes {source_size}x{source_size}").locator("img").element_handle())
        return np.array(data, np.uint8).reshape(height, width, 4)[:, :, :3]

    def preview_source(self) -> str:
        image = self.picture("What becomes").locator("img")
        expect(image).to_have_attribute("src", re.compile("crop.png"))  # before, it is the example as the page came with it
        return image.get_attribute("src")

    def wait_for_another_preview(self, old: str, source_size: int = 8) -> np.ndarray:
        expect(self.picture("What becomes").locator("img")).not_to_have_attribute("src", old)
        return self.preview(source_size)

    def assert_refused(self, words: str) -> None:
        """A toast says so, in a sentence; it is closed."""
        toast = self.page.locator(".toast-body")
        expect(toast).to_contain_text(words)
        assert "/" not in toast.inner_text() and "Traceback" not in toast.inner_text()
        toast.locator(".toast-close").click()
        expect(toast).to_have_count(0)

    def fits(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
