"""A window of text that fills, and the logits after each character. Knows ids and context vectors; no text, no sampling, no roll.

Dimensions: B texts side by side, n characters, k characters or slots at once, C = n_embd, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from picogpt.config import GPTConfig
from picogpt.engine.blocks import Blocks, OwnSums, normal
from picogpt.engine.team import Team, TeamBlocks, can_have_team, physical_cores
from picogpt.engine.weights import Floats, Weights
from picogpt.run import load_model

__all__ = ["Engine", "Window", "processes_for"]

Ids = npt.NDArray[np.integer[Any]]

_ROWS = 256
"""Slots that go through the blocks at once, at least: two windows."""


def processes_for(config: GPTConfig, asked: int | None) -> int:
    """How many processes compute the model: as many as asked for, or one a core and at most two, as far as its heads divide.

    One where there can be no team. More than two have not been measured.
    """
    most = min(asked or min(2, physical_cores()), config.n_head) if can_have_team() else 1
    return max(count for count in range(1, most + 1) if config.n_head % count == 0)


class Engine:
    """A model, ready to run.

    Args:
        config: the model's shape.
        arrays: its state dict as arrays, nanoGPT's names; `lm_head.weight` may be missing, as it is the embedding.
        processes: how many compute it together; see `processes_for`.
        texts: texts side by side, at most, that several processes are made ready for.

    Attributes:
        rows: slots of all texts that go through the blocks at once, at most; more do so in pieces.

    Raises:
        RunError: a weight is missing, of another shape, not finite or beyond all bounds, or the vocabulary is another.
    """

    def __init__(self, config: GPTConfig, arrays: Mapping[str, npt.NDArray[Any]], *, processes: int = 1, texts: int = 1) -> None:
        self.config, self.threads, self.rows = config, processes, max(_ROWS, texts)
        self.weights = Weights(config, arrays)
        self._sums = OwnSums()
        self.team = Team(self.weights, processes, self.rows) if processes > 1 else None
        if self.team is not None:
            self.weights.layers.clear()  # each process has its share

    @classmethod
    def load(cls, path: Path, *, threads: int | None = 1, texts: int = 1) -> Engine:
        """Read the model of a `.safetensors` file, for `threads` processes at most; None leaves the choice to `processes_for`.

        With one process numpy's matrix products use one thread as well, unless the choice was left.

        Raises:
            RunError: there is none, or it is damaged.
        """
        config, arrays = load_model(path)
        if threads == 1:
            threadpool_limits(1, user_api="blas")
        return cls(config, arrays, processes=processes_for(config, threads), texts=texts)

    def open(self, batch: int) -> Blocks | TeamBlocks:
        """The blocks of an empty window of `batch` texts."""
        if self.team is not None:
            return self.team.open(batch)
        return Blocks(self.weights, self.weights.layers, batch, self._sums)


class Window:
    """A window of B texts that fills character by character, or many at once.

    Args:
        engine: the model.
        batch: B, how many texts go side by side.
    """

    def __init__(self, engine: Engine, batch: int = 1) -> None:
        config = engine.config
        self._engine, self._weights, self._batch = engine, engine.weights, batch
        self._blocks = engine.open(batch)
        self._normal = np.ones(config.n_embd + 1, np.float32)  # ends in a 1, for the head's row of biases
        self.restart(np.zeros((batch, config.n_embd), np.float32))

    def restart(self, context: Floats) -> None:
        """Empty the window; it begins with the context vectors `context` (B, C)."""
        self._slots = 0
        self._context = context
        self._sum = np.zeros_like(context)  # of the normalised outputs, without the final norm's gain and bias

    def fork(self, batch: int) -> Window:
        """`batch` windows that all go on from this one (B = 1)."""
        other = Window.__new__(Window)
        other.__dict__.update(self.__dict__)
        other._batch, other._blocks, other._normal = batch, self._blocks.fork(batch), self._normal.copy()
        other._context, other._sum = (np.repeat(array, batch, axis=0) for array in (self._context, self._sum))
        return other

    def __len__(self) -> int:
        """Characters in the window."""
        return max(0, self._slots - 1)

    @property
    def room(self) -> int:
        """Characters that still fit."""
        return self._engine.config.context_len - len(self)

    def context(self) -> Floats:
        """The context vectors (B, C) for a window that begins where this one now ends: the mean over all its slots."""
        mean: Floats = self._sum / np.float32(self._slots) * self._weights.final_gain + self._weights.final_bias
        return mean

    def extend(self, ids: Ids, *, every: bool = False) -> Floats:
        """Read characters `ids` (B, k) that follow in the window, k from 1 to `room`.

        Returns:
            Logits (B, V) of the character after them, or with `every` those after each of them (B, k, V).

        Raises:
            EngineError: a process of the engine's has ended.
        """
        assert 1 <= ids.shape[1] <= self.room, (ids.shape, self.room)
        if ids.shape == (1, 1) and self._slots:
            logits = self._step(int(ids[0, 0]))
            return logits[None, None] if every else logits[None]
        return self._read(ids, every=every)

    def _step(self, token: int) -> Floats:
        """One character of one text, without what many need."""
        weights, slot = self._weights, self._slots
        x = weights.wte[token] + weights.wpe[slot]
        self._blocks.step(x, slot)
        scaled = self._normal[:-1]
        scaled[...] = normal(x)
        logits: Floats = np.dot(self._normal, weights.head)
        if not math.isfinite(logits.dot(logits)):
            careful: Floats = self._read(np.array([[token]]), every=False)[0]
            return careful
        self._slots = slot + 1
        self._sum[0] += scaled
        return logits

    def _read(self, ids: Ids, *, every: bool) -> Floats:
        """`extend` for any number of characters and texts."""
        weights, first = self._weights, self._slots
        x = weights.wte[ids]  # (B, k, C)
        if first == 0:
            slot = self._context - self._context.mean(axis=-1, keepdims=True)
            x = np.concatenate((slot[:, None], x), axis=1)  # (B, 1 + k, C)
        x += weights.wpe[first : first + x.shape[1]]
        most = max(1, self._engine.rows // self._batch)
        for start in range(0, x.shape[1], most):
            piece = np.ascontiguousarray(x[:, start : start + most])
            self._blocks.advance(piece, first + start)
            x[:, start : start + most] = piece
        self._slots = first + x.shape[1]
        outputs = normal(x)
        self._sum += outputs.sum(axis=1)
        read = outputs[:, -ids.shape[1] :] if every else outputs[:, -1]
        logits: Floats = read @ weights.head[:-1] + weights.head[-1]
        return logits
