"""A real browser without a window, where there is one: it opens a page from its file, with the network cut off.

`open_page` gives back what a page became; `Browser` works it as a reader does, by keys and clicks.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

_FLAGS = ("--headless=new", "--disable-gpu", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND")
_KEY_CODES = {
    "Enter": 13,
    "Tab": 9,
    " ": 32,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}
_KEY_TEXTS = {"Enter": "\r", " ": " "}


def _command(profile: Path) -> list[str]:
    assert CHROMIUM is not None
    # The sandbox refuses to run as root.
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return [CHROMIUM, *_FLAGS, *root, f"--user-data-dir={profile}"]


def open_page(page: Path, tmp_path: Path, *, fragment: str = "", script_milliseconds: int = 2000) -> tuple[str, list[str]]:
    """Open a page from `file://` with the network cut off.

    Returns:
        The document as it stands after so long, and what came to the console.
    """
    command = [*_command(tmp_path / "browser"), "--enable-logging=stderr", f"--virtual-time-budget={script_milliseconds}"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri() + fragment], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


class Browser:
    """A running Chromium, driven over two pipes by the DevTools protocol.

    Args:
        folder: where its profile is kept.
    """

    def __init__(self, folder: Path) -> None:
        read_end, self._write = os.pipe()
        self._read, write_end = os.pipe()
        # Chromium reads its commands from file 3 and writes its answers to file 4.
        command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 0</dev/null 1>&2', "sh", *_command(folder), "--remote-debugging-pipe"]
        self._process = subprocess.Popen(command, stdin=read_end, stdout=write_end, stderr=subprocess.DEVNULL)
        os.close(read_end)
        os.close(write_end)
        self._pending = b""
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(self._write, b'{"id": 0, "method": "Browser.close"}\0')
        os.close(self._write)
        try:
            self._process.wait(timeout=20)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._read)

    def call(self, method: str, parameters: Mapping[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters or {}}
        if session:
            message["sessionId"] = session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._write, content) :]
        while self._number not in self._answers:
            self._receive()
        answer = self._answers.pop(self._number)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> None:
        part = os.read(self._read, 1 << 16)
        assert part, "the browser ended"
        *messages, self._pending = (self._pending + part).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self.events.append(message)

    @contextlib.contextmanager
    def tab(self, *, width: int = 1280, height: int = 900, script: str = "", reduced_motion: bool = False) -> Iterator[Tab]:
        """A tab of its own, closed at the end.

        Args:
            width: of its window, in pixels.
            height: of its window.
            script: runs before those of each page.
            reduced_motion: whether its reader has asked for less motion.
        """
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call("Page.addScriptToEvaluateOnNewDocument", {"source": script})
        tab.call(
            "Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        )
        motion = "reduce" if reduced_motion else "no-preference"
        tab.call("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-reduced-motion", "value": motion}]})
        try:
            yield tab
        finally:
            self.call("Target.closeTarget", {"targetId": target})


class Tab:
    """A tab of the browser.

    Args:
        browser: the browser.
        session: its name in the protocol.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call a method of the protocol in this tab."""
        return self._browser.call(method, parameters, self._session)

    def open(self, page: Path, fragment: str = "") -> None:
        """Go to a page, and wait until its scripts have run."""
        self.call("Page.navigate", {"url": "about:blank"})  # so that another fragment loads the page again
        self.call("Page.navigate", {"url": page.as_uri() + fragment})
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, a promise's once it is kept."""
        options = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """Return the text of an element."""
        content: str = self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")
        return content

    def press(self, *keys: str) -> None:
        """Press keys one after the other: letters, and names such as ArrowLeft."""
        for key in keys:
            text = _KEY_TEXTS.get(key, key if len(key) == 1 else "")
            event = {"key": key, "code": key, "windowsVirtualKeyCode": _KEY_CODES.get(key, 0)}
            self.call("Input.dispatchKeyEvent", {"type": "keyDown", "text": text, **event})
            self.call("Input.dispatchKeyEvent", {"type": "keyUp", **event})

    def click(self, selector: str) -> None:
        """Click the middle of an element that can be seen."""
        place = self.evaluate(
            f"(element => {{ element.scrollIntoView({{ block: 'center', behavior: 'instant' }}); const box = element.getBoundingClientRect();"
            f" return {{ x: box.x + box.width / 2, y: box.y + box.height / 2 }}; }})(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", {"type": kind, "button": "left", "clickCount": 1, **place})

    def set_value(self, selector: str, value: str) -> None:
        """Give a field a value, as if it had been typed."""
        self.evaluate(
            f"(field => {{ field.value = {json.dumps(value)}; for (const kind of ['input', 'change']) "
            f"field.dispatchEvent(new Event(kind, {{ bubbles: true }})); }})(document.querySelector({json.dumps(selector)}))"
        )

    def screenshot(self) -> bytes:
        """Return a PNG of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", {"captureBeyondViewport": True})["data"])

    def complaints(self) -> list[str]:
        """Return what came to the console, exceptions, and addresses asked for beside the page's own."""
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            parameters = event["params"]
            match event["method"]:
                case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                    found.append(json.dumps(parameters))
                case "Network.requestWillBeSent" if not parameters["request"]["url"].startswith(
                    ("file:", "blob:", "data:", "about:")
                ):
                    found.append(parameters["request"]["url"])
        return found
