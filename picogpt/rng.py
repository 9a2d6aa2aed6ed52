"""The registry of a run's random streams. Each use of the run's seed has its own stream number.

A stream is a counter-based generator (Philox: Salmon et al., 2011): draw number n does not depend on the draws before it, so a
checkpoint stores no generator state. Initial weights come from torch's own generator, with the same seed.
"""

from __future__ import annotations

import enum

import numpy as np

# np.random.Philox would load the module at its first use, outside of the `deferred_interrupt` of a command's imports.
from numpy.random import Generator, Philox

__all__ = ["Stream", "philox", "sample_generator", "stream_generator"]


@enum.unique
class Stream(enum.IntEnum):
    """Uses of a training run's seed."""

    # Resumed runs depend on these numbers: add new ones, never change one.
    TEXT_ORDER = 1
    """Order and offset of the sequences cut from a text in memory, by pass."""
    DROPOUT = 2
    """Seeds of torch's generator for dropout, by rank and step."""
    SHARD_ORDER = 3
    """Order of a stream's files, by pass."""
    POOL_DRAW = 4
    """Draws from the pool of a stream's sequences, by step."""


def philox(seed: int, stream: Stream, *counter: int) -> Philox:
    """Return the bit generator of `stream` at `counter`: one or two numbers, such as the pass, or the rank and the step."""
    # The counter has four 64-bit words, the lowest first, and advances by one per block of output. Ours go into the highest
    # words: two counters are then at least 2^128 blocks apart, so their outputs never overlap.
    high = [0] * (4 - len(counter))
    return Philox(key=[seed, int(stream)], counter=[*high, *counter])


def stream_generator(seed: int, stream: Stream, counter: int) -> Generator:
    """Return a generator for draw number `counter` of `stream`."""
    return Generator(philox(seed, stream, counter))


def sample_generator(seed: int, sample: int = 0) -> Generator:
    """Return the generator for text number `sample` of a seed: the same seed gives the same text."""
    # The key is all that differs between samples, so text 3 of a batch does not depend on texts 0 to 2.
    return Generator(Philox(key=np.array([seed % 2**64, sample], np.uint64)))
