"""A window of text that fills, and the logits after each character. Knows ids and context vectors; no text, no sampling, no roll.

Dimensions: B texts side by side, k characters or slots at once, C = n_embd, V = vocab_size.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from picogpt.inference.blocks import Blocks, normal
from picogpt.inference.tensors import Floats
from picogpt.inference.weights import Weights

__all__ = ["Ids", "NumpyWindow", "Window"]

Ids = npt.NDArray[np.integer[Any]]

_ROWS = 256
"""Slots that go through the blocks at once, at least: two windows."""


class Window(Protocol):
    """A window of B texts that fills character by character, or many at once."""

    def reset(self, contexts: Floats) -> None:
        """Empty the window; it begins with the context vectors `contexts` (B, C)."""

    def fork(self, batch: int) -> Window:
        """`batch` windows that all continue this one (B = 1)."""

    def __len__(self) -> int:
        """Characters in the window."""

    @property
    def free(self) -> int:
        """Characters that still fit."""

    def context(self) -> Floats:
        """The context vectors (B, C) for a window that begins where this one now ends: the mean over all its slots."""

    def prefill(self, ids: Ids, *, every: bool = False) -> Floats:
        """Read characters `ids` (B, k) that follow in the window, k from 1 to `free`.

        Returns:
            Logits (B, V) of the character after them, or with `every` those after each of them (B, k, V).
        """


class NumpyWindow:
    """A `Window` in numpy.

    Args:
        weights: the model.
        batch: B, how many texts go side by side.
    """

    def __init__(self, weights: Weights, batch: int = 1) -> None:
        self._weights, self._batch = weights, batch
        self._blocks = Blocks(weights, batch)
        self.reset(np.zeros((batch, weights.config.n_embd), np.float32))

    def reset(self, contexts: Floats) -> None:
        """See `Window`."""
        self._slots = 0
        self._contexts = contexts
        self._sum = np.zeros_like(contexts)  # of the normalised outputs, without the final norm's gain and bias

    def fork(self, batch: int) -> NumpyWindow:
        """See `Window`."""
        other = NumpyWindow.__new__(NumpyWindow)
        other._weights, other._batch, other._slots = self._weights, batch, self._slots
        other._blocks = self._blocks.fork(batch)
        other._contexts, other._sum = (np.repeat(array, batch, axis=0) for array in (self._contexts, self._sum))
        return other

    def __len__(self) -> int:
        """See `Window`."""
        return max(0, self._slots - 1)

    @property
    def free(self) -> int:
        """See `Window`."""
        return self._weights.config.context_len - len(self)

    def context(self) -> Floats:
        """See `Window`."""
        mean: Floats = self._sum / np.float32(self._slots) * self._weights.final_gain + self._weights.final_bias
        return mean

    def prefill(self, ids: Ids, *, every: bool = False) -> Floats:
        """See `Window`."""
        assert 1 <= ids.shape[1] <= self.free, (ids.shape, self.free)
        weights, first = self._weights, self._slots
        x = weights.wte[ids]  # (B, k, C)
        if first == 0:
            slot = self._contexts - self._contexts.mean(axis=-1, keepdims=True)
            x = np.concatenate((slot[:, None], x), axis=1)  # (B, 1 + k, C)
        x += weights.wpe[first : first + x.shape[1]]
        most = max(1, _ROWS // self._batch)
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
