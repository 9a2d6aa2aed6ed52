"""Batches of rolls cut from a text. Batch k is a pure function of (seed, split, k): there is no state to lose."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from picogpt.config import TextConfig
from picogpt.data.text import Corpus
from picogpt.errors import DataError
from picogpt.rng import Stream, stream_generator
from picogpt.tokenizer import VOCAB_SIZE

__all__ = [
    "Batch",
    "RandomSource",
    "Source",
    "Stop",
    "TextSource",
    "ValidationStore",
    "WaitInterrupted",
    "evenly_spaced_batches",
    "split_text",
]

Stop = Callable[[], bool]
"""Asked now and then whether to end."""

TRAIN_FRACTION = 0.9
"""Share of a text that is trained on; the rest, at its end, is for validation."""

_COUNT_BLOCK = 1 << 22
"""Characters that are counted at once."""


class Batch(NamedTuple):
    """Rolls and what follows each of their characters; both int64 of shape (rolls, characters of a roll)."""

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]


class WaitInterrupted(Exception):
    """A batch was waited for, and a stop came first."""


class ValidationStore(Protocol):
    """Where a run's validation text is kept."""

    def save_validation(self, ids: npt.NDArray[np.uint8]) -> None:
        """Keep the ids (characters,)."""


class Source(Protocol):
    """What training needs of its data."""

    @property
    def text(self) -> TextConfig:
        """How the text became ids, and which ones are in it."""

    @property
    def train_chars(self) -> int | None:
        """Characters that are trained on in one pass over the text; None for a stream, which has no end."""

    def train_batch(self, k: int, stop: Stop = ...) -> Batch:
        """Batch of step k; steps are asked for in order. May raise `WaitInterrupted` once `stop` says so."""

    def val_batches(self, most: int) -> Iterator[Batch]:
        """The validation batches, at most so many; the same ones every time."""

    def begin(self, run: ValidationStore) -> None:
        """Begin with the first batch, and keep in `run` what later starts need; or else `restore`."""

    def close(self) -> None:
        """No more batches are asked for."""

    def summary(self) -> str:
        """A line about what was read so far; empty if there is nothing to say."""

    def snapshot(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Arrays and plain values to go on from at the batch that comes next."""

    def restore(self, arrays: dict[str, npt.NDArray[Any]], plain: dict[str, Any]) -> None:
        """Go on from a snapshot."""


def split_text(ids: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The part of a text (characters,) that is trained on, and the part for validation."""
    n_train = int(TRAIN_FRACTION * len(ids))
    return ids[:n_train], ids[n_train:]


class TextSource:
    """Batches from a text in memory, its first 90 % for training and the rest for validation.

    Training passes over its part again and again. Each pass cuts it into rolls that touch but do not overlap, from a
    starting point of its own and in an order of its own, so that every character is read about once a pass.
    Validation reads rolls spread evenly over its part, always the same ones.

    Args:
        corpus: the text.
        sequence_len: characters in a roll.
        batch_size: rolls in a batch.
        seed: of the starting points and the orders.

    Raises:
        DataError: the text is too short to cut a roll from it.
    """

    def __init__(self, corpus: Corpus, *, sequence_len: int, batch_size: int, seed: int) -> None:
        self._corpus = corpus
        self.train_ids, self.val_ids = split_text(corpus.ids)
        n_train = len(self.train_ids)
        self._sequence_len, self._batch_size, self._seed = sequence_len, batch_size, seed
        if len(self.train_ids) <= sequence_len or len(self.val_ids) < 2:
            needed = max(int((sequence_len + 1) / TRAIN_FRACTION) + 1, 20)
            raise DataError(
                f"{corpus.name}: too short, {len(corpus.ids):,} characters where rolls of {sequence_len:,} need at least "
                f"{needed:,}; give more text, or smaller --windows or --context-len"
            )
        n_sequences = (n_train - 1) // sequence_len
        # One roll less than would fit leaves room for the starting point to move.
        self._sequences_per_pass = max(1, n_sequences - 1)
        self._max_phase = n_train - 1 - self._sequences_per_pass * sequence_len
        self._starts_of_pass = functools.lru_cache(maxsize=2)(self._draw_starts)

    @functools.cached_property
    def text(self) -> TextConfig:
        """How the text became ids, and which ones its training part holds."""
        counts = np.zeros(VOCAB_SIZE, np.int64)
        for start in range(0, len(self.train_ids), _COUNT_BLOCK):
            counts += np.bincount(self.train_ids[start : start + _COUNT_BLOCK], minlength=VOCAB_SIZE)
            self._corpus.release_pages()
        return TextConfig(fold=self._corpus.fold, ids=tuple(np.flatnonzero(counts).tolist()))

    @property
    def train_chars(self) -> int:
        """Characters of the part that is trained on."""
        return len(self.train_ids)

    def _draw_starts(self, number: int) -> npt.NDArray[np.int64]:
        """Where each roll of pass `number` starts, in the order in which they are read."""
        generator = stream_generator(self._seed, Stream.TEXT_ORDER, number)
        phase = generator.integers(self._max_phase + 1)
        starts: npt.NDArray[np.int64] = phase + self._sequence_len * generator.permutation(self._sequences_per_pass)
        return starts

    def train_batch(self, k: int, stop: Stop = lambda: False) -> Batch:  # noqa: ARG002 (never waits)
        """Batch of step k, (batch_size, sequence_len)."""
        rolls = range(k * self._batch_size, (k + 1) * self._batch_size)
        starts = [int(self._starts_of_pass(i // self._sequences_per_pass)[i % self._sequences_per_pass]) for i in rolls]
        batch = _cut(self.train_ids, starts, self._sequence_len)
        self._corpus.release_pages()
        return batch

    def val_batches(self, most: int) -> Iterator[Batch]:
        """At most `most` batches of (batch_size, sequence_len); see `evenly_spaced_batches`."""
        for batch in evenly_spaced_batches(self.val_ids, self._sequence_len, self._batch_size, most):
            self._corpus.release_pages()
            yield batch

    def begin(self, run: ValidationStore) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    def summary(self) -> str:
        """Nothing: all of the text is used."""
        return ""

    def snapshot(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Nothing: batches depend on the step alone."""
        return {}, {}

    def restore(self, arrays: dict[str, npt.NDArray[Any]], plain: dict[str, Any]) -> None:
        """Nothing to do."""


class RandomSource(TextSource):
    """Batches of random characters, to time steps with, whatever the data are."""

    def __init__(self, *, sequence_len: int, batch_size: int) -> None:
        # Long enough for a whole batch of validation rolls in its last tenth.
        size = 10 * (batch_size * sequence_len + 2)
        ids = np.random.Generator(np.random.Philox(0)).integers(1, 75, size, dtype=np.uint8)
        super().__init__(Corpus(name="noise", ids=ids), sequence_len=sequence_len, batch_size=batch_size, seed=0)


def evenly_spaced_batches(ids: npt.NDArray[np.uint8], sequence_len: int, batch_size: int, most: int) -> Iterator[Batch]:
    """At most `most` batches of rolls spread evenly over `ids`, fewer where that reads all of it; the last may be smaller.

    A text shorter than a roll is one roll.
    """
    sequence_len = min(sequence_len, len(ids) - 1)
    span = len(ids) - 1 - sequence_len
    n_sequences = min(most * batch_size, span // sequence_len + 1)
    starts = [i * span // max(1, n_sequences - 1) for i in range(n_sequences)]
    for first in range(0, n_sequences, batch_size):
        yield _cut(ids, starts[first : first + batch_size], sequence_len)


def _cut(ids: npt.NDArray[np.uint8], starts: list[int], sequence_len: int) -> Batch:
    rows = np.stack([ids[start : start + sequence_len + 1] for start in starts]).astype(np.int64)
    return Batch(rows[:, :-1], rows[:, 1:])
