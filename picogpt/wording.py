"""Small pieces of the sentences that the commands print."""

from __future__ import annotations

__all__ = ["plural"]


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """A count and what is counted: `1 character`, `2,000 characters`.

    Args:
        count: how many.
        noun: the word for one of them.
        nouns: the word for several, where it is more than an `s` at the end.
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
