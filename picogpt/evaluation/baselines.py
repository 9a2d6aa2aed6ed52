"""What a text costs without the model: two general compressors, and a character n-gram.

The n-gram is interpolated after Witten and Bell (1991, method C): with N(h) characters counted after the context h, T(h)
different ones among them, and h' the context without its oldest character,

    p(c | h) = (N(h, c) + T(h) p(c | h')) / (N(h) + T(h)),

and below the empty context the same probability for every id. It has no parameter to be tuned.
"""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from picogpt.tokenizer import VOCAB_SIZE, CharTokenizer

__all__ = ["COMPRESSORS", "NGRAM_CHARS", "NGRAM_ORDER", "NGram", "compressed_bits"]

Ids = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int64]

COMPRESSORS: Mapping[str, Callable[[bytes], bytes]] = {
    "bz2": lambda content: bz2.compress(content, 9),
    "lzma": lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
}
"""By name, each at its strongest setting."""

NGRAM_ORDER = 5
"""Characters of an n-gram: a prediction and the four characters before it."""
NGRAM_CHARS = 50_000_000
"""Characters of a text that are counted at most, from its beginning."""

_ID_BITS = 7
_BLOCK_CHARS = 1 << 22


def compressed_bits(ids: Ids) -> dict[str, float]:
    """Bits per character of ids (characters,) as one file of text in small letters, by compressor."""
    content = CharTokenizer().decode(ids).encode("ascii")
    return {name: 8 * len(compress(content)) / len(ids) for name, compress in COMPRESSORS.items()}


@dataclass(frozen=True)
class _Level:
    """Counts after contexts of one length; each table sorted by its codes."""

    grams: Codes
    gram_counts: Codes
    contexts: Codes
    context_counts: Codes
    """N(h)."""
    followers: Codes
    """T(h)."""


class NGram:
    """An interpolated character 5-gram, counted on ids (characters,), of which the first `NGRAM_CHARS` are used.

    A gram is a number of 35 bits, 7 a character, the newest one lowest. All contexts are counted at the same places, those
    with four characters before them, so that shorter grams follow from the longest.
    """

    def __init__(self, ids: Ids) -> None:
        ids = ids[:NGRAM_CHARS]
        self.n_chars = len(ids)
        grams, counts = _count(ids)
        self._levels = [_level(grams, counts, length) for length in range(NGRAM_ORDER)]

    def losses(self, ids: Ids) -> npt.NDArray[np.float32]:
        """Nats (R, T) of the characters after the first one of each row of ids (R, T + 1); a row's beginning has less context."""
        T = ids.shape[1] - 1
        padded = np.pad(ids, ((0, 0), (NGRAM_ORDER - 2, 0)))  # so that the first prediction has four places before it
        codes = np.zeros((len(ids), T), np.int64)
        for place in range(NGRAM_ORDER):
            codes = codes << _ID_BITS | padded[:, place : place + T]
        available = np.arange(1, T + 1)  # characters before each prediction
        p = np.full(codes.shape, 1 / VOCAB_SIZE)
        for length, level in enumerate(self._levels):
            p = np.where(available >= length, _interpolate(level, codes & _mask(length + 1), p), p)
        return np.asarray(-np.log(p), np.float32)


def _mask(length: int) -> int:
    """The bits of the newest `length` characters."""
    return (1 << (_ID_BITS * length)) - 1


def _count(ids: Ids) -> tuple[Codes, Codes]:
    """The different grams of a text in ascending order, and how often each occurs; a block at a time, to save memory."""
    parts = [_count_block(ids[start : start + _BLOCK_CHARS + NGRAM_ORDER - 1]) for start in range(0, len(ids), _BLOCK_CHARS)]
    return _merge(np.concatenate([grams for grams, _ in parts]), np.concatenate([counts for _, counts in parts]))


def _count_block(ids: Ids) -> tuple[Codes, Codes]:
    n = max(0, len(ids) - NGRAM_ORDER + 1)
    codes = np.zeros(n, np.int64)
    for place in range(NGRAM_ORDER):
        codes = codes << _ID_BITS | ids[place : place + n]
    grams, counts = np.unique(codes, return_counts=True)
    return grams, counts.astype(np.int64)


def _merge(codes: Codes, counts: Codes) -> tuple[Codes, Codes]:
    """The different codes in ascending order, and the sum of the counts of each."""
    distinct, number = np.unique(codes, return_inverse=True)
    return distinct, np.bincount(number, weights=counts).astype(np.int64)


def _level(grams: Codes, counts: Codes, length: int) -> _Level:
    """The counts after contexts of `length` characters, from those of the longest grams."""
    short, short_counts = _merge(grams & _mask(length + 1), counts)
    contexts, context_counts = _merge(short >> _ID_BITS, short_counts)
    _, followers = _merge(short >> _ID_BITS, np.ones_like(short))
    return _Level(short, short_counts, contexts, context_counts, followers)


def _interpolate(level: _Level, codes: Codes, p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The probability of each gram's newest character, where `p` is that after the context one character shorter."""
    gram = _look_up(level.grams, level.gram_counts, codes)
    total = _look_up(level.contexts, level.context_counts, codes >> _ID_BITS)
    followers = _look_up(level.contexts, level.followers, codes >> _ID_BITS)
    # A context that was never seen says nothing: 0 / 0 is left at p.
    return np.where(total > 0, (gram + followers * p) / np.maximum(total + followers, 1), p)


def _look_up(keys: Codes, values: Codes, wanted: Codes) -> Codes:
    """The value of each key that is wanted; 0 of one that is not there."""
    if not len(keys):
        return np.zeros_like(wanted)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
