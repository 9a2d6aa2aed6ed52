"""Where windows begin and end."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picogpt.model.roll import window_spans


@pytest.mark.parametrize("n", [1, 7, 16, 17, 32, 53, 160])
def test_spans_of_the_vectors(roll_vectors: dict[str, npt.NDArray[Any]], n: int) -> None:
    """The spans are the original's, remainder first."""
    assert window_spans(n, 16) == [tuple(span) for span in roll_vectors[f"spans/{n}"]]


def test_by_hand() -> None:
    """300 characters in windows of 128: 300 - 2 x 128 = 44 first, then two full ones."""
    assert window_spans(300, 128) == [(0, 44), (44, 172), (172, 300)]


@given(st.integers(1, 2000), st.integers(1, 200))
def test_spans_cover_the_text(n_chars: int, context_len: int) -> None:
    """Every character is in exactly one window, and all windows but the first are full."""
    spans = window_spans(n_chars, context_len)

    assert [i for start, end in spans for i in range(start, end)] == list(range(n_chars))
    assert all(end - start == context_len for start, end in spans[1:])
    assert 1 <= spans[0][1] <= context_len
