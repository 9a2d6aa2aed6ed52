"""The terminal's last line: while a progress bar stands there, everything else is printed above it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

__all__ = ["Bar", "above_bar", "hide_bar", "show_bar"]


class Bar(Protocol):
    """A progress bar that can give way to a line of text."""

    def cleared(self) -> contextlib.AbstractContextManager[None]:
        """Erase the bar, hold it back from being redrawn by any thread, and draw it again at the end."""


_bars: list[Bar] = []


def show_bar(bar: Bar) -> None:
    """Have `bar` cleared before each line that is printed from now on."""
    _bars.append(bar)


def hide_bar(bar: Bar) -> None:
    """Forget `bar`; a bar that is not shown is no error."""
    with contextlib.suppress(ValueError):
        _bars.remove(bar)


@contextlib.contextmanager
def above_bar() -> Iterator[None]:
    """Print within this, to stdout or stderr, and no remains of a bar stand beside or under the text."""
    with contextlib.ExitStack() as stack:
        for bar in reversed(_bars):
            stack.enter_context(bar.cleared())
        yield
