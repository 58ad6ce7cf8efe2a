"""The page of ``scripts/explore.py`` in a browser: used as a person uses it, and the pictures change as they should."""
import base64
import json
import os
import shutil
import time

import pytest
from small_data import make_rectangles
from test_explore import DEFORMABLE, DENSE, FIRST, get, make_checkpoint, make_checkpoint_with, png, png_header, serving

from datasets.errors import SIGNS

sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install -e '.[explore,dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    flags = ["--disable-dev-shm-usage", "--disable-gpu"] + ["--no-sandbox"] * (os.geteuid() == 0)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_rectangles(tmp_path_factory.mktemp("browsed") / "data", val=30)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, data):
    with serving(make_checkpoint(tmp_path_factory.mktemp("dense"), DENSE), data) as (port, _):
        yield port


@pytest.fixture(scope="module")
def deformable(tmp_path_factory, data):
    with serving(make_checkpoint(tmp_path_factory.mktemp("deformable"), DEFORMABLE), data) as (port, _):
        yield port


@pytest.fixture
def opened(browser):
    """Opens the page of a port; at the end nothing has gone wrong that a user would not be told."""
    pages = []

    def visit(port: int, place: str = "", **options):
        page = browser.new_page(viewport={"width": 1280, "height": 860}, **options)
        page.set_default_timeout(20_000)
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: page.faults.append(request.url)
                if not request.url.startswith((f"http://127.0.0.1:{port}/", "blob:", "data:")) else None)
        page.goto(f"http://127.0.0.1:{port}/{place}")
        pages.append(page)
        return page

    yield visit
    for page in pages:
        assert [fault for fault in page.faults if "the server responded with a status of 4" not in fault] == []
        page.close()


def until(holds, seconds: float = 20.0) -> None:
    """Wait for something to hold. Playwright's own waiting evaluates strings in the page, which its policy forbids."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never did"
        time.sleep(0.03)


def text(page, name: str) -> str:
    return page.locator(f"#{name}").inner_text()


def pixels(page) -> str:
    """What the large picture shows."""
    return page.evaluate("document.getElementById('picture').toDataURL()")


def boxes(page) -> int:
    return page.locator("#detections li").count()


def settled(page, before: str | None = None) -> str:
    """What the picture shows once nothing is under way; where ``before`` is given, something else than that."""
    if before is not None:
        until(lambda: pixels(page) != before)
    page.wait_for_selector("#busy", state="hidden")
    return pixels(page)


def click_at(page, x: float, y: float, modifiers=()) -> None:
    """Click a point of the image, given in its pixels."""
    frame = page.locator("#picture").bounding_box()
    page.locator("#picture").click(position={"x": x / 72 * frame["width"], "y": y / 64 * frame["height"]},
                                   modifiers=list(modifiers))


def ready(page) -> str:
    page.wait_for_selector("#detections li")
    return settled(page)


def test_images_and_threshold(opened, dense):
    page = opened(dense)
    first = ready(page)
    assert text(page, "title") == "200.png · 72 × 64"
    page.click("#thumbnails li:nth-child(3) button")
    third = settled(page, first)
    assert text(page, "title").startswith("202.png") and page.url.endswith("#202")
    scores = [one["score"] for one in get(dense, "/api/images/202/detections")["detections"]]
    seen = {third}
    for threshold in (0.0, 0.3, 0.7, 0.95):
        asked = []
        page.on("request", lambda request: asked.append(request.url))  # noqa: B023
        page.locator("#threshold").fill(str(threshold))
        assert boxes(page) == sum(score >= threshold for score in scores)
        assert page.locator("#count").get_attribute("data-boxes") == str(boxes(page)) and not asked
        seen.add(pixels(page))
    assert len(seen) == 5                                                       # all of them different
    page.locator("#threshold").fill("1")
    assert "no box" in text(page, "count")
    page.locator("#picture").focus()
    before = pixels(page)
    page.keyboard.press("ArrowRight")
    settled(page, before)
    assert text(page, "title").startswith("203.png")
    page.keyboard.press("ArrowLeft")
    until(lambda: text(page, "title").startswith("202.png"))
    page.click("#page-on")
    page.wait_for_selector("#thumbnails li[data-id='229']")
    assert page.locator("#thumbnails li").count() == 6


def test_a_box_is_clicked(opened, dense):
    page = opened(dense)
    before = ready(page)
    page.locator("#threshold").fill("0")
    before = pixels(page)
    detection = get(dense, f"/api/images/{FIRST}/detections")["detections"][0]
    left, top, right, bottom = detection["box"]
    click_at(page, min(max((left + right) / 2, 1), 71), min(max((top + bottom) / 2, 1), 63))
    heat = settled(page, before)
    page.wait_for_selector("#heads button")
    assert text(page, "attention-title").startswith("Where the query of")
    assert page.locator("#heads button").count() == 5 and page.locator("#layers button").count() == 2
    assert page.locator("#view-row").is_hidden()                                # dense attention has no sampling points
    seen = {before, heat}
    page.click("#heads button:nth-child(3)")
    seen.add(pixels(page))
    page.click("#layers button:nth-child(1)")
    seen.add(pixels(page))
    page.uncheck("#path")
    seen.add(pixels(page))
    assert len(seen) == 5 and page.locator("#steps li").count() == 3
    small = page.evaluate("[...document.querySelectorAll('#heads canvas')].map((canvas) => canvas.toDataURL())")
    assert len(set(small)) == 5
    page.keyboard.press("Escape")
    assert pixels(page) == before and page.locator("#attention").is_hidden()
    page.click("#detections li:nth-child(2) button")                            # the list chooses, too
    settled(page, before)
    page.wait_for_selector("#heads button")
    chosen = page.locator("#layers [aria-pressed=true]"), page.locator("#heads [aria-pressed=true]")
    assert [one.inner_text() for one in chosen] == ["1", "2"]                   # as they were


def test_a_box_is_clicked_while_another_image_loads(opened, dense):
    """What was asked of the one is not drawn on the other."""
    page, held = opened(dense), []
    ready(page)
    page.locator("#threshold").fill("0")
    page.click("#thumbnails li:nth-child(4) button")
    until(lambda: text(page, "title").startswith("203.png"))
    alone = settled(page)
    page.click("#thumbnails li:nth-child(1) button")
    until(lambda: text(page, "title").startswith("200.png"))
    page.route("**/api/images/203/detections", lambda route: held.append(route))
    page.click("#thumbnails li:nth-child(4) button")
    page.click("#detections li:nth-child(1) button")
    page.wait_for_selector("#heads button")
    held[0].continue_()
    until(lambda: text(page, "title").startswith("203.png"))
    assert settled(page) == alone and page.locator("#attention").is_hidden()
    assert page.locator("#detections [aria-pressed=true]").count() == 0


def test_the_heat_is_where_the_weights_are(opened, dense):
    """The brightest cell of the picture is the heaviest one of the map."""
    page = opened(dense)
    ready(page)
    page.click("#detections li:nth-child(1) button")
    page.wait_for_selector("#heads button")
    page.uncheck("#path")
    query = get(dense, f"/api/images/{FIRST}/detections")["detections"][0]["query"]
    layer = get(dense, f"/api/images/{FIRST}/query/{query}")["layers"][-1]
    rows, columns = layer["shape"]
    colours = page.evaluate("""([rows, columns]) => {
        const canvas = document.getElementById('picture'), context = canvas.getContext('2d'), found = [];
        for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
            const [r, g, b] = context.getImageData((column + .5) / columns * canvas.width,
                                                   (row + .5) / rows * canvas.height, 1, 1).data;
            found.push([r, g, b]);
        }
        return found;
    }""", [rows, columns])
    heat = list(base64.b64decode(layer["heat"]))[:rows * columns]
    best = heat.index(max(heat))
    yellow = [red + green - 2 * blue for red, green, blue in colours]           # the end of viridis
    assert max(heat) == 255 and yellow[best] > 150
    strong = [k for k, value in enumerate(yellow) if value > 150]
    assert all(heat[k] > 128 for k in strong)


def test_a_point_is_clicked(opened, dense, deformable):
    page = opened(dense)
    before = ready(page)
    page.locator("#threshold").fill("1")                                        # no box is in the way
    before = pixels(page)
    click_at(page, 20, 30)
    one = settled(page, before)
    page.wait_for_selector("#heads button")
    assert text(page, "attention-title") == "Encoder, from (20, 30)"
    assert page.locator("#layers button").count() == 1 and page.locator("#path-label").is_hidden()
    click_at(page, 60, 50)
    assert settled(page, one) != before and text(page, "attention-title") == "Encoder, from (60, 50)"
    page.locator("#threshold").fill("0")
    page.keyboard.press("Escape")
    before = pixels(page)
    click_at(page, 20, 30, ["Shift"])                                           # a point, whatever boxes are around it
    settled(page, before)
    assert text(page, "attention-title") == "Encoder, from (20, 30)"
    page.click("#detections li:nth-child(1) button")
    page.wait_for_selector("#layers [aria-pressed=true]:has-text('2')")         # of the decoder, the last is shown first

    page = opened(deformable)
    before = ready(page)
    click_at(page, 20, 30, ["Shift"])
    page.wait_for_selector("#attention-note:visible")
    assert "no encoder layers" in text(page, "attention-note")
    assert pixels(page) == before                                               # and no empty picture


def test_sampling_points(opened, deformable):
    page = opened(deformable)
    before = ready(page)
    page.click("#detections li:nth-child(1) button")
    heat = settled(page, before)
    page.wait_for_selector("#heads button")
    page.click("#view [data-view=points]")
    points = pixels(page)
    page.click("#heads button:nth-child(2)")
    assert len({before, heat, points, pixels(page)}) == 4
    assert "start:" in page.locator("#steps li:nth-child(1)").inner_text()


def test_ground_truth_and_order(opened, dense):
    page = opened(dense)
    before = ready(page)
    page.check("#truth")
    page.wait_for_selector("#legend:visible")
    said = get(dense, f"/api/images/{FIRST}/errors")
    assert settled(page) != before
    legend = text(page, "legend")
    shown = page.evaluate("""[...document.querySelectorAll('#legend span')].map((line) => [line.textContent,
        getComputedStyle(line.firstChild).borderTopColor])""")
    for kind, count in said["counts"].items():
        sign = SIGNS[kind]
        words = f"{count} {sign.words}" + (f" ({sign.letter})" if sign.letter else "")
        colour = ", ".join(str(int(sign.colour[k:k + 2], 16)) for k in (1, 3, 5))
        assert ([words, f"rgb({colour})"] in shown) == (count > 0), (words, shown)
    assert f"{len(said['missed'])} missed" in legend or not said["missed"]
    assert sum(int(word) for word in legend.split() if word.isdigit()) == len(said["kinds"]) + len(said["missed"])
    page.locator("#threshold").fill("1")
    until(lambda: "1 missed" in text(page, "legend"))
    assert "correct" not in text(page, "legend")
    page.click("#next")
    until(lambda: text(page, "title").startswith("201.png") and "2 missed" in text(page, "legend"))
    page.click("#sort-error")
    until(lambda: page.locator("#thumbnails .errors").count() == 24 and text(page, "progress") == "", 40)
    shown = [int(said.split()[0]) for said in page.locator("#thumbnails .errors").all_inner_texts()]
    want = sorted((get(dense, f"/api/images/{FIRST + i}/errors")["total"] for i in range(30)), reverse=True)
    assert shown == want[:24] and len(set(want)) > 1


def upload(page, folder, content: bytes) -> None:
    (folder / "picture.png").write_bytes(content)
    page.set_input_files("#upload", folder / "picture.png")


def test_uploads(opened, dense, tmp_path):
    page = opened(dense)
    before = ready(page)
    upload(page, tmp_path, png(48, 72))
    settled(page, before)
    page.wait_for_selector("#uploads li")
    assert "48 × 72" in text(page, "title") and page.locator("#truth").is_disabled()
    shown = pixels(page)
    for content, message in ((b"These are words.", "This is no image"), (png_header(30_000, 30_000), "50 megapixels"),
                             (png()[:300], "damaged or cut short"), (bytes(20_000_001), "larger than 20 MB")):
        upload(page, tmp_path, content)
        page.wait_for_selector(f"#error:visible:has-text({json.dumps(message)})")
        assert pixels(page) == shown and page.locator("#uploads li").count() == 1
        page.click("#error-close")
        assert page.locator("#error").is_hidden()


def test_paths_that_leave_the_folder(opened, dense):
    page = opened(dense, "#..%2f..%2fetc%2fpasswd")
    ready(page)                                                                 # the first image, as without it
    assert text(page, "title").startswith("200.png")
    page.evaluate("location.hash = '999'")
    page.wait_for_selector("#error:visible:has-text('There is no image 999')")
    status, body = page.evaluate("""async () => {
        const answer = await fetch('/image/..%2f..%2f..%2fetc%2fpasswd');
        return [answer.status, await answer.text()];
    }""")
    assert status == 404 and list(json.loads(body)) == ["error"]
    before = page.evaluate("window.ran")
    page.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = 'window.ran = true';
        document.body.append(script);
    }""")
    assert page.evaluate("window.ran") == before                                # no script that is written into the page
    page.faults[:] = [fault for fault in page.faults if "Content Security Policy" not in fault]


def test_without_data(opened, tmp_path):
    with serving(make_checkpoint_with(tmp_path, DEFORMABLE, dec_layers=1), None) as (port, _):
        page = opened(port)
        page.wait_for_selector("#no-images:visible")
        assert "Upload an image" in text(page, "no-images") and page.locator("#picture").is_hidden()
        upload(page, tmp_path, png(30, 30))
        ready(page)
        assert page.locator("#no-images").is_hidden()
        page.click("#detections li:nth-child(1) button")
        page.wait_for_selector("#layers button")
        assert page.locator("#layers button").count() == 1


def test_on_a_phone(opened, dense):
    page = opened(dense)
    page.set_viewport_size({"width": 360, "height": 740})
    ready(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    width = page.locator("#picture").bounding_box()["width"]
    assert 300 < width <= 360
    page.click("#detections li:nth-child(1) button")
    page.wait_for_selector("#heads button")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator("#attention").bounding_box()["y"] < page.locator("#detections").bounding_box()["y"]
