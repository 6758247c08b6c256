"""Every built page in Chromium, opened from the disk as a reader opens it.

`make test` builds the pages, finds a browser and sets COVIDMASK_HTML and COVIDMASK_BROWSER.
Screenshots of the whole pages go to _build/screenshots.
"""

import os
from pathlib import Path

import pytest

from tools import browser

ROOT = Path(__file__).resolve().parents[2]
HTML = Path(os.environ.get("COVIDMASK_HTML", ROOT / "_build" / "html"))
REDIRECT = HTML / "index.html"  # sends the reader on to book/index.html
PAGES = sorted({*HTML.rglob("*.html")} - {*HTML.glob("_static/**/*.html"), REDIRECT})
SCREENSHOTS = ROOT / "_build" / "screenshots"
WIDTHS = (1280, 390)
MAX_PAGE = 4_000_000  # bytes of the page and of the images that it shows

pytestmark = pytest.mark.skipif(not PAGES, reason=f"no pages in {HTML}: run make book first")

IMAGES = """() => [...document.images].map(i => ({
    src: i.src.slice(0, 200), alt: i.getAttribute("alt"), width: i.naturalWidth,
    article: Boolean(i.closest("article"))}))"""
# elements that stick out to the right, unless something around them scrolls or hides the excess
TOO_WIDE = """() => [...document.querySelectorAll("article *")].filter(e => {
    if (e.getBoundingClientRect().right <= window.innerWidth + 1) return false;
    for (let p = e; p; p = p.parentElement)
        if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX)) return false;
    return !e.closest("mjx-assistive-mml, .visually-hidden, .headerlink");
}).map(e => e.outerHTML.slice(0, 120))"""
MATHS = """async () => {
    const wanted = document.querySelectorAll("article .math").length;
    if (wanted) await MathJax.startup.promise;
    return {wanted: wanted, done: document.querySelectorAll("article mjx-container").length,
            errors: document.querySelectorAll("mjx-merror").length};
}"""


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    path = browser.find()
    if path is None:
        pytest.fail("no Chromium found: `python tools/browser.py` installs one")
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield instance
        instance.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page_file", PAGES, ids=lambda p: str(p.relative_to(HTML)))
def test_page(chromium, page_file, width):
    page = chromium.new_page(viewport={"width": width, "height": 900})
    errors, requests = [], []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"failed: {request.url[:200]}"))
    page.on("request", lambda request: requests.append(request.url))
    try:
        page.goto(page_file.as_uri(), wait_until="load")
        maths = page.evaluate(MATHS)
        page.wait_for_timeout(300)  # late scripts
        images, too_wide = page.evaluate(IMAGES), page.evaluate(TOO_WIDE)
        scroll = page.evaluate("document.documentElement.scrollWidth")
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        name = "-".join(page_file.relative_to(HTML).with_suffix("").parts)
        page.screenshot(path=SCREENSHOTS / f"{name}-{width}.png", full_page=True)
    finally:
        page.close()
    assert not errors
    assert not [u[:200] for u in requests if not u.startswith(("file:", "data:", "blob:"))]
    assert [i for i in images if i["alt"] is None or i["width"] == 0] == []
    assert [i for i in images if i["article"] and not i["alt"].strip()] == [], "no alt text"
    assert maths["done"] >= maths["wanted"] and maths["errors"] == 0, maths
    assert scroll <= width and too_wide == [], f"wider than {width} pixels"


def test_first_page_sends_the_reader_on(chromium):
    page = chromium.new_page()
    page.goto(REDIRECT.as_uri())
    page.wait_for_url("**/book/index.html")
    page.close()


@pytest.mark.parametrize("page_file", PAGES, ids=lambda p: str(p.relative_to(HTML)))
def test_page_size(page_file):
    text = page_file.read_text(encoding="utf-8")
    shown = [p for p in HTML.rglob("_images/*") if p.name in text]
    assert len(text.encode()) + sum(p.stat().st_size for p in shown) <= MAX_PAGE
