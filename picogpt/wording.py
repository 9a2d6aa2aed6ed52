"""Lines for the user: small pieces of sentences, and how library code hands a line to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

__all__ = ["Notify", "format_bytes", "format_passes", "format_seconds", "plural", "say_nothing"]

Notify = Callable[[str], None]
"""Takes a line about the work, to print it on stderr for instance."""


def say_nothing(_: str) -> None:
    """The `Notify` of callers that show nothing."""


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """A count and what is counted: `1 character`, `2,000 characters`.

    Args:
        count: how many.
        noun: the word for one of them.
        nouns: the word for several, where it is more than an `s` at the end.
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def format_passes(passes: float) -> str:
    """So many passes over the text, with a digit after the point below 10."""
    number = f"{passes:,.0f}" if passes >= 9.95 else f"{passes:.1f}" if passes >= 0.095 else f"{passes:.2g}"
    return f"{number} pass{'' if number == '1' else 'es'} over the text"


def format_bytes(number: int) -> str:
    """In megabytes, or gigabytes from one on."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds, with days before them where there are any."""
    return str(timedelta(seconds=round(seconds)))
