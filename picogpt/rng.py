"""The registry of a run's random streams: each use of the run's seed has a number of its own.

A stream is a counter-based generator (Philox: Salmon et al., 2011): draw number n is made without the draws before it, so a
resumed run needs no generator state. Initial weights come from torch's own generator, seeded with the same seed.
"""

from __future__ import annotations

import enum

import numpy as np

__all__ = ["Stream", "philox", "sample_generator", "stream_generator"]


@enum.unique
class Stream(enum.IntEnum):
    """Uses of a training run's seed. A number is part of every run on disk: add new ones, never change one."""

    TEXT_ORDER = 1
    """Order and offset of the sequences that are cut from a text in memory, by pass."""
    DROPOUT = 2
    """Seeds of torch's generator for dropout, by rank and step."""
    SHARD_ORDER = 3
    """Order of a stream's files, by pass."""
    POOL_DRAW = 4
    """Draws from the pool of a stream's sequences, by step."""


def philox(seed: int, stream: Stream, *counter: int) -> np.random.Philox:
    """The bits of `stream` at `counter`, one or two numbers such as the pass, or the rank and the step."""
    high = [0] * (4 - len(counter))
    return np.random.Philox(key=[seed, int(stream)], counter=[*high, *counter])


def stream_generator(seed: int, stream: Stream, counter: int) -> np.random.Generator:
    """A generator at draw number `counter` of `stream`."""
    return np.random.Generator(philox(seed, stream, counter))


def sample_generator(seed: int, sample: int = 0) -> np.random.Generator:
    """The generator for generated text number `sample`: the same seed gives the same text."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, sample], np.uint64)))
