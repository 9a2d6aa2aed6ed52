"""Which sequences are scored, and the arithmetic of means and their standard errors."""

from __future__ import annotations

import numpy as np
import pytest

from picogpt.errors import DataError
from picogpt.evaluation.scores import EvalSequences, Scores, cut_sequences, cut_stretches, position_bins


def text(n_chars: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Ids that tell their place."""
    return (np.arange(n_chars) % 75).astype(np.uint8)


@pytest.mark.parametrize(("n_chars", "lengths"), [(801, [41] * 20), (1601, [81] * 20), (3235, [161] * 20 + [35])])
def test_stretches(n_chars: int, lengths: list[int]) -> None:
    """Up to four sequences of 40 long, as many as leave twenty of them; together they predict each character once."""
    ids = text(n_chars)
    stretches = cut_stretches(ids, 40)
    whole = [length for length in lengths if length > 40]

    assert [len(stretch) for stretch in stretches] == whole
    np.testing.assert_array_equal(np.concatenate([s[1:] for s in stretches]), ids[1 : sum(whole) - len(whole) + 1])


def test_sequences_of_articles() -> None:
    """Whole sequences from each beginning on, each with the character after it; what is too short is left out."""
    articles = [text(21) + 0, text(9), text(12) + 100, text(31) + 150]
    sequences = cut_sequences(articles, 10, 1000)

    assert sequences.article_of.tolist() == [0, 0, 1, 2, 2, 2]
    assert sequences.ids[:, 0].tolist() == [0, 10, 100, 150, 160, 170]
    assert sequences.ids.shape == (6, 11)
    assert (sequences.n_articles, sequences.n_chars) == (3, 60)


def test_cap_is_spread_evenly() -> None:
    """Of more text than is asked for, sequences from the first one to the last."""
    sequences = cut_sequences([text(101), text(901)], 10, 50)

    assert sequences.article_of.tolist() == [0, 1, 1, 1, 1]
    assert len(cut_sequences([text(101), text(901)], 10, 1).ids) == 2


def test_too_short() -> None:
    """One article, or stretch, has no standard error and no other article."""
    message = (
        r"too short to evaluate: two articles of at least 11 characters are needed \(the longest has 30\), or a text of 21; "
        "give more text, or fewer --windows"
    )
    with pytest.raises(DataError, match=message):
        cut_sequences([text(30), text(10)], 10, 1000)
    with pytest.raises(DataError, match="the longest has 0"):
        cut_sequences([], 10, 1000)


def test_partners() -> None:
    """A sequence of the next article, at the same place where there is one."""
    sequences = EvalSequences(np.zeros((6, 3), np.uint8), np.array([0, 0, 0, 1, 2, 2]))

    assert sequences.partners().tolist() == [3, 3, 3, 4, 0, 1]


def test_position_bins() -> None:
    """Doubling ranges without a gap, to the end of the window."""
    assert position_bins(8) == [(1, 1), (2, 2), (3, 4), (5, 8)]
    assert position_bins(5) == [(1, 1), (2, 2), (3, 4), (5, 5)]
    assert position_bins(1) == [(1, 1)]
    assert position_bins(8, 2) == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8)]


def scores(*means: float, articles: list[int]) -> Scores:
    """Sequences of two windows of three characters, every loss of a sequence the same, and 0.5 less without its context."""
    losses = np.repeat(np.array(means, np.float32), 6).reshape(-1, 2, 3)
    return Scores({"as_is": losses, "zeroed": losses + np.float32(0.5)}, np.array(articles))


def test_standard_error_by_hand() -> None:
    """Two articles with losses 1 and 3: 2 +- 1, as sqrt(2) / sqrt(2); in bits 2.885 +- 1.443."""
    estimate = scores(1, 3, articles=[0, 1]).mean("as_is")

    assert (estimate.nats, estimate.error) == pytest.approx((2, 1))
    assert (estimate.bits, estimate.bits_error) == pytest.approx((2.88539, 1.442695))


def test_articles_count_by_their_characters() -> None:
    """An article of three sequences weighs three times as much, and its sequences are one sample: 2.5 +- 0.75 by the formula."""
    estimate = scores(1, 3, 3, 3, articles=[0, 1, 1, 1]).mean("as_is")

    # A = 2, n = 6 and 18, deviations 6 - 15 = -9 and 54 - 45 = 9: sqrt(2 x 162) / 24.
    assert (estimate.nats, estimate.error) == pytest.approx((2.5, 0.75))


def test_differences_are_paired() -> None:
    """What differs by the same everywhere differs for certain, however much the articles do."""
    difference = scores(1, 3, 8, articles=[0, 1, 2]).mean("zeroed", minus="as_is")

    assert (difference.nats, difference.error) == pytest.approx((0.5, 0.0))


def test_parts() -> None:
    """By window over all positions; by position over the windows after the first."""
    losses = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    both = Scores({"as_is": losses}, np.array([0, 1]))

    assert [estimate.nats for estimate in both.by_window("as_is")] == [4, 7]
    assert [estimate.nats for estimate in both.by_position("as_is", [(1, 1), (2, 3)])] == [6, 7.5]
    assert both.mean("as_is", first_window=1).nats == 7
