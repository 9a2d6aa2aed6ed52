"""Coordination of progress bars with other output: while a bar is shown, everything else is printed above it.

Separate from `picogpt.cli.bar`, so that printing a line does not import tqdm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

__all__ = ["Bar", "above_bar", "hide_bar", "show_bar"]


# A protocol, as the implementation imports this module.
class Bar(Protocol):
    """A progress bar that can be cleared for a line of text."""

    def cleared(self) -> contextlib.AbstractContextManager[None]:
        """Erase the bar, block redraws from any thread, and draw the bar again at the end."""


_bars: list[Bar] = []  # bars on the screen; a download can start while training shows its own


def show_bar(bar: Bar) -> None:
    """Clear `bar` before each line that is printed from now on."""
    _bars.append(bar)


def hide_bar(bar: Bar) -> None:
    """Stop clearing `bar`; nothing happens if it is not shown."""
    with contextlib.suppress(ValueError):  # a bar may be closed twice
        _bars.remove(bar)


@contextlib.contextmanager
def above_bar() -> Iterator[None]:
    """Clear all bars while the body prints to stdout or stderr."""
    with contextlib.ExitStack() as stack:
        # The oldest bar is entered last, and so drawn again first.
        for bar in reversed(_bars):
            stack.enter_context(bar.cleared())
        yield
