"""Firefox, driven over a websocket by WebDriver BiDi (https://w3c.github.io/webdriver-bidi)."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import select
import shutil
import socket
import struct
import subprocess
import time
import unittest
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.browser import Browser, Tab, outside

__all__ = ["FIREFOX", "Firefox"]

FIREFOX = next((path for name in ("firefox-esr", "firefox") if (path := shutil.which(name))), None)


# No name is resolved.
_PREFERENCES = {"network.dns.disabled": True, "network.captive-portal-service.enabled": False}
# The code points of WebDriver for keys without a character.
_KEYS = {
    "Tab": "\ue004",
    "Enter": "\ue007",
    "End": "\ue010",
    "Home": "\ue011",
    "ArrowLeft": "\ue012",
    "ArrowUp": "\ue013",
    "ArrowRight": "\ue014",
    "ArrowDown": "\ue015",
}
_MASK = b"mask"
# What a page's policy forbids does not come to the console by itself.
_TELL = "addEventListener('securitypolicyviolation', event => console.error(event.violatedDirective, event.blockedURI));"


class _Websocket:
    """A client's end of a websocket (RFC 6455) for messages of text."""

    def __init__(self, host: str, port: int, path: str) -> None:
        self._socket = socket.create_connection((host, port), timeout=120)
        self._came = b""
        key = base64.b64encode(bytes(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self._came:
            self._receive_more()
        head, _, self._came = self._came.partition(b"\r\n\r\n")
        assert b" 101 " in head, head

    def send(self, text: str) -> None:
        """Send a message."""
        content = text.encode()
        size = len(content)
        # The shortest form of the length that holds it.
        if size < 126:
            head = struct.pack(">BB", 0x81, 0x80 | size)
        elif size < 1 << 16:
            head = struct.pack(">BBH", 0x81, 0x80 | 126, size)
        else:
            head = struct.pack(">BBQ", 0x81, 0x80 | 127, size)
        # A client has to mask, and Firefox takes no mask of zeros.
        masked = bytes(byte ^ mask for byte, mask in zip(content, itertools.cycle(_MASK), strict=False))
        self._socket.sendall(head + _MASK + masked)

    def receive(self, seconds: float) -> str:
        """Return the next message; a long one comes in several frames.

        Raises:
            TimeoutError: none has begun after so many seconds.
        """
        if not self._came and not select.select([self._socket], [], [], seconds)[0]:
            raise TimeoutError
        content, last = b"", False
        while not last:
            head, length = self._read(2)
            if length == 126:
                (length,) = struct.unpack(">H", self._read(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self._read(8))
            content += self._read(length)
            last = bool(head & 0x80)
        return content.decode()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _read(self, size: int) -> bytes:
        """Return the next bytes, once all of them have come."""
        while len(self._came) < size:
            self._receive_more()
        content, self._came = self._came[:size], self._came[size:]
        return content

    def _receive_more(self) -> None:
        part = self._socket.recv(1 << 16)
        assert part, "Firefox has closed the connection"
        self._came += part


class Firefox(Browser):
    """A running Firefox.

    Args:
        folder: where its profile is kept.
    """

    def __init__(self, folder: Path) -> None:
        assert FIREFOX is not None
        folder.mkdir(exist_ok=True)
        preferences = (f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in _PREFERENCES.items())
        (folder / "user.js").write_text("".join(preferences))
        command = [FIREFOX, "--headless", "--no-remote", "--profile", str(folder), "--remote-debugging-port=0"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._number = 0
        self.events: list[dict[str, Any]] = []
        try:
            self._socket = _Websocket(*self._address(folder / "WebDriverBiDiServer.json"), "/session")
            self.call("session.new", {"capabilities": {}})
            self.call("session.subscribe", {"events": ["log.entryAdded", "network.beforeRequestSent"]})
        except BaseException:
            self.process.kill()
            raise

    def _address(self, file: Path) -> tuple[str, int]:
        """Return host and port, which Firefox writes into its profile."""
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError, ValueError):
                content = json.loads(file.read_text())
                return content["ws_host"], content["ws_port"]
            assert self.process.poll() is None, "Firefox ended"
            assert time.monotonic() < end, "Firefox does not answer"
            time.sleep(0.05)

    def close(self) -> None:
        """End the browser."""
        try:
            self.call("browser.close")
            self.process.wait(timeout=20)
        finally:
            self.process.kill()
            self.process.wait()
            self._socket.close()

    def call(self, method: str, parameters: Mapping[str, Any] | None = None, *, seconds: float = 120) -> dict[str, Any]:
        """Call a method of the protocol and return its result.

        Raises:
            TimeoutError: no message has come for so many seconds.
        """
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters or {}}))
        try:
            while (message := json.loads(self._socket.receive(seconds))).get("id") != self._number:
                if message["type"] == "event":
                    self.events.append(message)
        except TimeoutError:
            raise TimeoutError(f"Firefox did not answer {method} in {seconds:g} seconds") from None
        assert message["type"] == "success", message
        result: dict[str, Any] = message["result"]
        return result

    @contextlib.contextmanager
    def tab(
        self, *, width: int = 1280, height: int = 900, script: str = "", media: tuple[str, str] | None = None
    ) -> Iterator[FirefoxTab]:
        """Give a tab of its own, closed at the end."""
        if media:
            raise unittest.SkipTest("WebDriver BiDi sets no media features")  # pytest takes it as its own
        tab = FirefoxTab(self, width, height, script)
        try:
            yield tab
        finally:
            tab.close()


class FirefoxTab(Tab):
    """A tab of Firefox.

    Args:
        browser: the browser.
        width: of its window, in pixels.
        height: of its window.
        script: runs before those of each page.
    """

    def __init__(self, browser: Firefox, width: int, height: int, script: str) -> None:
        self._browser = browser
        self._viewport = {"width": width, "height": height}
        self._script = f"() => {{ {_TELL} {script} }}"
        self._context = self._create()

    def _create(self) -> str:
        """Open a window and return its name in the protocol."""
        # A window of its own, as timers of a hidden tab are slowed down.
        context: str = self._browser.call("browsingContext.create", {"type": "window"})["context"]
        self._browser.call("browsingContext.setViewport", {"context": context, "viewport": self._viewport, "devicePixelRatio": 1})
        self._browser.call("script.addPreloadScript", {"functionDeclaration": self._script, "contexts": [context]})
        return context

    def close(self) -> None:
        """Close the window."""
        self._browser.call("browsingContext.close", {"context": self._context})

    def navigate(self, address: str) -> None:
        """Go to an address.

        On a busy machine about one window in a hundred gets no process that answers once it has left about:blank, while other windows
        are fine. The address is opened in another one then.

        Raises:
            TimeoutError: three windows answer nothing.
        """
        for last in (False, False, True):
            self._browser.call("browsingContext.navigate", {"context": self._context, "url": address, "wait": "complete"})
            try:
                self._browser.call("script.evaluate", self._evaluation("0"), seconds=20)
                return
            except TimeoutError:
                if last:
                    raise
            self.close()
            self._context = self._create()

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, a promise's once it is kept."""
        answer = self._browser.call("script.evaluate", self._evaluation(expression))
        assert answer["type"] == "success", answer
        return _value(answer["result"])

    def _evaluation(self, expression: str) -> dict[str, Any]:
        return {"expression": expression, "target": {"context": self._context}, "awaitPromise": True}

    def press(self, *keys: str) -> None:
        """Press keys one after the other: letters, and names such as ArrowLeft."""
        actions = [{"type": kind, "value": _KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self._perform({"type": "key", "id": "keyboard", "actions": actions})

    def click_at(self, x: float, y: float) -> None:
        """Click a point of the window."""
        move = {"type": "pointerMove", "x": round(x), "y": round(y)}
        actions = [move, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._perform({"type": "pointer", "id": "mouse", "actions": actions})

    def _perform(self, source: dict[str, Any]) -> None:
        self._browser.call("input.performActions", {"context": self._context, "actions": [source]})

    def screenshot(self) -> bytes:
        """Return a PNG of the whole page."""
        picture = self._browser.call("browsingContext.captureScreenshot", {"context": self._context, "origin": "document"})
        return base64.b64decode(picture["data"])

    def complaints(self) -> list[str]:
        """Return what came to the console, exceptions, and addresses asked for beside the page's own."""
        found = []
        for event in self._browser.events:
            parameters = event["params"]
            match event["method"]:
                case "log.entryAdded" if parameters["source"].get("context") == self._context:
                    found.append(json.dumps(parameters))
                case "network.beforeRequestSent" if parameters["context"] == self._context:
                    address = parameters["request"]["url"]
                    found += [address] if outside(address) else []
        return found


def _value(remote: dict[str, Any]) -> Any:
    """Return a value of the protocol as Python's."""
    value = remote.get("value")
    match remote["type"]:
        case "array":
            return [_value(item) for item in value or ()]
        case "object":
            return {name: _value(item) for name, item in value or ()}
        case "number":
            return float(value) if isinstance(value, str) else value  # "NaN", "-0", "Infinity"
        case _:
            return value
