"""Takes README's screenshots of the three tabs, of trucks and with seed 0: python tests/screenshots.py."""

import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from server import ROOT, Server

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FOLDER = ROOT / "assets/screenshots"
HOLD = """
    const frame = requestAnimationFrame;
    window.hold = false;
    window.requestAnimationFrame = (f) => frame((now) => hold && f.name === 'unveil' ? requestAnimationFrame(f) : f(now));
"""
CLASS = "truck"
TABS = {"Generate": 900, "Complete": 1024, "Super-resolve": 1024}  # pixels drawn when the picture is taken


def shoot(page: Page, tab: str, pixels: int) -> None:
    name = tab.lower()
    page.get_by_role("tab", name=tab).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.get_by_label("Randomise the seed").uncheck()
    if tab == "Generate":
        panel.get_by_role("combobox", name="Class").click()
        page.get_by_role("option", name=CLASS).click()
    panel.get_by_role("button", name="Run", exact=True).click()
    drawn = f"document.querySelector('#canvas-{name} canvas').dataset.n"
    page.wait_for_function(f"() => {drawn} < {pixels}")  # the run has begun: what is shown at first is complete
    page.wait_for_function(f"() => {drawn} >= {pixels} && (hold = true)")  # and there it stays
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=FOLDER / f"{name}.png")
    page.evaluate("hold = false")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as app, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_context(viewport={"width": 1180, "height": 860}).new_page()
        page.add_init_script(HOLD)
        page.goto(f"{app.url}/?__theme=light")
        page.wait_for_selector("#canvas-generate canvas[data-n]")
        for tab, pixels in TABS.items():
            shoot(page, tab, pixels)
        browser.close()


if __name__ == "__main__":
    main()
