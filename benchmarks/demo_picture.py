"""Take the picture of the demo page for README and guide, docs/pictures/demo.png.

    python benchmarks/demo_picture.py --run runs/digits-gfpruned --reference training/digits/teacher

The page is opened in headless Chromium, and the images are drawn by a click, as users do. Needs the extra `demo`, Playwright
(`pip install playwright && playwright install chromium`), and a run such as that of `make prune`. `CHROMIUM=/path/to/chromium`
uses another Chromium. Times on the picture are of one call: take it on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from diffusers_gfprune.demo.models import load_models

SIZE = {"width": 1280, "height": 1080}


def take(url: str, path: Path) -> None:
    """Draw images on the page at `url`, and write a PNG of what is seen then."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.goto(url)
        for _ in range(2):  # the first call of a model is often slower
            page.get_by_role("button", name="Draw").click()
            page.wait_for_selector("text=PSNR", timeout=600_000)
            page.wait_for_timeout(3000)
        page.screenshot(path=path)
        browser.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Take the picture of the demo page.", allow_abbrev=False)
    parser.add_argument("--run", default="runs/digits-gfpruned", help="the pruned pipeline")
    parser.add_argument("--reference", default="training/digits/teacher", help="the dense pipeline")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/demo.png"), help="PNG file")
    args = parser.parse_args()
    from diffusers_gfprune.demo.page import launch, make_page  # importing gradio takes seconds

    args.output.parent.mkdir(parents=True, exist_ok=True)
    page = make_page(load_models(args.run, args.reference))
    launch(page, block=False)
    take(page.local_url, args.output)
    page.close()


if __name__ == "__main__":
    main()
