"""The alphabet of a text's own characters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from picogpt.alphabet import MAX_CHARACTERS, TEXT, Alphabet
from picogpt.folding import N_CODE_POINTS, to_code_points

__all__ = ["COVERAGE", "Counts", "TextCharacters", "count_characters"]

Counts = npt.NDArray[np.int64]

COVERAGE = 0.9999
"""Share of a text that its own characters cover at least: rarer ones would have too few examples to learn."""

_SURROGATES = slice(0xD800, 0xE000)  # no characters: UTF-8 cannot encode them
_REPLACEMENT_CHARACTER = 0xFFFD  # stands for damage, so it stays unknown


def count_characters(points: npt.NDArray[np.uint32]) -> Counts:
    """Return how often each code point occurs among `points`, shape (N_CODE_POINTS,)."""
    return np.bincount(points, minlength=N_CODE_POINTS)


@dataclass(frozen=True)
class TextCharacters:
    """The commonest characters of a text, as many as cover `COVERAGE` of it."""

    alphabet: Alphabet
    share: float
    """Share of the text that they cover."""
    left_out: int
    """Number of the text's other characters."""

    @classmethod
    def of(cls, counts: Counts) -> TextCharacters:
        """Choose from the counts of all code points, (N_CODE_POINTS,)."""
        total = max(1, int(counts.sum()))
        possible = counts.copy()
        possible[_SURROGATES] = possible[_REPLACEMENT_CHARACTER] = 0
        points = np.flatnonzero(possible)
        # The commonest first; equally common ones by code point, so that the choice is deterministic.
        points = points[np.argsort(-possible[points], kind="stable")]
        covered = np.cumsum(possible[points])
        # Up to the first one that reaches the share. One place is kept for the newline.
        n = min(1 + int(np.searchsorted(covered, COVERAGE * total)), len(points), MAX_CHARACTERS - 1)
        alphabet = Alphabet.of(map(chr, points[:n].tolist()), TEXT)
        known = possible[to_code_points(alphabet.characters)]
        left_out = np.count_nonzero(counts) - np.count_nonzero(known)
        return cls(alphabet, float(known.sum()) / total, int(left_out))

    def describe(self) -> str:
        """Return a line about the choice."""
        return (
            f"alphabet: {len(self.alphabet.characters):,} characters, which cover {self.share:.3%} of the text; "
            f"{self.left_out:,} rarer ones are left out; a vocabulary of {self.alphabet.vocab_size:,} ids"
        )
