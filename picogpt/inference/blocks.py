"""The blocks of one window in numpy, cached: many characters of many texts at once.

The fallback where there is no C compiler, and the reference for the engine in C.

Dimensions: B texts side by side, k slots at once, S slots of a window, C = n_embd, H heads of D = C / H, M = 4 C.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from picogpt.inference.tensors import Floats
from picogpt.inference.weights import Layer, Weights

__all__ = ["Blocks", "normal"]

_LAYER_NORM_EPSILON = 1e-5


class Blocks:
    """A window of B texts in all blocks, with its KV cache.

    Args:
        weights: the model.
        batch: B.
    """

    def __init__(self, weights: Weights, batch: int) -> None:
        config = weights.config
        self._weights, self._batch, self._n_head = weights, batch, config.n_head
        head_size, slots = config.n_embd // config.n_head, config.context_len + 1
        shape = (config.n_layer, batch, config.n_head)
        # Keys stand in columns: their product with the queries then reads memory in its order, and is done in half the time.
        self._keys = np.zeros((*shape, head_size, slots), np.float32)  # (L, B, H, D, S)
        # A column of ones beside the values gives the softmax's denominator in the same product.
        self._values = np.ones((*shape, slots, head_size + 1), np.float32)  # (L, B, H, S, D + 1)
        self._mask = np.triu(np.full((slots, slots), -np.inf, np.float32), 1)  # (S, S)
        self._scratch = _Scratch(batch, 1, config.n_head, weights.layers[0])

    def fork(self, batch: int) -> Blocks:
        """`batch` windows that all go on from this one (B = 1)."""
        other = Blocks(self._weights, batch)
        other._keys[...], other._values[...] = self._keys, self._values
        return other

    def advance(self, x: Floats, first: int) -> None:
        """Run slots `x` (B, k, C), which stand behind the `first` slots read before, through all blocks, in place."""
        if self._scratch.slots != x.shape[1]:
            self._scratch = _Scratch(self._batch, x.shape[1], self._n_head, self._weights.layers[0])
        for layer, keys, values in zip(self._weights.layers, self._keys, self._values, strict=True):
            self._attend(x, layer, keys, values, first)
            self._feed(x, layer)

    def _attend(self, x: Floats, layer: Layer, keys: Floats, values: Floats, first: int) -> None:
        """Add the attention's output to `x`; `keys` are (B, H, D, S) and `values` (B, H, S, D + 1)."""
        scratch, end = self._scratch, first + self._scratch.slots
        scratch.normalise(x)
        np.matmul(scratch.normal, layer.qkv, out=scratch.qkv)
        keys[..., first:end] = scratch.key.swapaxes(-1, -2)
        values[..., first:end, :-1] = scratch.value
        scores = scratch.q @ keys[..., :end]  # (B, H, k, S)
        if scratch.slots > 1:
            scores += self._mask[first:end, :end]
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        y = scores @ values[..., :end, :]  # (B, H, k, D + 1)
        np.divide(y[..., :-1], y[..., -1:], out=scratch.heads)
        x += (scratch.y @ layer.out).reshape(x.shape)

    def _feed(self, x: Floats, layer: Layer) -> None:
        """Add the MLP's output to `x`."""
        scratch = self._scratch
        scratch.normalise(x)
        np.matmul(scratch.normal, layer.fc, out=scratch.places)
        _gelu(self._weights, scratch.places, scratch.edges, scratch.cells, scratch.hidden[:, :-1])
        x += (scratch.hidden @ layer.proj).reshape(x.shape)


class _Scratch:
    """Activations of k slots of B texts; inputs of the matrices end in a 1, for the row of biases.

    Made once and written again and again, it stays in the processor's caches.
    """

    def __init__(self, batch: int, slots: int, n_head: int, layer: Layer) -> None:
        C, width, inner = layer.out.shape[1], layer.out.shape[0] - 1, layer.proj.shape[0] - 1  # width is H * D, inner M
        rows, head = batch * slots, (n_head, width // n_head)
        self.slots = slots
        self.normal, self.y, self.hidden = (np.ones((rows, size + 1), np.float32) for size in (C, width, inner))
        self.heads = self.y[:, :-1].reshape(batch, slots, *head).swapaxes(1, 2)  # (B, H, k, D)
        self.qkv = np.empty((rows, 3 * width), np.float32)
        self.q, self.key, self.value = self.qkv.reshape(batch, slots, 3, *head).transpose(2, 0, 3, 1, 4)  # each (B, H, k, D)
        self.places, self.edges = np.empty((2, rows, inner), np.float32)
        self.cells = np.empty((rows, inner), np.intp)

    def normalise(self, x: Floats) -> None:
        """Write the normalised `x` (B, k, C) as the input of the next matrix."""
        flat = x.reshape(len(self.normal), -1)
        np.divide(flat, _root_mean_square(flat), out=self.normal[:, :-1])


def _gelu(weights: Weights, places: Floats, edges: Floats, cells: npt.NDArray[np.intp], out: Floats) -> None:
    """Write to `out` the GELU of what stands at `places` of its table; these, `edges` and `cells` are overwritten."""
    np.floor(places, out=edges)
    cells[...] = edges
    places -= edges
    weights.gelu_slopes.take(cells, mode="clip", out=edges)
    places *= edges
    weights.gelu_values.take(cells, mode="clip", out=edges)
    np.add(places, edges, out=out)


def _root_mean_square(x: Floats) -> Floats:
    """What LayerNorm divides vectors `x` (..., C) by: (..., 1)."""
    mean_square = np.einsum("...c,...c->...", x, x)[..., None] / np.float32(x.shape[-1])
    root: Floats = np.sqrt(mean_square + np.float32(_LAYER_NORM_EPSILON))
    return root


def normal(x: Floats) -> Floats:
    """Divide centred vectors `x` (..., C) by their root mean square: LayerNorm without gain and bias."""
    divided: Floats = x / _root_mean_square(x)
    return divided
