"""Batches of sequences cut from a text in memory. Batch k is a pure function of (seed, split, k), so there is no state to save.

Dimension letters: B sequences in a batch, T characters in a sequence (`sequence_len` = windows x context_len).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.config import TextConfig
from picogpt.data.text import Corpus
from picogpt.errors import DataError
from picogpt.ids import Ids, id_dtype
from picogpt.rng import Stream, stream_generator

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
"""Polled now and then; True asks to stop."""

TRAIN_FRACTION = 0.9
"""Fraction of a text for training; the last tenth is for validation."""

_COUNT_BLOCK = 1 << 22
"""Characters per step of counting, which bounds the memory that a mapped text takes."""


class Batch(NamedTuple):
    """Input sequences and their targets, the next character of each input; both int64 (B, T)."""

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]


class WaitInterrupted(Exception):
    """Raised when `Stop` asks to stop while a batch is being waited for."""


class ValidationStore(Protocol):
    """Storage for the validation text of a run."""

    def save_validation(self, ids: Ids) -> None:
        """Save the ids (N,)."""


class Source(Protocol):
    """Interface between training and its data."""

    val_ids: Ids
    """The validation text (characters,)."""

    @property
    def text(self) -> TextConfig:
        """Encoding of the text and the ids it contains."""

    @property
    def train_chars(self) -> int | None:
        """Training characters in one pass over the text; None for a stream that is longer than what is read before training."""

    def train_batch(self, k: int, stop: Stop = ...) -> Batch:
        """Return the batch of step k; called with consecutive k. May raise `WaitInterrupted` once `stop` returns True."""

    def val_batches(self, most: int) -> Iterator[Batch]:
        """Yield at most `most` validation batches, the same ones every time."""

    def begin(self, run: ValidationStore) -> None:
        """Start at the first batch and save in `run` the data that a resume needs; called instead of `restore`."""

    def close(self) -> None:
        """Release the data; no batch is requested afterwards."""

    def summary(self) -> str:
        """Return a line about the text read so far; empty if there is nothing to report."""

    @property
    def snapshot_bytes(self) -> int:
        """Most bytes that the arrays of a snapshot take, but for an article of which a part has been read."""

    def snapshot(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the arrays and plain values from which `restore` continues with the next batch."""

    def restore(self, arrays: dict[str, npt.NDArray[Any]], plain: dict[str, Any]) -> None:
        """Continue from a snapshot."""


def split_text(ids: Ids) -> tuple[Ids, Ids]:
    """Split a text (N,) into its training part and its validation part."""
    # A contiguous tail, not random pieces: neighbouring text would leak into the validation.
    n_train = int(TRAIN_FRACTION * len(ids))
    return ids[:n_train], ids[n_train:]


class TextSource:
    """Batches from a text in memory: the first 90 % for training, the last 10 % for validation.

    Each training pass cuts the training part into adjacent sequences without overlap and shuffles them. Offset and order are
    redrawn for every pass, so that each character is read about once per pass, in changing contexts.
    Validation reads fixed sequences, spread evenly over the validation part.

    Args:
        corpus: the text.
        sequence_len: characters in a sequence.
        batch_size: sequences in a batch.
        seed: seed of the offsets and orders.

    Raises:
        DataError: the text is too short for one sequence.
    """

    def __init__(self, corpus: Corpus, *, sequence_len: int, batch_size: int, seed: int) -> None:
        self._corpus = corpus
        self.train_ids, self.val_ids = split_text(corpus.ids)
        n_train = len(self.train_ids)
        self._sequence_len, self._batch_size, self._seed = sequence_len, batch_size, seed
        # A sequence needs T + 1 characters, as the last input has a target too.
        if len(self.train_ids) <= sequence_len or len(self.val_ids) < 2:
            # Smallest text whose training part has T + 1 characters and whose validation part has 2.
            needed = max(int((sequence_len + 1) / TRAIN_FRACTION) + 1, 20)
            raise DataError(
                f"{corpus.name}: too short, {len(corpus.ids):,} characters where sequences of {sequence_len:,} need at least "
                f"{needed:,}; give more text, or smaller --windows or --context-len"
            )
        n_sequences = (n_train - 1) // sequence_len
        # One sequence less than would fit leaves slack, in which the offset (phase) of each pass is drawn.
        self._sequences_per_pass = max(1, n_sequences - 1)
        # Last offset at which all sequences of a pass still fit.
        self._max_phase = n_train - 1 - self._sequences_per_pass * sequence_len
        # Two passes are cached, as a batch can span the end of one pass and the start of the next.
        self._starts_of_pass = functools.lru_cache(maxsize=2)(self._draw_starts)

    @functools.cached_property
    def text(self) -> TextConfig:
        """Encoding of the text and the ids that occur in its training part."""
        vocab_size = self._corpus.alphabet.vocab_size
        counts = np.zeros(vocab_size, np.int64)
        for start in range(0, len(self.train_ids), _COUNT_BLOCK):
            # minlength gives every block the same length, so the counts add up.
            counts += np.bincount(self.train_ids[start : start + _COUNT_BLOCK], minlength=vocab_size)
            # Keep a memory-mapped text from growing into memory while it is scanned.
            self._corpus.release_pages()
        ids = tuple(np.flatnonzero(counts).tolist())
        return TextConfig(fold=self._corpus.fold, alphabet=self._corpus.alphabet, ids=ids)

    @property
    def train_chars(self) -> int:
        """Characters of the training part."""
        return len(self.train_ids)

    def _draw_starts(self, number: int) -> npt.NDArray[np.int64]:
        """Draw the start of each sequence of pass `number`, in reading order: phase + T * permutation."""
        # Pure in (seed, pass), so the starts of any pass can be recomputed after a resume.
        generator = stream_generator(self._seed, Stream.TEXT_ORDER, number)
        phase = generator.integers(self._max_phase + 1)
        starts: npt.NDArray[np.int64] = phase + self._sequence_len * generator.permutation(self._sequences_per_pass)
        return starts

    def train_batch(self, k: int, stop: Stop = lambda: False) -> Batch:  # noqa: ARG002 (never waits)
        """Return the batch of step k, (B, T)."""
        # Number the sequences over all passes: sequence i is number i % n of pass i // n.
        numbers = range(k * self._batch_size, (k + 1) * self._batch_size)
        starts = [int(self._starts_of_pass(i // self._sequences_per_pass)[i % self._sequences_per_pass]) for i in numbers]
        # The batch is a copy, so the pages it was read from can be released.
        batch = _cut(self.train_ids, starts, self._sequence_len)
        self._corpus.release_pages()
        return batch

    def val_batches(self, most: int) -> Iterator[Batch]:
        """Yield at most `most` batches (B, T); see `evenly_spaced_batches`."""
        # Each batch is a copy, so its pages can be released before it is used.
        for batch in evenly_spaced_batches(self.val_ids, self._sequence_len, self._batch_size, most):
            self._corpus.release_pages()
            yield batch

    def begin(self, run: ValidationStore) -> None:
        """Do nothing: the validation part is cut from the text again."""

    def close(self) -> None:
        """Do nothing: there is no reader to stop."""

    def summary(self) -> str:
        """Return an empty line: all of the text is used."""
        return ""

    @property
    def snapshot_bytes(self) -> int:
        """0: the step is enough."""
        return 0

    def snapshot(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return nothing: batches depend on the step alone."""
        return {}, {}

    def restore(self, arrays: dict[str, npt.NDArray[Any]], plain: dict[str, Any]) -> None:
        """Do nothing: batches depend on the step alone."""


class RandomSource(TextSource):
    """Batches of random characters, for timing steps without data."""

    def __init__(self, *, sequence_len: int, batch_size: int, alphabet: Alphabet = PICOGPT) -> None:
        # Ten times a batch: the last tenth then holds a whole batch of validation sequences.
        size = 10 * (batch_size * sequence_len + 2)
        # Fixed seed: timings of two runs see the same batches.
        known, dtype = alphabet.text_ids, id_dtype(alphabet.vocab_size)
        ids = np.random.Generator(np.random.Philox(0)).integers(known.start, known.stop, size, dtype=dtype.type)
        corpus = Corpus(name="noise", ids=ids, alphabet=alphabet)
        super().__init__(corpus, sequence_len=sequence_len, batch_size=batch_size, seed=0)


def evenly_spaced_batches(ids: Ids, sequence_len: int, batch_size: int, most: int) -> Iterator[Batch]:
    """Yield at most `most` batches of sequences spread evenly over `ids` (N,).

    There are fewer batches if they cover all of `ids`; the last batch can be smaller. A text shorter than a sequence becomes one
    sequence.
    """
    sequence_len = min(sequence_len, len(ids) - 1)
    last_start = len(ids) - 1 - sequence_len
    # As many as fit without overlap, but no more than asked for.
    n_sequences = min(most * batch_size, last_start // sequence_len + 1)
    # From 0 to last_start in equal strides; integer division keeps the first and the last exact.
    starts = [i * last_start // max(1, n_sequences - 1) for i in range(n_sequences)]
    for first in range(0, n_sequences, batch_size):
        yield _cut(ids, starts[first : first + batch_size], sequence_len)


def _cut(ids: Ids, starts: list[int], sequence_len: int) -> Batch:
    """Cut T + 1 characters at each start; the targets are the inputs shifted by one."""
    rows = np.stack([ids[start : start + sequence_len + 1] for start in starts]).astype(np.int64)  # (B, T + 1)
    return Batch(rows[:, :-1], rows[:, 1:])  # (B, T) each
