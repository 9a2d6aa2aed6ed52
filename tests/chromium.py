"""Chromium, driven over two pipes by the DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.browser import Browser, Tab, outside

__all__ = ["CHROMIUM", "Chromium"]

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


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


class Chromium(Browser):
    """A running Chromium.

    Args:
        folder: where its profile is kept.
    """

    def __init__(self, folder: Path) -> None:
        read_end, self._write = os.pipe()
        self._read, write_end = os.pipe()
        # Chromium reads its commands from file 3 and writes its answers to file 4.
        command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 0</dev/null 1>&2', "sh", *_command(folder), "--remote-debugging-pipe"]
        self.process = subprocess.Popen(command, stdin=read_end, stdout=write_end, stderr=subprocess.DEVNULL)
        os.close(read_end)
        os.close(write_end)
        self._pending = b""
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(OSError):
            os.write(self._write, b'{"id": 0, "method": "Browser.close"}\0')
        os.close(self._write)
        try:
            self.process.wait(timeout=20)
        finally:
            self.process.kill()
            self.process.wait()
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
    def tab(
        self, *, width: int = 1280, height: int = 900, script: str = "", media: tuple[str, str] | None = None
    ) -> Iterator[ChromiumTab]:
        """Give a tab of its own, closed at the end."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        tab = ChromiumTab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call("Page.addScriptToEvaluateOnNewDocument", {"source": script})
        tab.call(
            "Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        )
        if media:
            tab.call("Emulation.setEmulatedMedia", {"features": [{"name": media[0], "value": media[1]}]})
        try:
            yield tab
        finally:
            self.call("Target.closeTarget", {"targetId": target})


class ChromiumTab(Tab):
    """A tab of Chromium.

    Args:
        browser: the browser.
        session: its name in the protocol.
    """

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call a method of the protocol in this tab."""
        return self._browser.call(method, parameters, self._session)

    def navigate(self, address: str) -> None:
        """Go to an address."""
        self.call("Page.navigate", {"url": address})

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, a promise's once it is kept."""
        options = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys one after the other: letters, and names such as ArrowLeft."""
        for key in keys:
            text = _KEY_TEXTS.get(key, key if len(key) == 1 else "")
            event = {"key": key, "code": key, "windowsVirtualKeyCode": _KEY_CODES.get(key, 0)}
            self.call("Input.dispatchKeyEvent", {"type": "keyDown", "text": text, **event})
            self.call("Input.dispatchKeyEvent", {"type": "keyUp", **event})

    def click_at(self, x: float, y: float) -> None:
        """Click a point of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", {"type": kind, "button": "left", "clickCount": 1, "x": x, "y": y})

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
                case "Network.requestWillBeSent" if outside(parameters["request"]["url"]):
                    found.append(parameters["request"]["url"])
        return found
