"""A window of text with a KV cache, and the logits after each character.

This module knows ids and context vectors. It knows nothing of characters, sampling or how windows follow one another.

Dimensions: B texts in the batch, k new characters or slots, C = n_embd, V = vocab_size.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from picogpt.inference.blocks import Blocks, layer_norm
from picogpt.inference.tensors import Floats
from picogpt.inference.weights import Weights

__all__ = ["Ids", "NumpyWindow", "Window"]

Ids = npt.NDArray[np.integer[Any]]

_CHUNK_ROWS = 256
"""Rows of activations that go through the blocks at once, about two windows: longer inputs are read in chunks."""


class Window(Protocol):
    """A window of B texts, filled by prefill or character by character."""

    def reset(self, contexts: Floats) -> None:
        """Empty the window, and start it from the context vectors `contexts` (B, C)."""

    def fork(self, batch: int) -> Window:
        """Return `batch` copies of this window (B = 1), which can then continue differently."""

    def __len__(self) -> int:
        """Characters in the window."""

    @property
    def free(self) -> int:
        """Characters that still fit: the free slots."""

    def context(self) -> Floats:
        """Return the context vectors (B, C) for a window that follows this one: the mean of its outputs over all slots."""

    def prefill(self, ids: Ids, *, all_logits: bool = False) -> Floats:
        """Append characters `ids` (B, k) to the window, k from 1 to `free`.

        Returns:
            Logits (B, V) of the next character, or with `all_logits` the logits after each of `ids` (B, k, V).
        """


class NumpyWindow:
    """A `Window` in numpy.

    Args:
        weights: the model.
        batch: B, texts in the batch.
    """

    def __init__(self, weights: Weights, batch: int = 1) -> None:
        self._weights, self._batch = weights, batch
        self._blocks = Blocks(weights, batch)
        self.reset(np.zeros((batch, weights.config.n_embd), np.float32))

    def reset(self, contexts: Floats) -> None:
        """See `Window`."""
        self._slots = 0  # filled slots; the KV cache behind them is stale and never read
        self._contexts = contexts  # (B, C)
        # Sum of the final norm's outputs so far, before its gain and bias: the next context vector is a mean over it.
        self._sum = np.zeros_like(contexts)  # (B, C)

    def fork(self, batch: int) -> NumpyWindow:
        """See `Window`."""
        other = NumpyWindow.__new__(NumpyWindow)  # without __init__, which would allocate a second KV cache
        other._weights, other._batch, other._slots = self._weights, batch, self._slots
        other._blocks = self._blocks.fork(batch)
        other._contexts, other._sum = (np.repeat(array, batch, axis=0) for array in (self._contexts, self._sum))
        return other

    def __len__(self) -> int:
        """See `Window`."""
        return max(0, self._slots - 1)  # the context vector takes the first slot

    @property
    def free(self) -> int:
        """See `Window`."""
        return self._weights.config.context_len - len(self)

    def context(self) -> Floats:
        """See `Window`."""
        # mean(gain * y + bias) = gain * mean(y) + bias, so both are applied once, to the mean.
        mean: Floats = self._sum / np.float32(self._slots) * self._weights.final_gain + self._weights.final_bias
        return mean

    def prefill(self, ids: Ids, *, all_logits: bool = False) -> Floats:
        """See `Window`."""
        assert 1 <= ids.shape[1] <= self.free, (ids.shape, self.free)
        weights, first = self._weights, self._slots
        x = weights.wte[ids]  # (B, k, C)
        # Slot 0 holds the context vector, centred like everything else in the residual stream.
        if first == 0:
            slot = self._contexts - self._contexts.mean(axis=-1, keepdims=True)
            x = np.concatenate((slot[:, None], x), axis=1)  # (B, 1 + k, C)
        x += weights.wpe[first : first + x.shape[1]]
        # A chunk goes through all blocks before the next one starts: its keys are then in the cache, and memory is bounded.
        size = max(1, _CHUNK_ROWS // self._batch)
        for start in range(0, x.shape[1], size):
            chunk = np.ascontiguousarray(x[:, start : start + size])
            self._blocks.forward(chunk, first + start)
            x[:, start : start + size] = chunk
        self._slots = first + x.shape[1]
        outputs = layer_norm(x)
        self._sum += outputs.sum(axis=1)
        # The last k outputs leave out the context slot, which predicts nothing.
        read = outputs[:, -ids.shape[1] :] if all_logits else outputs[:, -1]  # (B, k, C) or (B, C)
        # The last row of the head is its bias: the final norm's bias through the embedding.
        logits: Floats = read @ weights.head[:-1] + weights.head[-1]
        return logits
