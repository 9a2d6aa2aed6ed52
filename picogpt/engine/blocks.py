"""The blocks of one window, cached: many characters of many texts at once, or one character of one text as fast as can be.

A process may hold all heads or a share of them. What its attention or its MLP puts out is then a part of a sum that all
processes add up (`Sums`), after which each holds the same residual stream.

Scores are exponentiated as they are, and a column of ones beside the values gives the softmax's sum in the same product.
Should a score ever be too large for that, `advance` sees it and subtracts the largest first; `step` does not look: the numbers
that come out are not finite, and the caller does the character again by `advance`.

Dimensions: B texts side by side, k slots at once, S slots of a window, C = n_embd, D = C / n_head; H heads and M inner
values of the MLP in this process's share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from picogpt.engine.weights import Floats, Layer, Weights

__all__ = ["Blocks", "OwnSums", "Sums", "normal"]

_LAYER_NORM_EPSILON = 1e-5

_LARGE_SCORE = 60
"""Below this, the exponentials of a whole window's scores can be added up as they are, without loss."""

ATTENTION, MLP = 0, 1
"""The two sums of a layer; each has memory of its own, so that one can be written while the other is still read."""


class Sums(Protocol):
    """Adds up the parts that the processes have of a sum."""

    def part(self, which: int, size: int) -> Floats:
        """Where this process writes its part (size,) of sum `which`."""

    def add(self, which: int, x: Floats) -> None:
        """Add all parts to `x`, which has as many numbers as the part last written."""


class OwnSums:
    """The sums of a process that holds all heads: there is one part."""

    def __init__(self) -> None:
        self._parts = [np.empty(0, np.float32) for _ in (ATTENTION, MLP)]

    def part(self, which: int, size: int) -> Floats:
        """See `Sums`."""
        if self._parts[which].size < size:
            self._parts[which] = np.empty(size, np.float32)
        return self._parts[which][:size]

    def add(self, which: int, x: Floats) -> None:
        """See `Sums`."""
        x += self._parts[which][: x.size].reshape(x.shape)


class Blocks:
    """A window of B texts in all blocks: the keys and values of what it has read.

    Args:
        weights: the model.
        layers: its layers, or this process's share of them.
        batch: B.
        sums: how parts are added up.
    """

    def __init__(self, weights: Weights, layers: Sequence[Layer], batch: int, sums: Sums) -> None:
        config = weights.config
        self._weights, self._layers, self._batch, self._sums = weights, layers, batch, sums
        self._head_size = config.n_embd // config.n_head
        self._n_head = layers[0].qkv.shape[1] // (3 * self._head_size)
        slots = config.context_len + 1
        shape = (len(layers), batch, self._n_head)
        # Keys stand in columns: their product with the queries then reads memory in its order, and is done in half the time.
        self._keys = np.zeros((*shape, self._head_size, slots), np.float32)  # (L, B, H, D, S)
        self._values = np.ones((*shape, slots, self._head_size + 1), np.float32)  # (L, B, H, S, D + 1), the last of each a 1
        self._mask = np.triu(np.full((slots, slots), -np.inf, np.float32), 1)  # (S, S)
        self._scratch = _Scratch(batch, 1, self._n_head, layers[0])
        self._step: _Step | None = None

    def fork(self, batch: int) -> Blocks:
        """`batch` windows that all go on from this one (B = 1)."""
        other = Blocks(self._weights, self._layers, batch, self._sums)
        other._keys[...], other._values[...] = self._keys, self._values
        return other

    def advance(self, x: Floats, first: int) -> None:
        """Run slots `x` (B, k, C), which stand behind the `first` slots read before, through all blocks, in place."""
        if self._scratch.slots != x.shape[1]:
            self._scratch = _Scratch(self._batch, x.shape[1], self._n_head, self._layers[0])
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            self._attend(x, layer, keys, values, first)
            self._sums.add(ATTENTION, x)
            self._feed(x, layer)
            self._sums.add(MLP, x)

    def step(self, x: Floats, slot: int) -> None:
        """Run `x` (C,), one slot of one text, through all blocks, in place; not finite where scores are too large."""
        if self._step is None:
            self._step = _Step(self._weights, self._layers, self._keys, self._values, self._sums)
        self._step(x, slot)

    def _attend(self, x: Floats, layer: Layer, keys: Floats, values: Floats, first: int) -> None:
        """Write this share of the attention's output for `x`; `keys` are (B, H, D, S) and `values` (B, H, S, D + 1)."""
        scratch, end = self._scratch, first + self._scratch.slots
        scratch.normalise(x)
        np.matmul(scratch.normal, layer.qkv, out=scratch.qkv)
        keys[..., first:end] = scratch.key.swapaxes(-1, -2)
        values[..., first:end, :-1] = scratch.value
        scores = scratch.q @ keys[..., :end]  # (B, H, k, S)
        large = max(scores.max(), -scores.min()) > _LARGE_SCORE
        if scratch.slots > 1:
            scores += self._mask[first:end, :end]
        if large:
            scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        y = scores @ values[..., :end, :]  # (B, H, k, D + 1)
        np.divide(y[..., :-1], y[..., -1:], out=scratch.heads)
        self._project(scratch.y, layer.out, ATTENTION)

    def _feed(self, x: Floats, layer: Layer) -> None:
        """Write this share of the MLP's output for `x`."""
        scratch = self._scratch
        scratch.normalise(x)
        np.matmul(scratch.normal, layer.fc, out=scratch.places)
        _gelu(self._weights, scratch.places, scratch.edges, scratch.cells, scratch.hidden[:, :-1])
        self._project(scratch.hidden, layer.proj, MLP)

    def _project(self, inputs: Floats, matrix: Floats, which: int) -> None:
        """Write `inputs` (B * k, n + 1) times `matrix` (n + 1, C) as this process's part of sum `which`."""
        part = self._sums.part(which, len(inputs) * matrix.shape[1])
        np.matmul(inputs, matrix, out=part.reshape(len(inputs), -1))


class _Scratch:
    """What lies between two sums, for k slots of B texts; inputs of the matrices end in a 1, for the row of biases.

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


class _SlotViews(NamedTuple):
    """What one layer reads and writes for the character in one slot."""

    new_key: Floats  # (H, D)
    new_value: Floats  # (H, D)
    keys: Floats  # (H, D, slot + 1)
    values: Floats  # (H, slot + 1, D + 1)

    @classmethod
    def of(cls, keys: Floats, values: Floats, slot: int) -> _SlotViews:
        """The views into `keys` (H, D, S) and `values` (H, S, D + 1)."""
        return cls(keys[..., slot], values[:, slot, :-1], keys[..., : slot + 1], values[:, : slot + 1])


class _Step:
    """One character of one text: the sums of `Blocks.advance` with every array made beforehand and as few calls as can be.

    An array operation on a few hundred numbers costs mostly its call, so this is what decides the speed of generation.
    """

    def __init__(self, weights: Weights, layers: Sequence[Layer], keys: Floats, values: Floats, sums: Sums) -> None:
        C, D = weights.config.n_embd, weights.config.n_embd // weights.config.n_head
        width, inner = layers[0].out.shape[0] - 1, layers[0].proj.shape[0] - 1  # H * D and M
        H = width // D
        self._weights, self._layers, self._sums = weights, layers, sums
        slots = range(keys.shape[-1])
        # Views of the cache by layer and slot; making one costs about as much as using it.
        self._views = [[_SlotViews.of(*cache, slot) for slot in slots] for cache in zip(keys[:, 0], values[:, 0], strict=True)]
        # Inputs of the matrices end in a 1, for the row of biases.
        self._normal, self._y, self._hidden = (np.ones(size + 1, np.float32) for size in (C, width, inner))
        self._scaled, self._heads, self._places = self._normal[:C], self._y[:width].reshape(H, D), self._hidden[:inner]
        self._qkv = np.empty(3 * width, np.float32)
        self._q = self._qkv[:width].reshape(H, 1, D)
        self._key, self._value = self._qkv[width:].reshape(2, H, D)
        scores = np.empty(H * len(slots), np.float32)
        self._scores = [scores[: H * (slot + 1)].reshape(H, 1, slot + 1) for slot in slots]
        self._attended = np.empty((H, 1, D + 1), np.float32)
        self._sums_of_heads, self._parts_of_heads = self._attended[:, 0, D:], self._attended[:, 0, :D]
        self._edges, self._cells = np.empty(inner, np.float32), np.empty(inner, np.intp)

    def __call__(self, x: Floats, slot: int) -> None:
        """Run `x` (C,), which stands in `slot`, through all blocks, in place."""
        attention, mlp = (self._sums.part(which, x.size) for which in (ATTENTION, MLP))
        with np.errstate(over="ignore", invalid="ignore"):
            for layer, views in zip(self._layers, self._views, strict=True):
                self._attend(x, layer, views[slot], self._scores[slot], attention)
                self._sums.add(ATTENTION, x)
                self._feed(x, layer, mlp)
                self._sums.add(MLP, x)

    def _normalise(self, x: Floats) -> None:
        np.multiply(x, 1.0 / math.sqrt(x.dot(x) / x.size + _LAYER_NORM_EPSILON), out=self._scaled)

    def _attend(self, x: Floats, layer: Layer, views: _SlotViews, scores: Floats, out: Floats) -> None:
        self._normalise(x)
        np.dot(self._normal, layer.qkv, out=self._qkv)
        views.new_key[...] = self._key
        views.new_value[...] = self._value
        np.matmul(self._q, views.keys, out=scores)
        np.exp(scores, out=scores)
        np.matmul(scores, views.values, out=self._attended)
        np.divide(self._parts_of_heads, self._sums_of_heads, out=self._heads)
        np.dot(self._y, layer.out, out=out)

    def _feed(self, x: Floats, layer: Layer, out: Floats) -> None:
        self._normalise(x)
        np.dot(self._normal, layer.fc, out=self._places)
        _gelu(self._weights, self._places, self._edges, self._cells, self._places)
        np.dot(self._hidden, layer.proj, out=out)
