"""Window bounds of the context roll: where each window of a text begins and ends. Pure arithmetic, no tensors."""

from __future__ import annotations

import itertools

__all__ = ["window_spans"]


def window_spans(n_chars: int, context_len: int) -> list[tuple[int, int]]:
    """Cut a text of `n_chars` characters into windows of `context_len`; the first window takes the remainder.

    Window i starts from the context vector of window i - 1; the first one starts from the zero vector.

    Args:
        n_chars: length of the text in characters, at least 1.
        context_len: length of a full window in characters.

    Returns:
        (start, end) of each window, in order, together covering 0..n_chars exactly once.
    """
    assert n_chars >= 1, n_chars
    # n_chars modulo context_len, but a full window instead of an empty one. The short window comes first, so that the
    # last window, whose outputs matter most, is always full.
    first_end = (n_chars - 1) % context_len + 1
    bounds = [0, *range(first_end, n_chars + 1, context_len)]
    return list(itertools.pairwise(bounds))
