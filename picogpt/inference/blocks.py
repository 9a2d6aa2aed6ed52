"""The transformer blocks of one window in numpy, with a KV cache: prefill and decode for a batch of texts.

This is the fallback where there is no C compiler, and the reference that the C engine is tested against.

Dimensions: B texts in the batch, k new slots, S slots of a window, L layers, C = n_embd, H heads of D = C / H, M = 4 C,
R = B k rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from picogpt.inference.tensors import Floats
from picogpt.inference.weights import Layer, Weights

__all__ = ["Blocks", "layer_norm"]

_LAYER_NORM_EPSILON = 1e-5


class Blocks:
    """All blocks of a window of B texts, with their KV cache.

    Args:
        weights: the model.
        batch: B.
    """

    def __init__(self, weights: Weights, batch: int) -> None:
        config = weights.config
        self._weights, self._batch, self._n_head = weights, batch, config.n_head
        head_size, slots = config.n_embd // config.n_head, config.context_len + 1
        shape = (config.n_layer, batch, config.n_head)
        # Keys are stored transposed: q @ keys then reads memory in order.
        self._keys = np.zeros((*shape, head_size, slots), np.float32)  # (L, B, H, D, S)
        # With a column of ones after the values, one product gives the weighted sum and the softmax denominator.
        self._values = np.ones((*shape, slots, head_size + 1), np.float32)  # (L, B, H, S, D + 1)
        # Causal mask, added to the scores: -inf above the diagonal.
        self._mask = np.triu(np.full((slots, slots), -np.inf, np.float32), 1)  # (S, S)
        self._scratch = _Scratch(batch, 1, config.n_head, weights.layers[0])

    def fork(self, batch: int) -> Blocks:
        """Return `batch` copies of this window (B = 1), which can then continue differently."""
        other = Blocks(self._weights, batch)
        # Assigning (L, 1, H, ...) to (L, batch, H, ...) broadcasts over the texts.
        other._keys[...], other._values[...] = self._keys, self._values
        return other

    def forward(self, x: Floats, first: int) -> None:
        """Run new slots `x` (B, k, C) through all blocks, in place; the KV cache holds the `first` slots before them."""
        # Decoding always has k = 1 and keeps its buffers; only a prefill of another length allocates new ones.
        if self._scratch.slots != x.shape[1]:
            self._scratch = _Scratch(self._batch, x.shape[1], self._n_head, self._weights.layers[0])
        for layer, keys, values in zip(self._weights.layers, self._keys, self._values, strict=True):
            self._attention(x, layer, keys, values, first)
            self._mlp(x, layer)

    def _attention(self, x: Floats, layer: Layer, keys: Floats, values: Floats, first: int) -> None:
        """Add the attention's output to `x`; the layer's cache is `keys` (B, H, D, S) and `values` (B, H, S, D + 1)."""
        scratch, end = self._scratch, first + self._scratch.slots
        scratch.layer_norm(x)
        np.matmul(scratch.normed, layer.qkv, out=scratch.qkv)  # (R, 3 C)
        # Append the new slots to the KV cache.
        keys[..., first:end] = scratch.key.swapaxes(-1, -2)
        values[..., first:end, :-1] = scratch.value
        # 1 / sqrt(D) is already in the query weights.
        scores = scratch.q @ keys[..., :end]  # (B, H, k, S)
        # A single new slot attends to all cached ones, so only a prefill needs the mask.
        if scratch.slots > 1:
            scores += self._mask[first:end, :end]
        # softmax(s) = exp(s - max s) / sum exp(s - max s). Subtracting the row maximum keeps exp finite.
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        y = scores @ values[..., :end, :]  # (B, H, k, D + 1)
        # The last column is the denominator, from the column of ones next to the values.
        np.divide(y[..., :-1], y[..., -1:], out=scratch.att_heads)
        x += (scratch.att_out @ layer.out).reshape(x.shape)  # residual connection

    def _mlp(self, x: Floats, layer: Layer) -> None:
        """Add the MLP's output to `x`."""
        scratch = self._scratch
        scratch.layer_norm(x)
        np.matmul(scratch.normed, layer.fc, out=scratch.fc)  # (R, M)
        # The last column of `fc_gelu` is the 1 for the bias of the projection.
        _gelu(self._weights, scratch.fc, scratch.cell_starts, scratch.cells, scratch.fc_gelu[:, :-1])
        x += (scratch.fc_gelu @ layer.proj).reshape(x.shape)  # residual connection


class _Scratch:
    """Activation buffers for k slots of B texts.

    Inputs of the matrices end in a column of ones, which multiplies the row of biases. The buffers are allocated once and
    reused by every layer, so they stay in the processor's caches.
    """

    def __init__(self, batch: int, slots: int, n_head: int, layer: Layer) -> None:
        # `width` is H * D and `inner` is M; each matrix has one row more, its bias.
        C, width, inner = layer.out.shape[1], layer.out.shape[0] - 1, layer.proj.shape[0] - 1
        rows, head = batch * slots, (n_head, width // n_head)
        self.slots = slots
        # (R, C + 1), (R, C + 1) and (R, M + 1). Nothing writes the last column again after np.ones.
        self.normed, self.att_out, self.fc_gelu = (np.ones((rows, size + 1), np.float32) for size in (C, width, inner))
        # Views that split the columns into heads, so that no copy is needed before or after attention.
        self.att_heads = self.att_out[:, :-1].reshape(batch, slots, *head).swapaxes(1, 2)  # (B, H, k, D)
        self.qkv = np.empty((rows, 3 * width), np.float32)
        self.q, self.key, self.value = self.qkv.reshape(batch, slots, 3, *head).transpose(2, 0, 3, 1, 4)  # each (B, H, k, D)
        # For GELU: its inputs, and for each the start and the index of its table cell.
        self.fc, self.cell_starts = np.empty((2, rows, inner), np.float32)
        self.cells = np.empty((rows, inner), np.intp)

    def layer_norm(self, x: Floats) -> None:
        """Write the normalised `x` (B, k, C) to `normed`, the input of the next matrix."""
        flat = x.reshape(len(self.normed), -1)  # (R, C)
        np.divide(flat, _root_mean_square(flat), out=self.normed[:, :-1])


def _gelu(weights: Weights, fc: Floats, cell_starts: Floats, cells: npt.NDArray[np.intp], out: Floats) -> None:
    """Write to `out` the GELU of `fc`, by linear interpolation: value[i] + (x - i) * slope[i] with i = floor(x).

    `fc` is in units of table cells, which `picogpt.inference.weights` has built into the matrix. It is overwritten, as are
    `cell_starts` and `cells`.
    """
    np.floor(fc, out=cell_starts)
    cells[...] = cell_starts  # as integers, for indexing
    fc -= cell_starts  # x - i, the position within the cell
    # Inputs below the table take its first entry, which is 0 with slope 0; above it there are none (`check_largest`).
    weights.gelu_slopes.take(cells, mode="clip", out=cell_starts)
    fc *= cell_starts
    weights.gelu_values.take(cells, mode="clip", out=cell_starts)
    np.add(fc, cell_starts, out=out)


def _root_mean_square(x: Floats) -> Floats:
    """Return sqrt(mean(x^2) + epsilon) (..., 1) of vectors `x` (..., C): LayerNorm's denominator, as their mean is zero."""
    # einsum sums the squares without a temporary array of them.
    mean_square = np.einsum("...c,...c->...", x, x)[..., None] / np.float32(x.shape[-1])
    root: Floats = np.sqrt(mean_square + np.float32(_LAYER_NORM_EPSILON))
    return root


def layer_norm(x: Floats) -> Floats:
    """Divide centred vectors `x` (..., C) by their root mean square: LayerNorm without gain and bias."""
    normed: Floats = x / _root_mean_square(x)
    return normed
