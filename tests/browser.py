"""Chromium without a window, spoken to over pipes by its DevTools protocol: what a page says, shows and does.

    python tests/browser.py PAGE.html...    looks at pages on a phone and on a desk

The protocol: https://chromedevtools.github.io/devtools-protocol; over pipes 3 and 4, messages end with a zero byte.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["CHROMIUM", "DESK", "PHONE", "Browser", "open_browser", "what_is_wrong"]

PHONE, DESK = (390, 844), (1440, 900)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--hide-scrollbars",
)
# Gives the pipes the numbers that the browser reads from and writes to, whatever numbers they had.
_WITH_PIPES = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(word), fcntl.F_DUPFD, 10) for word in sys.argv[1:3]]
for number, pipe in zip((3, 4), pipes):
    os.dup2(pipe, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page of a browser, with everything that it has complained about."""

    def __init__(self, process: "subprocess.Popen[bytes]", read: int, write: int) -> None:
        self._process, self._read, self._write = process, read, write
        self._number, self._rest = 0, b""
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what a method of the protocol returns. Raises RuntimeError: the browser refuses, or has ended."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._events.append(answer)

    def open(self, page: Path, size: tuple[int, int], *, dark: bool = False) -> None:
        """Load a page at a size in pixels, and forget what the one before has complained about."""
        self._events.clear()
        is_phone = size[0] < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=is_phone
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._events.append(self._receive())

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page. Raises RuntimeError: it throws."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """Move the mouse to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        """Click at a place in the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press a key, such as ArrowRight."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def center_of(self, selector: str) -> tuple[float, float]:
        """Return the middle of the first element that a selector finds, once it is in view."""
        found = f"document.querySelector({selector!r})"
        self.run(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.run(
            f"(() => {{ const b = {found}.getBoundingClientRect(); return [b.x, b.y, b.width, b.height] }})()"
        )
        return box[0] + box[2] / 2, box[1] + box[3] / 2

    @property
    def complaints(self) -> list[str]:
        """What the page wrote to the console, threw, or could not load."""
        self.run("0")  # What was said before this has arrived.
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self._events if event.get("method") in kinds]

    def picture(self, out: Path) -> None:
        """Write a PNG of the whole page."""
        made = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        out.write_bytes(base64.b64decode(made["data"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError(f"the browser has ended ({self._process.poll()})")
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)


@contextmanager
def open_browser() -> Generator[Browser]:
    """Start a browser. Raises RuntimeError: there is none."""
    if CHROMIUM is None:
        raise RuntimeError("there is no chromium: install your system's chromium, or Chrome")
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [sys.executable, "-c", _WITH_PIPES, str(to_browser[0]), str(from_browser[1])]
        process = subprocess.Popen(
            [*words, CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser[0], from_browser[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            browser = Browser(process, from_browser[0], to_browser[1])
            yield browser
            with suppress(RuntimeError, BrokenPipeError):
                browser.call("Browser.close")
        finally:
            process.terminate()
            process.wait()
            os.close(from_browser[0])
            os.close(to_browser[1])


_WIDER = """
[...document.querySelectorAll("body *")]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, .unseen, .readout"))
  .slice(0, 3).map((e) => `${e.tagName}.${e.getAttribute("class")}`)
"""


def what_is_wrong(browser: Browser, page: Path, size: tuple[int, int], *, dark: bool = False) -> list[str]:
    """Open a page and list what is wrong: complaints, horizontal scrolling, pictures without words."""
    browser.open(page, size, dark=dark)
    found = list(browser.complaints)
    if (width := browser.run("document.documentElement.scrollWidth")) > size[0]:
        found.append(f"scrolls sideways: {width} of {size[0]} pixels; {browser.run(_WIDER)}")
    unnamed = (
        "[...document.querySelectorAll('img:not([alt]), svg[role=img]:not([aria-label]), canvas:not([aria-label])')]"
    )
    if num := browser.run(f"{unnamed}.length"):
        found.append(f"{num} pictures without words")
    return found


def main(pages: list[str]) -> int:
    """Look at pages; return the exit code."""
    wrong = 0
    with open_browser() as browser:
        for page in map(Path, pages):
            for size in (PHONE, DESK):
                for dark in (False, True):
                    found = what_is_wrong(browser, page, size, dark=dark)
                    wrong += len(found)
                    shade = "dark" if dark else "light"
                    print(f"{page} at {size[0]}, {shade}: {'; '.join(found) or 'nothing is wrong'}")
                    browser.picture(page.with_name(f"{page.stem}-{size[0]}-{shade}.png"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
