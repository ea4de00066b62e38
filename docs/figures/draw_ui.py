"""Draws ui.png: the page of `minit2v ui` with some videos, in a headless Chromium. It needs Gradio and Chromium."""

import sys
import tempfile
from pathlib import Path

from minit2v.ui.page import serve
from minit2v.ui.work import Work

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "explorer"))
from browser import Browser, find_chromium  # noqa: E402

PROMPTS = ("a green triangle moving up", "a yellow circle shrinking", "a blue square growing",
           "a red circle moving right")  # fmt: skip


def draw(path: Path) -> None:
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("no Chromium is installed here")
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder) / "videos", loras=["style.safetensors"], device="cpu")
        for seed, prompt in enumerate(PROMPTS):
            for _ in work.make({"command": "generate", "prompt": prompt, "seed": seed, "steps": 20}):
                pass
        with serve(work, "127.0.0.1", 0) as address, Browser(chromium, 1200, 1280) as window:
            window.call("Page.navigate", url=address)
            window.wait("document.querySelectorAll('#gallery button').length > 3")
            window.click("#gallery button")
            window.wait("!document.querySelector('#again').disabled")
            window.click("#again")
            window.wait("document.querySelector('#seed textarea, #seed input').value === '3'")
            window.wait("(v => v && v.currentTime > 0.4)(document.querySelector('#video video'))")
            window.run("document.querySelector('#video video').pause()")
            window.run("window.scrollTo(0, 0)")
            window.screenshot(path)


if __name__ == "__main__":
    draw(HERE / "ui.png")
