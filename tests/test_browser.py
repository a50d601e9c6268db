"""The page in a browser: pictures grow while drawn, Stop stops, bad uploads are told, nothing leaves the machine.

Chromium through Playwright. What a canvas shows is read from its `data-n`, the number of pixels drawn.
"""

import time

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from imtx import CIFAR10_CLASSES, ImageTransformer, pixel_order
from visitor import PIXELS, TABS, Visitor

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

pytest_plugins = "app_fixtures", "browser_fixtures"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_all_tabs_with_a_picture_in_each(visit, theme):
    visitor = visit(width=360, query=f"/?__theme={theme}")
    assert visitor.n == PIXELS  # before the first click
    assert visitor.page.locator("figcaption:visible").all_inner_texts() == CLASSES  # a picture of each
    for tab in TABS:
        visitor.open(tab)
        assert visitor.n == PIXELS
        assert visitor.fits()
        run = visitor.page.get_by_role("button", name="Run", exact=True).bounding_box()
        assert run["y"] + run["height"] < 700  # no one has to scroll to it
    assert visitor.page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")


def test_tabs_that_do_not_fit_beside_each_other_are_all_shown(visit):
    visitor = visit(width=200)
    for tab in TABS:
        visitor.open(tab)


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
    seed.fill("77")  # for the next one; no frame undoes it
    seed.press("Tab")
    visitor.wait_until_drawn()
    assert visitor.seed == "77"
    assert visitor.page.locator("figcaption:visible").all_inner_texts() == ["Seed 12345"]


def test_an_empty_seed_becomes_a_random_one(visit):
    visitor = visit()
    visitor.page.locator("input[type=checkbox]:visible").uncheck()
    visitor.page.locator('input[type=number][aria-label="Seed"]:visible').fill("")
    visitor.run()
    visitor.wait_until_drawing()
    expect(visitor.page.locator("figcaption:visible").first).to_have_text(f"Seed {visitor.seed}")
    visitor.press("Stop")


def test_run_pressed_again_begins_anew(visit):
    visitor = visit()
    visitor.set("Samples", 4)
    visitor.run()
    visitor.wait_until_drawing()
    visitor.options("Class", choose="truck")
    visitor.run()
    expect(visitor.text()).to_contain_text("1024 of 1024 pixels in")
    expect(visitor.text()).to_contain_text("truck, seed")
    counts = [s["n"] for s in visitor.page.evaluate("seen")]
    assert counts[counts.index(min(counts)) :] == sorted(counts[counts.index(min(counts)) :])  # no frame of the first in between


def test_stop(visit):
    visitor = visit()
    visitor.set("Samples", 4)
    visitor.set_pace("slow")
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
    visitor.upload("Portrait or object", cut)
    visitor.assert_refused("cut short")  # before Run
    visitor.open("Complete")
    visitor.upload("Picture", bad)
    expect(visitor.picture("Picture").get_by_role("button", name="Remove Image")).to_be_visible()
    visitor.press("Run")
    visitor.assert_refused("not a picture")
    visitor.picture("Picture").get_by_role("button", name="Remove Image").click()
    visitor.press("Run")
    visitor.assert_refused("no picture yet")
    expect(visitor.page.locator(".error", has_text="Error").filter(visible=True)).to_have_count(0)  # on a slider, which is right
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
    visitor.upload("Portrait or object", tmp_path / "tiny.png")
    assert np.array_equal(visitor.wait_for_another_preview(old), tiny)  # 8x8 stays as it is
    visitor.set("Samples", 1)
    visitor.run()
    visitor.wait_until_drawing()
    visitor.press("Stop")
    expect(visitor.text()).to_have_text("Stopped.")

    old = visitor.preview_source()
    visitor.upload("Portrait or object", tmp_path / "big.png")
    crop = visitor.wait_for_another_preview(old)
    assert crop.shape == (32, 32, 3)
    visitor.unfold("Frame the face", visitor.number("Zoom"))
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


def test_an_answer_that_comes_late_does_not_undo_a_later_choice(visit, tmp_path):
    rows = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 256, 3))
    Image.fromarray(np.ascontiguousarray(rows)).save(tmp_path / "ramp.png")
    visitor = visit()
    visitor.open("Super-resolve")
    visitor.unfold("Frame the face", visitor.number("Zoom"))
    visitor.page.evaluate("""() => {
        const send = fetch;
        window.fetch = async (url, options) => {  // holds the first question about the picture until `release` is called
            if (String(url).includes('/queue/join') && String(options.body).includes('ramp.png')) {
                window.fetch = send;
                await new Promise((resolve) => window.release = resolve);
            }
            return send(url, options);
        };
    }""")
    visitor.upload("Portrait or object", tmp_path / "ramp.png")
    visitor.page.wait_for_function("() => window.release")
    visitor.set("Zoom", 4)
    visitor.page.wait_for_timeout(1000)  # time enough to overtake
    visitor.page.evaluate("release()")
    visitor.page.wait_for_timeout(1000)
    until = time.monotonic() + 20
    while np.ptp(visitor.preview()[:, :, 0]) > 80:  # a quarter of the ramp
        assert time.monotonic() < until
        visitor.page.wait_for_timeout(100)


def test_examples(visit):
    visitor = visit()
    for tab, label in (("Complete", "Picture"), ("Super-resolve", "Portrait or object")):
        visitor.open(tab)
        image = visitor.picture(label).locator("img")
        old = image.get_attribute("src")
        visitor.page.get_by_role("button", name="automobile" if tab == "Complete" else "espinasse", exact=True).click()
        expect(image).not_to_have_attribute("src", old)
        expect(image).to_have_js_property("complete", True)
        assert image.evaluate("image => image.naturalWidth") > 0


def test_sheets_of_samples_can_be_opened(visit):
    visitor = visit()
    visitor.page.get_by_role("button", name="What the bundled models draw").click()
    visitor.page.get_by_role("button", name="Thumbnail 1 of").click()
    sheet = visitor.page.locator(".preview img").first
    expect(sheet).to_have_js_property("complete", True)
    assert sheet.evaluate("image => image.naturalWidth") > 900


def test_an_example_comes_with_its_class_and_another_picture_with_none(visit, tmp_path):
    visitor = visit()
    visitor.open("Complete")
    expect(visitor.dropdown("Class")).to_have_value("airplane")  # the first is there already
    expect(visitor.number("Guidance")).to_have_value("5")
    visitor.page.locator(".gallery:visible button").nth(1).click()
    expect(visitor.dropdown("Class")).to_have_value("automobile")
    visitor.press("Run")
    expect(visitor.text()).to_contain_text("1024 of 1024 pixels in")
    expect(visitor.text()).to_contain_text("automobile, seed")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "cat.png")  # the name says nothing
    visitor.upload("Picture", tmp_path / "cat.png")
    expect(visitor.dropdown("Class")).to_have_value("no class")
    visitor.options("Class", choose="truck")
    visitor.press("Run")
    expect(visitor.text()).to_contain_text("truck, seed")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "blue.png")
    with visitor.page.expect_response(lambda response: "queue/join" in response.url):
        visitor.upload("Picture", tmp_path / "blue.png")
    visitor.press("Run")
    expect(visitor.text()).to_contain_text("truck, seed")  # the visitor's own choice stays
    visitor.page.locator(".gallery:visible button").nth(1).click()
    expect(visitor.dropdown("Class")).to_have_value("automobile")


# ---- the models to choose from ------------------------------------------------------------------------------

OPAQUE = """(selector) => {
    const canvas = document.querySelector(selector);
    const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    return Array.from({length: data.length / 4}, (_, pixel) => pixel).filter((pixel) => data[4 * pixel + 3] === 255);
}"""


def watch_pixels(visitor: Visitor) -> None:
    """Notes from now on which pixels of the first sample show whenever the number of drawn ones changes."""
    visitor.page.evaluate(f"""(canvas) => {{
        const root = document.querySelector(canvas), opaque = {OPAQUE};
        window.masks = {{}};
        new MutationObserver(() => masks[root.dataset.n] = opaque(`${{canvas}} canvas`))
            .observe(root, {{attributes: true, attributeFilter: ['data-n']}});
    }}""", visitor.canvas)


def assert_block_order(visitor: Visitor, order: list[int], given: int) -> None:
    """What was seen since `watch_pixels` of a run that is finished, and its replay: the first n of `order`, and a mark."""
    live = visitor.page.evaluate("masks")
    slider = visitor.page.locator(f"{visitor.canvas} .imtx-replay input")
    visitor.page.evaluate("masks = {}")
    for n in (given + 5, given + 100, len(order), given):
        slider.fill(str(n))
    replayed = visitor.page.evaluate("masks")
    assert len(live) >= 8 and replayed.keys() == {str(n) for n in (given, given + 5, given + 100, len(order))}
    for masks in (live, replayed):
        for n, mask in masks.items():
            mark = order[int(n) : int(n) + 1] if int(n) > given else []
            assert mask == sorted(order[: int(n)] + mark), n


@pytest.fixture
def order(small_models):
    return pixel_order(ImageTransformer.from_pretrained(small_models["blocks-dmol"])).tolist()


def test_another_model_and_its_classes(visit, small_servers, order):
    visitor = visit(url=small_servers["generators"].url)
    assert visitor.options("Model")[:3] == ["tiny", "rows-dmol", "blocks-dmol"]
    expect(visitor.block("Model")).to_contain_text("32x32 pictures row by row. 1D layout, DMOL output")
    assert visitor.options("Class", choose="cat") == ["surprise me", *CIFAR10_CLASSES, "no class"]
    visitor.options("Model", choose="blocks-dmol")
    expect(visitor.block("Model")).to_contain_text("24x24 pictures in blocks 12 pixels wide and 8 high. 2D layout, DMOL output")
    assert visitor.options("Class") == ["surprise me", "cat", "sparrow", "no class"]
    expect(visitor.dropdown("Class")).to_have_value("cat")  # as before
    visitor.options("Class", choose="sparrow")
    visitor.options("Model", choose="rows-dmol")
    expect(visitor.dropdown("Class")).to_have_value("surprise me")
    visitor.options("Model", choose="broken")
    expect(visitor.block("Model")).to_contain_text("Cannot be used. model.safetensors is damaged")
    visitor.press("Run")
    visitor.assert_refused("weights of broken are not loaded")
    visitor.options("Model", choose="rows-categorical")
    expect(visitor.dropdown("Class")).to_have_value("no class")
    expect(visitor.dropdown("Class")).to_be_disabled()
    expect(visitor.number("Guidance")).to_be_disabled()
    visitor.options("Model", choose="blocks-dmol")
    visitor.options("Class", choose="sparrow")
    visitor.set("Samples", 2)
    watch_pixels(visitor)
    visitor.press("Run")
    expect(visitor.text()).to_contain_text("576 of 576 pixels in")
    expect(visitor.text()).to_contain_text("sparrow, seed")
    assert_block_order(visitor, order, 0)


def test_another_model_completes(visit, small_servers, order):
    visitor = visit(url=small_servers["generators"].url)
    visitor.open("Complete")
    expect(visitor.page.get_by_text("The top 16 of 32 rows are kept.")).to_be_visible()
    visitor.options("Model", choose="tall-blocks")
    sentence = "This model draws blocks of 16 rows and cannot keep a top half: choose another model."
    expect(visitor.page.get_by_text(sentence)).to_be_visible()
    visitor.press("Run")
    visitor.assert_refused(sentence)
    visitor.options("Model", choose="blocks-dmol")
    expect(visitor.page.get_by_text("This model draws blocks of 8 rows: the top 8 rows are kept.")).to_be_visible()
    watch_pixels(visitor)
    visitor.press("Run")
    expect(visitor.text()).to_contain_text("576 of 576 pixels in")
    assert_block_order(visitor, order, 8 * 24)


def test_another_model_super_resolves(visit, small_servers):
    visitor = visit(url=small_servers["upscalers"].url)
    visitor.open("Super-resolve")
    for name, source, size in (("sr-blocks-dmol", 6, 24), ("sr-rows-categorical", 8, 16)):
        old = visitor.preview_source()
        visitor.options("Model", choose=name)
        assert visitor.wait_for_another_preview(old, source).shape == (size, size, 3)
        visitor.run()
        expect(visitor.text()).to_contain_text(f"{size**2} of {size**2} pixels in")
        expect(visitor.page.get_by_text(f"{source}x{source} input")).to_be_visible()
