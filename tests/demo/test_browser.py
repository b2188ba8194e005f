"""The page in headless Chromium: a click makes the images, nothing fails, and no other host is asked.

    pip install playwright && playwright install chromium
    pytest -m slow tests/demo/test_browser.py

`CHROMIUM=/path/to/chromium` uses another Chromium than that of Playwright.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from helpers.demo import demo_run, serve_demo

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    run, dense = demo_run(tmp_path_factory.mktemp("browser"))
    with serve_demo(run, dense) as (_, address):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: run `playwright install chromium`, or set CHROMIUM ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


def test_a_click_makes_the_images(url: str, browser, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    problems: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    # The page itself ends the stream of events when it has all
    page.on("requestfailed", lambda request: problems.append(f"{request.url} failed: {request.failure}"))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(url)
    page.get_by_role("button", name="Draw").click()
    page.wait_for_selector("text=PSNR", timeout=60_000)
    images = "Array.from(document.querySelectorAll('img')).filter(image => image.naturalWidth > 100).length"
    page.wait_for_function(f"{images} >= 4")  # dense, pruned, difference, widths
    problems = [problem for problem in problems if not re.search(r"queue/data\?.*ERR_ABORTED", problem)]
    assert problems == [] and hosts <= {urlsplit(url).netloc, ""}
    page.screenshot(path=os.environ.get("SCREENSHOT", tmp_path / "page.png"), full_page=True)
