"""The loss of every character, with the context roll and without it: one set of weights under four conditions.

Knows ids and windows only: `picogpt.evaluation.scores` chooses the sequences and sums up their losses. The engine computes
them, so there is no torch.

Dimensions: R rolls, W windows of a roll, n characters of a window, T = W x n, C = n_embd.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from picogpt.evaluation.scores import CONDITIONS, Losses, Rolls
from picogpt.inference import Engine
from picogpt.inference.tensors import Floats

__all__ = ["chars_to_read", "evaluate", "evaluate_as_is"]

Advance = Callable[[int], None]

_PIECE_SECONDS = 0.5
"""The longest that a call of the engine should take, as Ctrl-C is heard between two of them."""


def chars_to_read(rolls: Rolls, context_len: int) -> int:
    """Characters that the model reads in `evaluate`, over all conditions."""
    R, T = len(rolls.ids), int(rolls.ids.shape[1]) - 1
    # The first window is the same under all conditions, and a sliding one that begins where a window does is the zeroed one.
    windows = T // context_len + 2 * (T // context_len - 1)
    windows += sum(start % context_len > 0 for start in _sliding_starts(T, context_len))
    return R * context_len * windows


def evaluate(engine: Engine, rolls: Rolls, *, advance: Advance) -> dict[str, Losses]:
    """The loss of each character of the rolls, under each of `picogpt.evaluation.scores.CONDITIONS`.

    - `as_is`: as in training, each window starts from the mean of the one before it;
    - `zeroed`: each window starts from the zero vector, as only the first one does in training;
    - `other`: from the vector at the same place of a roll of another article (`Rolls.partners`);
    - `sliding`: windows that start half a window after the one before, from the zero vector, of which the newest half is
      scored: the plain way to give each character at least half a window of context. Of the first one all is scored.

    Memory: besides the result, the context vectors, 4 C / n bytes a character.

    Args:
        engine: the model.
        rolls: T must be whole windows of the model.
        advance: told how many characters the model has read since it was last told.

    Returns:
        By condition, (R, W, n) in nats.
    """
    reader = _Reader(engine, rolls, advance)
    losses = {name: np.empty(reader.shape, np.float32) for name in CONDITIONS}
    losses["as_is"], contexts = _as_is(reader)
    losses["zeroed"][:, 0] = losses["other"][:, 0] = losses["as_is"][:, 0]
    partners, zero = rolls.partners(), np.zeros_like(contexts[0])
    for i in range(1, len(contexts)):
        losses["zeroed"][:, i], _ = reader.read(i * reader.n, zero)
        losses["other"][:, i], _ = reader.read(i * reader.n, contexts[i][partners])
    losses["sliding"] = _sliding(reader, losses["zeroed"])
    return losses


def evaluate_as_is(engine: Engine, rolls: Rolls, *, advance: Advance) -> Losses:
    """The losses (R, W, n) of `evaluate` under `as_is` alone; the model reads each character once."""
    return _as_is(_Reader(engine, rolls, advance))[0]


class _Reader:
    """Reads the same window of every roll, in pieces that take about half of `_PIECE_SECONDS` or more, and no longer than it.

    Args:
        engine, rolls, advance: see `evaluate`.
    """

    def __init__(self, engine: Engine, rolls: Rolls, advance: Advance) -> None:
        self._engine, self._ids, self._advance = engine, rolls.ids, advance
        self._at_once = engine.threads  # windows of a piece; stays a multiple of it, as each thread takes whole windows
        self.n, self.n_embd = engine.config.context_len, engine.config.n_embd
        self.shape = (len(rolls.ids), (rolls.ids.shape[1] - 1) // self.n, self.n)  # (R, W, n)

    def read(self, start: int, contexts: Floats) -> tuple[Losses, Floats]:
        """Losses (R, n) of windows that begin at place `start` of their roll, from `contexts` (R, C), and their means (R, C)."""
        losses, means = np.empty((len(contexts), self.n), np.float32), np.empty_like(contexts)
        first = 0
        while first < len(contexts):
            rows = slice(first, first + self._at_once)
            begun = time.perf_counter()
            losses[rows], means[rows] = self._engine.score(self._ids[rows, start : start + self.n + 1], contexts[rows])
            self._fit_piece(len(losses[rows]), time.perf_counter() - begun)
            self._advance(losses[rows].size)
            first = rows.stop
        return losses, means

    def _fit_piece(self, windows: int, seconds: float) -> None:
        """Halve or double the next piece, where one of `windows` took `seconds`."""
        if seconds > _PIECE_SECONDS:
            self._at_once = max(self._engine.threads, self._at_once // 2)
        elif windows == self._at_once and 2 * seconds < _PIECE_SECONDS:
            self._at_once *= 2


def _as_is(reader: _Reader) -> tuple[Losses, Floats]:
    """Losses (R, W, n) as in training, and what each window starts from (W, R, C)."""
    R, W, _ = reader.shape
    losses, contexts = np.empty(reader.shape, np.float32), np.zeros((W, R, reader.n_embd), np.float32)
    for i in range(W):
        losses[:, i], means = reader.read(i * reader.n, contexts[i])
        if i + 1 < W:
            contexts[i + 1] = means
    return losses, contexts


def _sliding(reader: _Reader, zeroed: Losses) -> Losses:
    """Losses (R, W, n) in overlapping windows without a roll; `zeroed` (R, W, n) are those of windows that do not overlap."""
    R, W, n = reader.shape
    T = W * n
    losses, zero = np.empty((R, T), np.float32), np.zeros((R, reader.n_embd), np.float32)
    scored = 0
    for start in _sliding_starts(T, n):
        window = reader.read(start, zero)[0] if start % n else zeroed[:, start // n]
        losses[:, scored : start + n] = window[:, scored - start :]
        scored = start + n
    return losses.reshape(R, W, n)


def _sliding_starts(sequence_len: int, context_len: int) -> list[int]:
    """Where each overlapping window starts; the last one ends where the roll does."""
    last = sequence_len - context_len
    return [*range(0, last, max(1, context_len // 2)), last]
