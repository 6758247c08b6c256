import base64
import re
import shutil
import struct
from html.parser import HTMLParser

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from covidmask.interactive import frame_slider

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def slider(n=3, **options):
    labels = [f"threshold {i}" for i in range(n)]
    return Elements(frame_slider([PNG] * n, labels, "NMS", "boxes", **options).data)


def test_caption_is_escaped_and_optional():
    page = slider(caption="a < b")
    assert len(page.all("figcaption")) == 1 and "a < b" in page.text
    assert not slider().all("figcaption")


def test_frames_are_embedded_and_one_is_shown():
    page = slider(start=1)
    images = page.all("img")
    assert len(images) == 3
    for image in images:
        kind, content = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content) == PNG
    assert [image["style"].split(";")[0] for image in images] == [
        "display: none",
        "display: block",
        "display: none",
    ]
    (control,) = page.all("input")
    assert (control["type"], control["min"], control["max"], control["value"]) == (
        "range", "0", "2", "1",
    )  # fmt: skip
    assert "threshold 1" in page.text


def test_accessible_names():
    page = slider()
    (control,), (output,) = page.all("input"), page.all("output")
    assert control["aria-label"] == "NMS"
    assert control["aria-valuetext"] == "threshold 0"
    assert output["aria-live"] == "polite"
    assert page.all("label")[0]["for"] == output["for"] == control["id"]
    assert [image["alt"] for image in page.all("img")] == [
        f"boxes (threshold {i})" for i in range(3)
    ]
    own = frame_slider([PNG, PNG], ["a", "b"], "NMS", ["two boxes", "one box"]).data
    assert [image["alt"] for image in Elements(own).all("img")] == ["two boxes", "one box"]


def test_nothing_is_loaded_from_elsewhere():
    html = frame_slider([PNG] * 2, ["a", "b"], "t", "x").data
    html = re.sub(r"base64,[^\"]+", "", html)
    assert "http" not in html
    assert "//" not in html
    assert "<script" not in html
    assert "<link" not in html


def test_several_sliders_do_not_clash():
    names = {slider().all("input")[0]["id"] for _ in range(20)}
    assert len(names) == 20


def test_texts_are_escaped():
    evil = "\"><script>alert('x')</script>&"
    html = frame_slider([PNG], [evil], evil, evil).data
    assert "<script" not in html
    page = Elements(html)
    assert page.all("img")[0]["data-label"] == evil
    assert page.all("img")[0]["alt"] == f"{evil} ({evil})"
    assert page.all("input")[0]["aria-label"] == evil
    assert not page.all("script")


def test_figures_become_png_of_their_size_and_are_closed():
    figures = [plt.figure(figsize=(2, 1)) for _ in range(2)]
    images = Elements(frame_slider(figures, ["a", "b"], "t", "x", dpi=50).data).all("img")
    for image in images:
        content = base64.b64decode(image["src"].split(",")[1])
        assert struct.unpack(">II", content[16:24]) == (100, 50)
    assert not set(plt.get_fignums()) & {figure.number for figure in figures}


@pytest.mark.parametrize(
    ("frames", "labels", "alt", "start"),
    [([], [], "x", 0), ([PNG], ["a", "b"], "x", 0), ([PNG], ["a"], [], 0), ([PNG], ["a"], "x", 1)],
)
def test_refuses(frames, labels, alt, start):
    with pytest.raises(ValueError):
        frame_slider(frames, labels, "t", alt, start=start)


def test_browser_moves_the_frames():
    """The handler, run by a real browser where playwright and Chromium are present."""
    sync_api = pytest.importorskip("playwright.sync_api")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no system Chromium")
    html = "".join(
        frame_slider([PNG] * 3, [f"{name}{i}" for i in range(3)], name, "x").data for name in "ab"
    )
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(error))
        page.set_content(html)
        page.locator("input").first.focus()
        page.keyboard.press("ArrowRight")
        shown = "image => image.style.display == 'block'"
        visible = page.locator("img").evaluate_all(f"images => images.map({shown})")
        texts = page.locator("output").all_text_contents()
        spoken = page.locator("input").first.get_attribute("aria-valuetext")
        browser.close()
    assert not errors
    assert visible == [False, True, False, True, False, False]
    assert texts == ["a1", "b0"]
    assert spoken == "a1"
