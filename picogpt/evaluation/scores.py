"""The choice of sequences to score, and their mean losses with standard errors over articles. No torch.

A sequence is a training sample: W windows in a row of one article. Losses of neighbouring characters are correlated, so the
standard errors take whole articles as the independent samples.

Dimensions: R sequences, W windows in a sequence, n characters in a window, T = W x n, A articles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from picogpt.errors import DataError
from picogpt.ids import Ids

__all__ = [
    "CONDITIONS",
    "SEQUENCES_PER_STRETCH",
    "Estimate",
    "EvalSequences",
    "Scores",
    "cut_sequences",
    "cut_stretches",
    "position_bins",
]

Losses = npt.NDArray[np.float32]

CONDITIONS: Mapping[str, str] = {
    "as_is": "context vector as it is",
    "zeroed": "context vector zeroed",
    "other": "context vector of another article",
    "sliding": "no roll, windows overlap by half",
}
"""Labels of the conditions that a model is scored under, by short name; see `picogpt.evaluation.evaluate`."""

SEQUENCES_PER_STRETCH = 4
"""Sequences in a stretch, which takes the place of an article: neighbours share their subject, so they are not independent."""
_MIN_STRETCHES = 20  # a shorter text is cut into shorter stretches: a standard error needs many samples


@dataclass(frozen=True)
class Estimate:
    """A mean in nats per character, and its standard error over articles."""

    nats: float
    error: float

    @property
    def bits(self) -> float:
        """Mean in bits per character."""
        # A nat is 1 / ln 2 bits.
        return self.nats / math.log(2)

    @property
    def bits_error(self) -> float:
        """Standard error in bits per character."""
        return self.error / math.log(2)


@dataclass(frozen=True)
class EvalSequences:
    """The sequences that are scored."""

    ids: Ids
    """(R, T + 1): each sequence and the character after it, which is only a target."""
    article_of: npt.NDArray[np.int64]
    """(R,): index of the article that each sequence was cut from, ascending from 0."""

    @property
    def n_articles(self) -> int:
        """Number of articles that sequences were cut from."""
        return int(self.article_of[-1]) + 1

    @property
    def n_chars(self) -> int:
        """Number of characters that are predicted."""
        # The first character of a sequence is only an input.
        return int(self.ids[:, 1:].size)

    def partners(self) -> npt.NDArray[np.int64]:
        """Return for each sequence the index of a sequence of the next article (R,); after the last article comes the first.

        The partner has the same position in its article, modulo the number of sequences there.
        """
        counts = np.bincount(self.article_of)  # (A,) sequences of each article
        first = np.cumsum(counts) - counts  # (A,) index of each article's first sequence
        # From another article, so that the vector has the right form but the wrong content.
        following = (self.article_of + 1) % self.n_articles  # (R,)
        position = np.arange(len(self.ids)) - first[self.article_of]  # (R,) position in the own article
        return np.asarray(first[following] + position % counts[following], np.int64)


def cut_stretches(ids: Ids, sequence_len: int) -> list[Ids]:
    """Cut a text (characters,) without articles into stretches of whole sequences; the last stretch may be shorter.

    Neighbours share one character: the last target of a stretch is the first input of the next.
    """
    # The full length, or as much as gives the minimum number of stretches, but at least one sequence.
    sequences = min(SEQUENCES_PER_STRETCH, max(1, (len(ids) - 1) // sequence_len // _MIN_STRETCHES))
    size = sequences * sequence_len
    return [ids[start : start + size + 1] for start in range(0, len(ids) - sequence_len, size)]


def cut_sequences(articles: Sequence[Ids], sequence_len: int, chars: int) -> EvalSequences:
    """Cut articles into whole sequences of `sequence_len` characters; the remainder at an article's end is not scored.

    Args:
        articles: ids of each article, (characters,).
        sequence_len: T.
        chars: approximate number of characters to score. Of a longer text, sequences (at least two) are taken evenly spaced.

    Raises:
        DataError: fewer than two articles are long enough for a sequence.
    """
    # One character more than the sequences is needed: the last target.
    counts = np.array([max(0, len(article) - 1) // sequence_len for article in articles], np.int64)
    if np.count_nonzero(counts) < 2:
        longest = max(map(len, articles), default=0)
        raise DataError(
            f"too short to evaluate: two articles of at least {sequence_len + 1:,} characters are needed (the longest has "
            f"{longest:,}), or a text of {2 * sequence_len + 1:,}; give more text, or fewer --windows"
        )
    total = int(counts.sum())
    n_sequences = min(total, max(2, chars // sequence_len))
    # Evenly spaced from the first sequence to the last, numbered through all articles.
    chosen = np.arange(n_sequences) * (total - 1) // (n_sequences - 1)
    # The article of sequence i is the first whose cumulative count exceeds i.
    article = np.searchsorted(np.cumsum(counts), chosen, side="right")
    starts = (chosen - (np.cumsum(counts) - counts)[article]) * sequence_len
    rows = [articles[a][start : start + sequence_len + 1] for a, start in zip(article, starts, strict=True)]
    # Articles without a chosen sequence are dropped, and the others renumbered from 0.
    return EvalSequences(np.stack(rows), np.unique(article, return_inverse=True)[1].astype(np.int64))


def position_bins(context_len: int, per_octave: int = 1) -> list[tuple[int, int]]:
    """Return bins (first, last) of positions in the window, counted from 1, each about twice as long as the one before.

    Position p is the prediction after p characters of the window. Each doubling is cut into `per_octave` bins.
    """
    # Rounding makes equal ends for small positions; the set removes them.
    ends = [min(context_len, round(2 ** (i / per_octave))) for i in range(per_octave * context_len.bit_length() + 1)]
    bounds = [0, *sorted(set(ends))]
    return [(low + 1, high) for low, high in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class Scores:
    """The loss of each character, and means over parts of the windows."""

    losses: Mapping[str, Losses]
    """(R, W, n) in nats, by the short name of a condition or a baseline."""
    article_of: npt.NDArray[np.int64]
    """(R,): as in `EvalSequences`."""

    def mean(self, name: str, *, minus: str | None = None, first_window: int = 0) -> Estimate:
        """Return the mean over the windows from `first_window` on; with `minus`, of the difference paired by character."""
        return self._estimate(self._values(name, minus)[:, first_window:])

    def by_window(self, name: str, *, minus: str | None = None) -> list[Estimate]:
        """Return the mean of each window of a sequence."""
        values = self._values(name, minus)  # (R, W, n)
        return [self._estimate(values[:, i]) for i in range(values.shape[1])]

    def by_position(self, name: str, bins: Sequence[tuple[int, int]], *, minus: str | None = None) -> list[Estimate]:
        """Return the mean of each bin (first, last) of positions, counted from 1, over the windows after the first one.

        The first window has no context vector under any condition, so it would only dilute their differences.
        """
        values = self._values(name, minus)[:, 1:]  # (R, W - 1, n)
        return [self._estimate(values[:, :, first - 1 : last]) for first, last in bins]

    def _values(self, name: str, minus: str | None) -> npt.NDArray[np.float64]:
        # Differences are paired: the variation between characters cancels, and the standard error is far smaller.
        # In float64, as small differences of long sums remain.
        values = self.losses[name].astype(np.float64)
        return values if minus is None else values - self.losses[minus]

    def _estimate(self, values: npt.NDArray[np.float64]) -> Estimate:
        """Return the mean of values (R, ...), each character weighted equally, and its standard error over articles.

        With the articles' sums L_a and numbers of characters n_a the mean is the ratio m = sum L_a / sum n_a. Its standard
        error is that of a ratio estimator (Cochran, Sampling Techniques, 1977, chapter 6):

            sqrt(A / (A - 1) sum_a (L_a - m n_a)^2) / sum_a n_a
        """
        rows = values.reshape(len(values), -1)  # (R, characters of a sequence)
        sums = np.bincount(self.article_of, weights=rows.sum(axis=1))  # (A,) L_a
        sizes = np.bincount(self.article_of) * rows.shape[1]  # (A,) n_a
        mean = sums.sum() / sizes.sum()
        A = len(sizes)
        variance = A / (A - 1) * ((sums - mean * sizes) ** 2).sum()
        return Estimate(float(mean), float(math.sqrt(variance) / sizes.sum()))
