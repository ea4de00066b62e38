"""Opens a page in a headless Chromium and uses it as a person would: keys, clicks, screenshots.

Chromium's DevTools protocol over a pipe: JSON messages that end in a zero byte. Nothing but Chromium is needed.
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

KEYS = {"Enter": "\r", " ": " "}  # what they write; others write nothing
CODES = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
         " ": 32, "Home": 36, "End": 35}  # fmt: skip


def find_chromium() -> str | None:
    """The path of a Chromium that is installed here."""
    return next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


class Browser:
    """One page. `messages` are errors and warnings of its script, `requests` the addresses that it asked for."""

    def __init__(self, chromium: str, width: int = 1280, height: int = 900):
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.number = 0
        self.folder = tempfile.TemporaryDirectory(prefix="chromium-")
        ours, theirs = os.pipe(), os.pipe()  # what it reads as file 3, and what it writes as file 4

        def connect() -> None:
            copies = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ours[0], theirs[1])]  # out of the way of 3 and 4
            for number, copy in enumerate(copies, 3):
                os.dup2(copy, number)

        command = [chromium, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
                   "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
                   f"--user-data-dir={self.folder.name}", "about:blank"]  # fmt: skip
        self.process = subprocess.Popen(command, preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)  # fmt: skip
        os.close(ours[0])
        os.close(theirs[1])
        self.sends, self.answers, self.buffer = ours[1], theirs[0], b""
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Network"):
            self.call(f"{part}.enable")
        self.resize(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.sends)
        os.close(self.answers)
        self.process.kill()
        self.process.wait()
        for _ in range(50):  # its children may still write
            try:
                self.folder.cleanup()
                return
            except OSError:
                time.sleep(0.1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method. RuntimeError where Chromium refuses it, or ends."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.sends, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            if not (piece := os.read(self.answers, 1 << 16)):
                raise RuntimeError("Chromium has ended")
            self.buffer += piece
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        event, given = message.get("method"), message.get("params", {})
        if event == "Runtime.exceptionThrown":
            details = given["exceptionDetails"]
            self.messages.append(str(details.get("exception", {}).get("description", details["text"])))
        elif event == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
            self.messages.append(str(given["args"]))
        elif event == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        return message

    def open(self, path: Path, at: str = "") -> None:
        self.call("Page.navigate", url=path.resolve().as_uri() + at)
        self.wait("document.readyState === 'complete' && !!document.querySelector('#panel h2')")

    def wait(self, script: str, seconds: float = 60) -> None:
        """Until an expression is true. TimeoutError where it does not become so."""
        end = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > end:
                raise TimeoutError(f"not true after {seconds:g} s: {script}")
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript. RuntimeError where it throws."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def press(self, *keys: str) -> None:
        for key in keys:
            about = {"key": key, "code": key, "windowsVirtualKeyCode": CODES[key]}
            self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": KEYS[key]} if key in KEYS else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, selector: str) -> None:
        """A click in the middle of an element, after it has come into view."""
        x, y = self.run(f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: "center"}}); const r = e.getBoundingClientRect();
            return [r.x + r.width / 2, r.y + r.height / 2]; }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def prefer(self, scheme: str) -> None:
        """scheme: "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def resize(self, width: int, height: int, scale: float = 1, phone: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=phone)  # fmt: skip

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
