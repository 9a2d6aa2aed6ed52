"""Which rolls of a text are scored, and what their losses come to: means with standard errors over articles. No torch.

Dimensions: R rolls, W windows of a roll, n characters of a window, T = W x n characters of a roll.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from picogpt.errors import DataError

__all__ = ["CONDITIONS", "ROLLS_PER_STRETCH", "Estimate", "Rolls", "Scores", "cut_rolls", "cut_stretches", "position_bins"]

Ids = npt.NDArray[np.uint8]
Losses = npt.NDArray[np.float32]

CONDITIONS: Mapping[str, str] = {
    "as_is": "context vector as it is",
    "zeroed": "context vector zeroed",
    "other": "context vector of another article",
    "sliding": "no roll, windows overlap by half",
}
"""What a model is scored under, by short name."""

ROLLS_PER_STRETCH = 4
"""Rolls in a stretch that stands for an article: neighbours share their subject, so they are no independent samples."""
_FEWEST_STRETCHES = 20
"""A text too short for so many stretches of that length is cut into shorter ones: a standard error needs many."""


@dataclass(frozen=True)
class Estimate:
    """A mean in nats per character, and its standard error over articles."""

    nats: float
    error: float

    @property
    def bits(self) -> float:
        """The mean in bits per character."""
        return self.nats / math.log(2)

    @property
    def bits_error(self) -> float:
        """The standard error in bits per character."""
        return self.error / math.log(2)


@dataclass(frozen=True)
class Rolls:
    """The rolls that are scored."""

    ids: Ids
    """(R, T + 1): each roll, and the character after it, which is only predicted."""
    article_of: npt.NDArray[np.int64]
    """(R,): number of the article that each roll was cut from, from 0 on, in ascending order."""

    @property
    def n_articles(self) -> int:
        """Articles that rolls were cut from."""
        return int(self.article_of[-1]) + 1

    @property
    def n_chars(self) -> int:
        """Characters that are predicted."""
        return int(self.ids[:, 1:].size)

    def partners(self) -> npt.NDArray[np.int64]:
        """(R,): for each roll, a roll of the next article (the first one after the last), at the same place if it is as long."""
        counts = np.bincount(self.article_of)
        first = np.cumsum(counts) - counts
        following = (self.article_of + 1) % self.n_articles
        place = np.arange(len(self.ids)) - first[self.article_of]
        return np.asarray(first[following] + place % counts[following], np.int64)


def cut_stretches(ids: Ids, sequence_len: int) -> list[Ids]:
    """Cut a text (characters,) without articles into stretches of whole rolls that stand for them; the last may be shorter.

    Neighbours share one character: the last one predicted in a stretch is the first one read in the next.
    """
    rolls = min(ROLLS_PER_STRETCH, max(1, (len(ids) - 1) // sequence_len // _FEWEST_STRETCHES))
    size = rolls * sequence_len
    return [ids[start : start + size + 1] for start in range(0, len(ids) - sequence_len, size)]


def cut_rolls(articles: Sequence[Ids], sequence_len: int, chars: int) -> Rolls:
    """Cut articles into whole rolls of `sequence_len` characters from their beginning on; what is left at an end is not scored.

    Args:
        articles: ids of each, (characters,).
        sequence_len: T.
        chars: characters to score, about: where there are more, whole rolls (at least two) spread evenly over all of them.

    Raises:
        DataError: not two of the articles are long enough for a roll.
    """
    counts = np.array([max(0, len(article) - 1) // sequence_len for article in articles], np.int64)
    if np.count_nonzero(counts) < 2:
        longest = max(map(len, articles), default=0)
        raise DataError(
            f"too short to evaluate: it takes two articles of at least {sequence_len + 1:,} characters (the longest here has "
            f"{longest:,}), or a text of {2 * sequence_len + 1:,}; give more text, or fewer --windows"
        )
    total = int(counts.sum())
    n_rolls = min(total, max(2, chars // sequence_len))
    chosen = np.arange(n_rolls) * (total - 1) // (n_rolls - 1)
    article = np.searchsorted(np.cumsum(counts), chosen, side="right")
    starts = (chosen - (np.cumsum(counts) - counts)[article]) * sequence_len
    rows = [articles[a][start : start + sequence_len + 1] for a, start in zip(article, starts, strict=True)]
    return Rolls(np.stack(rows), np.unique(article, return_inverse=True)[1].astype(np.int64))


def position_bins(context_len: int, per_octave: int = 1) -> list[tuple[int, int]]:
    """(first, last) of ranges of positions in the window, counted from 1, each about twice as long as the one before.

    Position p is the prediction after p characters of the window. With `per_octave` each doubling is cut into so many.
    """
    ends = [min(context_len, round(2 ** (i / per_octave))) for i in range(per_octave * context_len.bit_length() + 1)]
    bounds = [0, *sorted(set(ends))]
    return [(low + 1, high) for low, high in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class Scores:
    """The loss of each character, and the means over parts of them."""

    losses: Mapping[str, Losses]
    """(R, W, n) in nats, by the short name of a condition or a baseline."""
    article_of: npt.NDArray[np.int64]
    """(R,): as in `Rolls`."""

    def mean(self, name: str, *, minus: str | None = None, first_window: int = 0) -> Estimate:
        """Over all characters of the windows from `first_window` on; with `minus`, of the difference, paired by character."""
        return self._estimate(self._values(name, minus)[:, first_window:])

    def by_window(self, name: str, *, minus: str | None = None) -> list[Estimate]:
        """Of each window of the roll."""
        values = self._values(name, minus)
        return [self._estimate(values[:, i]) for i in range(values.shape[1])]

    def by_position(self, name: str, bins: Sequence[tuple[int, int]], *, minus: str | None = None) -> list[Estimate]:
        """Of each range (first, last) of positions, counted from 1, over the windows after the first one.

        The first window has no context vector under any condition, so it would only blur what they differ in.
        """
        values = self._values(name, minus)[:, 1:]
        return [self._estimate(values[:, :, first - 1 : last]) for first, last in bins]

    def _values(self, name: str, minus: str | None) -> npt.NDArray[np.float64]:
        values = self.losses[name].astype(np.float64)
        return values if minus is None else values - self.losses[minus]

    def _estimate(self, values: npt.NDArray[np.float64]) -> Estimate:
        """Mean of values (R, ...), every character counted once, and its standard error over articles.

        The mean is a ratio, of the articles' sums L_a and their characters n_a. Its standard error is that of a ratio
        (Cochran, Sampling Techniques, 1977, chapter 6): sqrt(A / (A - 1) x sum over a of (L_a - mean n_a)^2) / sum of n_a.
        """
        rows = values.reshape(len(values), -1)
        sums = np.bincount(self.article_of, weights=rows.sum(axis=1))
        sizes = np.bincount(self.article_of) * rows.shape[1]
        mean = sums.sum() / sizes.sum()
        A = len(sizes)
        variance = A / (A - 1) * ((sums - mean * sizes) ** 2).sum()
        return Estimate(float(mean), float(math.sqrt(variance) / sizes.sum()))
