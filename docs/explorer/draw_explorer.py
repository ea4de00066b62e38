"""Makes the pages of docs/explorer, and with a Chromium the screenshots in docs/figures.

    python docs/explorer/draw_explorer.py                 the pages
    python docs/explorer/draw_explorer.py --screenshots   and the screenshots
"""

import sys
import tempfile
from pathlib import Path

from browser import Browser, find_chromium

from minit2v.cli import main
from minit2v.explorer.page import make_page
from minit2v.explorer.trace import trace_model

HERE = Path(__file__).parent
FIGURES = HERE.parent / "figures"
PAGES = {  # file -> (title, arguments of trace_model)
    "modelscope.html": ("ModelScope", ("ms-1.7b",)),
    "animatediff.html": ("AnimateDiff: Stable Diffusion 1.5 with motion modules v1-5-2", ("sd-1.5", "motion-v1-5-2")),
}


def draw(name: str) -> str:
    """The HTML of one of the pages."""
    title, arguments = PAGES[name]
    traced = trace_model(*arguments)
    traced.title = title
    return make_page(traced)


def take_screenshots(chromium: str) -> None:
    """ModelScope's page in light with a block chosen by keyboard; the embedded model's in dark with attention maps."""
    with tempfile.TemporaryDirectory() as folder, Browser(chromium, 1240, 860) as browser:
        browser.prefer("light")
        browser.open(HERE / "modelscope.html", "#unet.temporal_in")
        browser.run("boxOf(chosen).focus()")
        browser.press("ArrowDown")
        browser.run("scrollTo(0, 0)")
        browser.screenshot(FIGURES / "explorer-light.png")
        page = Path(folder) / "shapes.html"
        if main(["trace", "shapes", "-o", str(page), "--steps", "20"]):
            raise SystemExit(1)
        browser.prefer("dark")
        browser.open(page, "#unet.up.0.blocks.0.spatial")
        browser.run("panel.scrollTo(0, 330)")
        browser.screenshot(FIGURES / "explorer-dark.png")
        if browser.messages:
            raise RuntimeError("\n".join(browser.messages))


if __name__ == "__main__":
    for name in PAGES:
        (HERE / name).write_text(draw(name), encoding="utf-8")
        print(HERE / name)
    if "--screenshots" in sys.argv:
        if (chromium := find_chromium()) is None:
            raise SystemExit("the screenshots need a Chromium: none is installed here")
        take_screenshots(chromium)
