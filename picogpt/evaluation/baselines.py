"""Baselines to compare a model with: two general compressors, and a character n-gram.

The n-gram is interpolated after Witten and Bell (1991, method C). With N(h) characters counted after the context h, T(h)
distinct characters among them, and h' the context without its oldest character,

    p(c | h) = (N(h, c) + T(h) p(c | h')) / (N(h) + T(h)),

and below the empty context every id has the same probability. There is no parameter to tune.
"""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.ids import Ids
from picogpt.tokenizer import CharTokenizer

__all__ = ["COMPRESSORS", "NGRAM_CHARS", "NGRAM_ORDER", "NGram", "compressed_bits", "ngram_order"]

Codes = npt.NDArray[np.int64]

COMPRESSORS: Mapping[str, Callable[[bytes], bytes]] = {
    "bz2": lambda content: bz2.compress(content, 9),
    "lzma": lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
}
"""Compressors by name, each at its strongest setting."""

NGRAM_ORDER = 5
"""Characters in an n-gram: the target and the four characters before it. Fewer for a vocabulary of more than 4,096 ids."""
NGRAM_CHARS = 50_000_000
"""Maximum number of characters counted, from the beginning of a text."""

_CODE_BITS = 63  # of a non-negative int64
_BLOCK_CHARS = 1 << 22  # characters that are counted at once


def compressed_bits(ids: Ids, alphabet: Alphabet = PICOGPT) -> dict[str, float]:
    """Return the bits per character of ids (characters,), compressed as one UTF-8 text file, by compressor."""
    content = CharTokenizer(alphabet).decode(ids).encode()
    return {name: 8 * len(compress(content)) / len(ids) for name, compress in COMPRESSORS.items()}


def ngram_order(vocab_size: int) -> int:
    """Return the characters in an n-gram over `vocab_size` ids: `NGRAM_ORDER`, or as many as fit in an integer."""
    return _Code.of(vocab_size).order


@dataclass(frozen=True)
class _Code:
    """Code of a gram: an integer with `bits` for each of its `order` characters, the newest character lowest."""

    bits: int
    order: int

    @classmethod
    def of(cls, vocab_size: int) -> _Code:
        """Return the code of grams over `vocab_size` ids: 7 bits for each of five characters of 88 ids."""
        bits = (vocab_size - 1).bit_length()
        return cls(bits, min(NGRAM_ORDER, _CODE_BITS // bits))

    def mask(self, length: int) -> int:
        """Return a mask for the bits of the newest `length` characters."""
        return (1 << (self.bits * length)) - 1

    def grams(self, ids: Ids) -> Codes:
        """Return the codes (..., n - order + 1) of all grams of ids (..., n)."""
        n = max(0, ids.shape[-1] - self.order + 1)
        codes = np.zeros((*ids.shape[:-1], n), np.int64)
        # Shift each code by one character and append the next.
        for place in range(self.order):
            codes = codes << self.bits | ids[..., place : place + n]
        return codes


@dataclass(frozen=True)
class _Level:
    """Counts for contexts of one length. Each table is sorted by its codes, for binary search."""

    grams: Codes
    """Codes of the context followed by a character."""
    gram_counts: Codes
    """N(h, c)."""
    contexts: Codes
    """Codes of the context h."""
    context_counts: Codes
    """N(h)."""
    followers: Codes
    """T(h)."""


class NGram:
    """An interpolated character 5-gram, counted on the first `NGRAM_CHARS` of ids (characters,).

    Contexts of all lengths are counted at the same positions, those with four characters before them, so the counts of shorter
    grams follow from the longest. With more than 4,096 ids the grams are shorter (`ngram_order`).

    Args:
        ids: the text (characters,).
        vocab_size: number of ids.
    """

    def __init__(self, ids: Ids, vocab_size: int = PICOGPT.vocab_size) -> None:
        ids = ids[:NGRAM_CHARS]
        self.n_chars = len(ids)
        self._vocab_size, self._code = vocab_size, _Code.of(vocab_size)
        grams, counts = _count(self._code, ids)
        self._levels = [_level(self._code, grams, counts, length) for length in range(self._code.order)]

    def losses(self, ids: Ids) -> npt.NDArray[np.float32]:
        """Return the losses (R, T) in nats of the characters after the first one, in each row of ids (R, T + 1).

        The first characters of a row are predicted from shorter contexts.
        """
        T = ids.shape[1] - 1
        # Padding gives the first target four positions before it; `available` keeps the padding out of every context.
        codes = self._code.grams(np.pad(ids, ((0, 0), (self._code.order - 2, 0))))  # (R, T)
        available = np.arange(1, T + 1)  # characters before each target
        # From the uniform distribution up to the longest context that is available, level by level.
        p = np.full(codes.shape, 1 / self._vocab_size)
        for length, level in enumerate(self._levels):
            p = np.where(available >= length, _interpolate(self._code, level, codes & self._code.mask(length + 1), p), p)
        return np.asarray(-np.log(p), np.float32)


def _count(code: _Code, ids: Ids) -> tuple[Codes, Codes]:
    """Return the distinct grams of a text in ascending order, and their counts; in blocks, to save memory."""
    # Blocks overlap by four characters, so that each gram is counted exactly once.
    size = _BLOCK_CHARS + code.order - 1
    parts = [_count_block(code, ids[start : start + size]) for start in range(0, len(ids), _BLOCK_CHARS)]
    return _merge(np.concatenate([grams for grams, _ in parts]), np.concatenate([counts for _, counts in parts]))


def _count_block(code: _Code, ids: Ids) -> tuple[Codes, Codes]:
    grams, counts = np.unique(code.grams(ids), return_counts=True)
    return grams, counts.astype(np.int64)


def _merge(codes: Codes, counts: Codes) -> tuple[Codes, Codes]:
    """Return the distinct codes in ascending order, and the sum of the counts of each."""
    distinct, number = np.unique(codes, return_inverse=True)
    return distinct, np.bincount(number, weights=counts).astype(np.int64)


def _level(code: _Code, grams: Codes, counts: Codes, length: int) -> _Level:
    """Return the counts for contexts of `length` characters, from those of the longest grams."""
    # Dropping the oldest characters makes equal codes, whose counts are added.
    short, short_counts = _merge(grams & code.mask(length + 1), counts)
    contexts, context_counts = _merge(short >> code.bits, short_counts)
    # Each distinct gram counts once: the sum is the number of distinct characters after the context.
    _, followers = _merge(short >> code.bits, np.ones_like(short))
    return _Level(short, short_counts, contexts, context_counts, followers)


def _interpolate(code: _Code, level: _Level, codes: Codes, p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the probability of each gram's newest character; `p` is its probability after the context one character shorter."""
    gram = _look_up(level.grams, level.gram_counts, codes)
    total = _look_up(level.contexts, level.context_counts, codes >> code.bits)
    followers = _look_up(level.contexts, level.followers, codes >> code.bits)
    # A context that was never seen has N = T = 0; p stays.
    return np.where(total > 0, (gram + followers * p) / np.maximum(total + followers, 1), p)


def _look_up(keys: Codes, values: Codes, wanted: Codes) -> Codes:
    """Return the value of each wanted key, 0 for a missing key."""
    if not len(keys):
        return np.zeros_like(wanted)
    # Binary search gives the insertion point, which is beyond the end for keys above the last.
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
