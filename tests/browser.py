"""A real browser without a window, where there is one: it opens pages from their files, with the network cut off.

A browser gives tabs, and a tab is worked as a reader works it, by keys and clicks. `chromium.py` and `firefox.py` are the drivers.
"""

from __future__ import annotations

import abc
import json
import subprocess
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Browser", "Tab", "outside"]


class Browser(abc.ABC):
    """A running browser."""

    process: subprocess.Popen[bytes]

    @abc.abstractmethod
    def __init__(self, folder: Path) -> None:
        """Start the browser; its profile is kept in `folder`."""

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @abc.abstractmethod
    def close(self) -> None:
        """End the browser."""

    @abc.abstractmethod
    def tab(
        self, *, width: int = 1280, height: int = 900, script: str = "", media: tuple[str, str] | None = None
    ) -> AbstractContextManager[Tab]:
        """Return a tab of its own, closed at the end.

        Args:
            width: of its window, in pixels.
            height: of its window.
            script: runs before those of each page.
            media: a media feature and its value, such as prefers-reduced-motion and reduce.
        """


class Tab(abc.ABC):
    """A tab of a browser."""

    @abc.abstractmethod
    def navigate(self, address: str) -> None:
        """Go to an address."""

    @abc.abstractmethod
    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, a promise's once it is kept."""

    @abc.abstractmethod
    def press(self, *keys: str) -> None:
        """Press keys one after the other: letters, and names such as ArrowLeft."""

    @abc.abstractmethod
    def click_at(self, x: float, y: float) -> None:
        """Click a point of the window."""

    @abc.abstractmethod
    def screenshot(self) -> bytes:
        """Return a PNG of the whole page."""

    @abc.abstractmethod
    def complaints(self) -> Sequence[str]:
        """Return what came to the console, exceptions, and addresses asked for beside the page's own."""

    def open(self, page: Path, fragment: str = "") -> None:
        """Go to a page, and wait until its scripts have run."""
        self.navigate("about:blank")  # so that another fragment loads the page again
        self.navigate(page.as_uri() + fragment)
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")

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

    def click(self, selector: str) -> None:
        """Click the middle of an element that can be seen."""
        place = self.evaluate(
            f"(element => {{ element.scrollIntoView({{ block: 'center', behavior: 'instant' }}); const box = element.getBoundingClientRect();"
            f" return [box.x + box.width / 2, box.y + box.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        self.click_at(*place)

    def set_value(self, selector: str, value: str) -> None:
        """Give a field a value, as if it had been typed."""
        self.evaluate(
            f"(field => {{ field.value = {json.dumps(value)}; for (const kind of ['input', 'change']) "
            f"field.dispatchEvent(new Event(kind, {{ bubbles: true }})); }})(document.querySelector({json.dumps(selector)}))"
        )


def outside(address: str) -> bool:
    """Whether an address is not of the page's own."""
    return not address.startswith(("file:", "blob:", "data:", "about:"))
