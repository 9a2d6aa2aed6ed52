"""Lines for the user: small pieces of sentences, and how library code hands a line to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Notify", "plural", "say_nothing"]

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
