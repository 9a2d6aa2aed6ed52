"""Formatting for messages, and the type of the callback through which library code prints them.

Library code never prints: it calls `notify`, so that a command can print a line above its progress bar, and a Python program can
show it in its own way.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from datetime import timedelta

__all__ = ["Notify", "did_you_mean", "format_bytes", "format_passes", "format_seconds", "plural", "say_nothing"]

Notify = Callable[[str], None]
"""Callback for a line about the work, for example to print it on stderr."""


def say_nothing(_: str) -> None:
    """Ignore the line: the `Notify` of callers that show nothing."""


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Format a count with its noun: `1 character`, `2,000 characters`.

    Args:
        count: the number.
        noun: the singular.
        nouns: the plural, if it is not the singular with an `s`.
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question that names the most similar of the `known` names, or nothing: a wrong suggestion is worse than none."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {nearest[0]}?" if nearest else ""


def format_passes(passes: float) -> str:
    """Format a number of passes over the text: with a decimal below 10, and two significant digits below 0.1."""
    # The limits are those of rounding: 9.95 would become 10.0, and 0.095 becomes 0.1.
    number = f"{passes:,.0f}" if passes >= 9.95 else f"{passes:.1f}" if passes >= 0.095 else f"{passes:.2g}"
    # By the text and not by the number: 1.0 is printed as "1.0 passes".
    return f"{number} pass{'' if number == '1' else 'es'} over the text"


def format_bytes(number: int) -> str:
    """Format a size in megabytes, or in gigabytes from 1 GB on."""
    # Powers of ten, as disks and networks are sold and measured.
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def format_seconds(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds, preceded by days if there are any."""
    # timedelta prints exactly this form, but it ends at a billion days.
    days, rest = divmod(round(seconds), 86_400)
    return (f"{plural(days, 'day')}, " if days else "") + str(timedelta(seconds=rest))
