"""The loss of every character with and without the context roll: one set of weights under four conditions.

This module knows ids and windows only: `picogpt.evaluation.scores` chooses the sequences and averages their losses. The
inference engine computes the losses, so there is no torch.

Dimensions: R sequences, W windows in a sequence, n characters in a window, T = W x n, C = n_embd.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from picogpt.evaluation.scores import CONDITIONS, EvalSequences, Losses
from picogpt.inference import Engine
from picogpt.inference.tensors import Floats

__all__ = ["chars_to_read", "evaluate", "evaluate_as_is"]

Advance = Callable[[int], None]

_CHUNK_SECONDS = 0.5
"""Longest duration that a call of the engine should have: Ctrl-C is handled between two calls."""


def chars_to_read(sequences: EvalSequences, context_len: int) -> int:
    """Return the number of characters that the model reads in `evaluate`, over all conditions."""
    R, T = len(sequences.ids), int(sequences.ids.shape[1]) - 1
    # The first window is the same under all conditions, so `zeroed` and `other` read one window less each.
    windows = T // context_len + 2 * (T // context_len - 1)
    # A sliding window that starts where a plain window does is that of `zeroed`, and is not read again.
    windows += sum(start % context_len > 0 for start in _sliding_starts(T, context_len))
    return R * context_len * windows


def evaluate(engine: Engine, sequences: EvalSequences, *, advance: Advance) -> dict[str, Losses]:
    """Return the loss of each character, under each of `picogpt.evaluation.scores.CONDITIONS`.

    - `as_is`: as in training, each window starts from the mean of the previous window's outputs;
    - `zeroed`: each window starts from the zero vector, as only the first window does in training;
    - `other`: each window starts from the vector at the same position in a sequence of another article
      (`EvalSequences.partners`);
    - `sliding`: sliding windows with a stride of half a window, from the zero vector. Only the newest half of each window is
      scored, but all of the first: the usual way to give each character at least half a window of context.

    Memory: besides the result, the context vectors take 4 C / n bytes per character.

    Args:
        engine: the model.
        sequences: the sequences; T must be a multiple of the model's window length.
        advance: called with the number of characters read since the last call.

    Returns:
        The losses (R, W, n) in nats, by condition.
    """
    reader = _Reader(engine, sequences, advance)
    losses = {name: np.empty(reader.shape, np.float32) for name in CONDITIONS}
    losses["as_is"], contexts = _as_is(reader)
    # Window 0 starts from the zero vector under all conditions: its losses are copied.
    losses["zeroed"][:, 0] = losses["other"][:, 0] = losses["as_is"][:, 0]
    partners, zero = sequences.partners(), np.zeros_like(contexts[0])
    for i in range(1, len(contexts)):
        losses["zeroed"][:, i], _ = reader.read(i * reader.n, zero)
        losses["other"][:, i], _ = reader.read(i * reader.n, contexts[i][partners])  # (R, C), reordered
    losses["sliding"] = _sliding(reader, losses["zeroed"])
    return losses


def evaluate_as_is(engine: Engine, sequences: EvalSequences, *, advance: Advance) -> Losses:
    """Return only the `as_is` losses (R, W, n) of `evaluate`; the model reads each character once."""
    return _as_is(_Reader(engine, sequences, advance))[0]


class _Reader:
    """Scores the same window of every sequence, in chunks that take between half of `_CHUNK_SECONDS` and all of it.

    Args:
        engine, sequences, advance: see `evaluate`.
    """

    def __init__(self, engine: Engine, sequences: EvalSequences, advance: Advance) -> None:
        self._engine, self._ids, self._advance = engine, sequences.ids, advance
        # Windows in a chunk: a multiple of the number of threads, because each thread takes whole windows.
        self._chunk_size = engine.threads
        self.n, self.n_embd = engine.config.context_len, engine.config.n_embd
        self.shape = (len(sequences.ids), (sequences.ids.shape[1] - 1) // self.n, self.n)  # (R, W, n)

    def read(self, start: int, contexts: Floats) -> tuple[Losses, Floats]:
        """Score the windows that start at position `start` of each sequence, from `contexts` (R, C).

        Returns:
            The losses (R, n), and the context vectors (R, C) for the windows that follow.
        """
        losses, means = np.empty((len(contexts), self.n), np.float32), np.empty_like(contexts)
        first = 0
        while first < len(contexts):
            rows = slice(first, first + self._chunk_size)
            begun = time.perf_counter()
            # n inputs, and the target of the last one.
            losses[rows], means[rows] = self._engine.score(self._ids[rows, start : start + self.n + 1], contexts[rows])
            self._adapt_chunk_size(len(losses[rows]), time.perf_counter() - begun)
            self._advance(losses[rows].size)
            first = rows.stop
        return losses, means

    def _adapt_chunk_size(self, windows: int, seconds: float) -> None:
        """Halve or double the next chunk, after a chunk of `windows` windows that took `seconds`."""
        if seconds > _CHUNK_SECONDS:
            self._chunk_size = max(self._engine.threads, self._chunk_size // 2)
        # The last chunk of a pass is smaller, so its time does not tell whether a full one could be doubled.
        elif windows == self._chunk_size and 2 * seconds < _CHUNK_SECONDS:
            self._chunk_size *= 2


def _as_is(reader: _Reader) -> tuple[Losses, Floats]:
    """Return the losses (R, W, n) as in training, and the context vector that each window starts from (W, R, C)."""
    R, W, _ = reader.shape
    losses, contexts = np.empty(reader.shape, np.float32), np.zeros((W, R, reader.n_embd), np.float32)
    # Window by window, as each needs the context vectors of the one before; all sequences of a window go together.
    for i in range(W):
        losses[:, i], means = reader.read(i * reader.n, contexts[i])
        if i + 1 < W:
            contexts[i + 1] = means
    return losses, contexts


def _sliding(reader: _Reader, zeroed: Losses) -> Losses:
    """Return the losses (R, W, n) in sliding windows; `zeroed` (R, W, n) are the losses of windows that do not overlap."""
    R, W, n = reader.shape
    T = W * n
    losses, zero = np.empty((R, T), np.float32), np.zeros((R, reader.n_embd), np.float32)
    scored = 0  # characters that have a loss; each window scores those after them, up to its own end
    for start in _sliding_starts(T, n):
        # A window that starts at a multiple of n has been read under `zeroed`.
        window = reader.read(start, zero)[0] if start % n else zeroed[:, start // n]
        losses[:, scored : start + n] = window[:, scored - start :]
        scored = start + n
    return losses.reshape(R, W, n)


def _sliding_starts(sequence_len: int, context_len: int) -> list[int]:
    """Return the start of each sliding window; the last window ends where the sequence does."""
    last = sequence_len - context_len
    return [*range(0, last, max(1, context_len // 2)), last]
