"""Generated text on a terminal, each character shaded by its probability."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from picogpt.inference.prompts import Character

__all__ = ["LEGEND", "can_shade", "shade"]

# Lower bounds of probability and their styles (SGR): dark blue for a likely character, underlined for one below 5 %. Foreground
# and background are both set, so that text has a contrast of at least 4.5 whatever the terminal's own colours.
_STYLES = (
    (0.75, "48;5;25;38;5;231"),
    (0.5, "48;5;68;38;5;16"),
    (0.25, "48;5;111;38;5;16"),
    (0.05, "48;5;153;38;5;16"),
    (0.0, "4"),
)
LEGEND = "shaded by probability: underlined below 5 %, then darker from 5, 25, 50 and 75 %"
"""Explanation of the styles."""


def can_shade(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal that shows colours and its user wants them (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def shade(characters: Iterable[Character]) -> str:
    """Return the text with escape sequences; every shade ends within it."""
    # Neighbours of the same style share a sequence. A newline has none, as it would colour the rest of its line.
    runs = itertools.groupby(characters, lambda character: "" if character.text == "\n" else _style(character.probability))
    return "".join(_styled(style, "".join(character.text for character in run)) for style, run in runs)


def _style(probability: float) -> str:
    return next(style for bound, style in _STYLES if probability >= bound)


def _styled(style: str, text: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if style else text
