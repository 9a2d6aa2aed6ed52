"""One window of the model, cached, in numpy alone: what generation runs on.

Knows ids, logits and context vectors; no text, no sampling, no roll, and no torch. The weights are rearranged once, when
they are loaded, so that little is left to do for each character:

- Nothing but LayerNorms reads the residual stream, and each of them subtracts its mean. So everything that is written to
  the stream is centred beforehand, in the weights, and a norm is one scalar: the root of the mean square.
- A norm's gain and bias move into the matrix behind it, the attention's 1/sqrt(D) into the queries.
- The bias of the keys shifts all scores of a query alike and so cancels in the softmax; that of the values passes through
  it unchanged, because its weights add up to 1, and moves into the output's bias.
- Scores are exponentiated as they are. A column of ones beside the values gives the softmax's sum in the same product. Should
  a score ever be too large for that, the numbers that come out are not finite, and the step is done again the careful way.
- GELU is read from a table with straight lines between its entries, fine enough to be off by less than 1e-6 and long enough
  for the largest value that a layer can put into it.
- Every bias is the last row of its matrix, for a 1 at the end of what the matrix is multiplied with.

Dimensions: B texts side by side, n characters, k characters or slots at once, S slots of a window, C = n_embd, H = n_head,
D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from picogpt.config import GPTConfig
from picogpt.errors import RunError
from picogpt.run import load_model
from picogpt.tokenizer import VOCAB_SIZE

__all__ = ["Engine", "Window"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.integer[Any]]

_LAYER_NORM_EPSILON = 1e-5
_GELU_FLOOR = 6
"""Below minus this, GELU is taken for 0; it is within 6e-9 of it."""
_GELU_CEILING = 4096
"""Largest input that the table is made for; those of a trained model stay below a hundred."""
_GELU_STEPS = 512
"""Table entries per unit; between them a straight line is off by at most 4e-7."""


def _gelu_table(largest: float) -> tuple[Floats, Floats]:
    """GELU from -`_GELU_FLOOR` to `largest` in steps of 1 / `_GELU_STEPS`: the value at each step, and the change to the next."""
    edges = np.arange(-_GELU_FLOOR * _GELU_STEPS, math.ceil(largest + 1) * _GELU_STEPS) / _GELU_STEPS
    curved = edges < _GELU_FLOOR
    values = edges.copy()
    values[curved] = [x * math.erfc(-x / math.sqrt(2)) / 2 for x in edges[curved].tolist()]
    slopes = np.diff(values, append=0.0)
    values[0] = slopes[0] = 0.0  # whatever lies below takes the first entry
    return values.astype(np.float32), slopes.astype(np.float32)


@dataclass(frozen=True)
class _Layer:
    """A block's weights, rearranged: each matrix is (inputs + 1, outputs), the bias in its last row."""

    qkv: Floats  # (C + 1, 3C)
    out: Floats  # (C + 1, C)
    fc: Floats  # (C + 1, 4C), times _GELU_STEPS, from the beginning of the GELU's table
    proj: Floats  # (4C + 1, C)

    def largest_input(self) -> float:
        """The largest number that this layer can put into its GELU: its input's norm is at most sqrt(C) (Cauchy-Schwarz)."""
        norms = np.sqrt(np.square(self.fc[:-1], dtype=np.float64).sum(axis=0) * (len(self.fc) - 1))
        return float((norms + self.fc[-1]).max() / _GELU_STEPS - _GELU_FLOOR)


class Engine:
    """The model's weights, ready to run.

    Args:
        config: the model's shape.
        weights: its state dict as arrays, nanoGPT's names; `lm_head.weight` may be missing, as it is the embedding.

    Raises:
        RunError: a weight is missing, of another shape, not finite or beyond all bounds, or the vocabulary is another.
    """

    def __init__(self, config: GPTConfig, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        if config.vocab_size != VOCAB_SIZE:
            raise RunError(
                f"the weights are of another model: a vocabulary of {config.vocab_size} where {VOCAB_SIZE} ids are known"
            )
        self.config = config
        self._weights = weights
        C, T = config.n_embd, "transformer."
        self.wte = _centred(self._get(T + "wte.weight", (config.vocab_size, C)))  # (V, C)
        self.wpe = _centred(self._get(T + "wpe.weight", (config.context_len + 1, C)))  # (S, C)
        self.layers = [self._layer(f"{T}h.{i}.") for i in range(config.n_layer)]
        self.final_gain = self._get(T + "ln_f.weight", (C,))
        self.final_bias = self._bias(T + "ln_f.bias", C)
        embedding = self._get(T + "wte.weight", (config.vocab_size, C))
        self.head = np.vstack(((embedding * self.final_gain).T, embedding @ self.final_bias))  # (C + 1, V)
        largest = max(layer.largest_input() for layer in self.layers)
        if not largest <= _GELU_CEILING:
            raise RunError(f"the weights have diverged: numbers up to {largest:.3g} may occur; train with a smaller --lr")
        self.gelu_values, self.gelu_slopes = _gelu_table(largest)
        del self._weights

    @classmethod
    def load(cls, path: Path) -> Engine:
        """Read the model of a `.safetensors` file.

        Raises:
            RunError: there is none, or it is damaged.
        """
        return cls(*load_model(path))

    def _get(self, name: str, shape: tuple[int, ...]) -> Floats:
        array = self._weights.get(name)
        if array is None or array.shape != shape:
            found = "none" if array is None else array.shape
            raise RunError(f"the weights are of another model: {name} should have shape {shape}, got {found}")
        weight: Floats = array.astype(np.float32, copy=False)
        if not np.isfinite(weight).all():
            raise RunError(f"the weights are damaged or have diverged: {name} has values that are not finite")
        return weight

    def _bias(self, name: str, size: int) -> Floats:
        return self._get(name, (size,)) if self.config.bias else np.zeros(size, np.float32)

    def _layer(self, name: str) -> _Layer:
        C, D = self.config.n_embd, self.config.n_embd // self.config.n_head
        gain, bias = self._get(name + "ln_1.weight", (C,)), self._bias(name + "ln_1.bias", C)
        qkv = self._get(name + "attn.c_attn.weight", (3 * C, C))
        qkv_bias = qkv @ bias + self._bias(name + "attn.c_attn.bias", 3 * C)
        value_bias = qkv_bias[2 * C :].copy()
        qkv_bias[C:] = 0
        qkv = np.vstack(((qkv * gain).T, qkv_bias))
        qkv[:, :C] /= math.sqrt(D)
        out = self._get(name + "attn.c_proj.weight", (C, C)).T
        out_bias = self._bias(name + "attn.c_proj.bias", C) + value_bias @ out
        gain, bias = self._get(name + "ln_2.weight", (C,)), self._bias(name + "ln_2.bias", C)
        fc = self._get(name + "mlp.c_fc.weight", (4 * C, C))
        fc_bias = fc @ bias + self._bias(name + "mlp.c_fc.bias", 4 * C)
        proj = self._get(name + "mlp.c_proj.weight", (C, 4 * C)).T
        return _Layer(
            qkv=qkv,
            out=_centred(np.vstack((out, out_bias))),
            fc=np.vstack(((fc * gain).T, fc_bias + np.float32(_GELU_FLOOR))) * np.float32(_GELU_STEPS),
            proj=_centred(np.vstack((proj, self._bias(name + "mlp.c_proj.bias", C)))),
        )


def _centred(array: Floats) -> Floats:
    """`array` (..., C) less its mean over the last axis, contiguous."""
    return np.ascontiguousarray(array - array.mean(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32))


class Window:
    """A window of B texts that fills character by character, or many at once.

    Args:
        engine: the weights.
        batch: B, how many texts go side by side.
    """

    def __init__(self, engine: Engine, batch: int = 1) -> None:
        config = engine.config
        self._engine, self._batch = engine, batch
        self._n_head, self._head_size = config.n_head, config.n_embd // config.n_head
        slots = config.context_len + 1
        shape = (config.n_layer, batch, config.n_head)
        # Keys and values, (L, 2, B, H, S, D + 1); the 1 at the end of each serves the values.
        self._cache = np.ones((shape[0], 2, *shape[1:], slots, self._head_size + 1), np.float32)
        self._mask = np.triu(np.full((slots, slots), -np.inf, np.float32), 1)  # (S, S)
        self._step = _Step(self) if batch == 1 else None
        self.restart(np.zeros((batch, config.n_embd), np.float32))

    def restart(self, context: Floats) -> None:
        """Empty the window; it begins with the context vectors `context` (B, C)."""
        self._slots = 0
        self._context = context
        self._sum = np.zeros_like(context)  # of the normalised outputs, without the final norm's gain and bias

    def fork(self, batch: int) -> Window:
        """`batch` windows that all go on from this one (B = 1)."""
        other = Window(self._engine, batch)
        other._cache[...] = self._cache
        other._slots = self._slots
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
        engine = self._engine
        mean: Floats = self._sum / np.float32(self._slots) * engine.final_gain + engine.final_bias
        return mean

    def extend(self, ids: Ids, *, every: bool = False) -> Floats:
        """Read characters `ids` (B, k) that follow in the window, k from 1 to `room`.

        Returns:
            Logits (B, V) of the character after them, or with `every` those after each of them (B, k, V).
        """
        assert 1 <= ids.shape[1] <= self.room, (ids.shape, self.room)
        if self._step is not None and ids.shape[1] == 1 and self._slots:
            logits = self._step(int(ids[0, 0]), self._slots)
            return logits[None, None] if every else logits[None]
        return self._read(ids, every=every)

    def _carefully(self, token: int) -> Floats:
        """One character of one text without the step's short cuts."""
        logits: Floats = self._read(np.array([[token]]), every=False)[0]
        return logits

    def _read(self, ids: Ids, *, every: bool) -> Floats:
        """`extend` for any number of characters and texts."""
        engine = self._engine
        first = self._slots
        x = engine.wte[ids]  # (B, k, C)
        if first == 0:
            slot = self._context - self._context.mean(axis=-1, keepdims=True)
            x = np.concatenate((slot[:, None], x), axis=1)  # (B, 1 + k, C)
        x += engine.wpe[first : first + x.shape[1]]
        normal = self._advance(x)  # (B, k, C)
        self._sum += normal.sum(axis=1)
        read = normal[:, -ids.shape[1] :] if every else normal[:, -1]
        logits: Floats = read @ engine.head[:-1] + engine.head[-1]
        return logits

    def _advance(self, x: Floats) -> Floats:
        """Run slots `x` (B, k, C) through all layers, behind those that are cached; return them normalised (B, k, C)."""
        B, k, C = x.shape
        first, end = self._slots, self._slots + k
        for i, layer in enumerate(self._engine.layers):
            keys, values = self._cache[i]  # each (B, H, S, D + 1)
            qkv = _normal(x) @ layer.qkv[:-1]  # (B, k, 3C)
            qkv[..., :C] += layer.qkv[-1, :C]
            q, *new = qkv.reshape(B, k, 3, self._n_head, self._head_size).transpose(2, 0, 3, 1, 4)  # each (B, H, k, D)
            keys[..., first:end, :-1], values[..., first:end, :-1] = new
            scores = q @ keys[..., :end, :-1].swapaxes(-1, -2)  # (B, H, k, S)
            if k > 1:
                scores += self._mask[first:end, :end]
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            y = scores @ values[..., :end, :]  # (B, H, k, D + 1)
            y = (y[..., :-1] / y[..., -1:]).transpose(0, 2, 1, 3).reshape(B, k, C)  # (B, k, C)
            x = x + y @ layer.out[:-1] + layer.out[-1]
            hidden = _normal(x) @ layer.fc[:-1] + layer.fc[-1]  # (B, k, 4C)
            x = x + self._gelu(hidden) @ layer.proj[:-1] + layer.proj[-1]
        self._slots = end
        return _normal(x)

    def _gelu(self, places: Floats) -> Floats:
        """GELU at `places` in its table, which are overwritten."""
        edges = np.floor(places)
        cells = edges.astype(np.intp)
        places -= edges
        places *= self._engine.gelu_slopes.take(cells, mode="clip")
        places += self._engine.gelu_values.take(cells, mode="clip")
        return places


class _SlotViews(NamedTuple):
    """What one layer reads and writes for the character in one slot."""

    new: Floats  # (2, H, D): where its key and its value go
    keys: Floats  # (H, D, slot + 1)
    values: Floats  # (H, slot + 1, D + 1)

    @classmethod
    def of(cls, cache: Floats, slot: int) -> _SlotViews:
        """The views into `cache` (2, H, S, D + 1)."""
        keys, values = cache[:, :, : slot + 1]
        return cls(cache[:, :, slot, :-1], keys[:, :, :-1].swapaxes(1, 2), values)


class _Step:
    """One character of one text: the sums of `Window._advance` with every array made beforehand and as few calls as can be.

    An array operation on a few hundred numbers costs mostly its call, so this is what decides the speed of generation.
    """

    def __init__(self, window: Window) -> None:
        engine = window._engine
        C, H, D = engine.config.n_embd, window._n_head, window._head_size
        self._engine, self._window = engine, window
        slots = range(engine.config.context_len + 1)
        # Views of the cache by layer and slot; making one costs about as much as using it.
        self._views = [[_SlotViews.of(cache[:, 0], slot) for slot in slots] for cache in window._cache]
        # Inputs of the matrices end in a 1, for the row of biases.
        self._normal, self._y, self._hidden = (np.ones(size + 1, np.float32) for size in (C, C, 4 * C))
        self._scaled, self._heads, self._places = self._normal[:C], self._y[:C].reshape(H, D), self._hidden[: 4 * C]
        self._qkv = np.empty(3 * C, np.float32)
        self._q, self._new = self._qkv[:C].reshape(H, 1, D), self._qkv[C:].reshape(2, H, D)
        scores = np.empty(H * len(slots), np.float32)
        self._scores = [scores[: H * (slot + 1)].reshape(H, 1, slot + 1) for slot in slots]
        self._attended = np.empty((H, 1, D + 1), np.float32)
        self._sums, self._parts = self._attended[:, 0, D:], self._attended[:, 0, :D]
        self._update = np.empty(C, np.float32)
        self._edges, self._cells = np.empty(4 * C, np.float32), np.empty(4 * C, np.intp)

    def __call__(self, token: int, slot: int) -> Floats:
        """Read `token` into `slot`; return the logits (V,) of the character after it."""
        engine, window = self._engine, self._window
        x = engine.wte[token] + engine.wpe[slot]
        with np.errstate(over="ignore", invalid="ignore"):
            for layer, views in zip(engine.layers, self._views, strict=True):
                self._attend(x, layer, views[slot], self._scores[slot])
                self._feed(x, layer)
            self._normalise(x)
            logits: Floats = np.dot(self._normal, engine.head)
        if not math.isfinite(logits.dot(logits)):
            return window._carefully(token)
        window._slots = slot + 1
        window._sum[0] += self._scaled
        return logits

    def _normalise(self, x: Floats) -> None:
        np.multiply(x, 1.0 / math.sqrt(x.dot(x) / x.size + _LAYER_NORM_EPSILON), out=self._scaled)

    def _attend(self, x: Floats, layer: _Layer, views: _SlotViews, scores: Floats) -> None:
        """Add the attention's output to `x`."""
        self._normalise(x)
        np.dot(self._normal, layer.qkv, out=self._qkv)
        views.new[...] = self._new
        np.matmul(self._q, views.keys, out=scores)
        np.exp(scores, out=scores)
        np.matmul(scores, views.values, out=self._attended)
        np.divide(self._parts, self._sums, out=self._heads)
        np.dot(self._y, layer.out, out=self._update)
        x += self._update

    def _feed(self, x: Floats, layer: _Layer) -> None:
        """Add the MLP's output to `x`."""
        places, edges, cells = self._places, self._edges, self._cells
        self._normalise(x)
        np.dot(self._normal, layer.fc, out=places)
        np.floor(places, out=edges)
        cells[:] = edges
        places -= edges
        self._engine.gelu_slopes.take(cells, mode="clip", out=edges)
        places *= edges
        self._engine.gelu_values.take(cells, mode="clip", out=edges)
        places += edges
        np.dot(self._hidden, layer.proj, out=self._update)
        x += self._update


def _normal(x: Floats) -> Floats:
    """Divide centred vectors `x` (..., C) by their root mean square: LayerNorm without gain and bias."""
    mean_square = np.einsum("...c,...c->...", x, x)[..., None] / np.float32(x.shape[-1])
    normal: Floats = x / np.sqrt(mean_square + np.float32(_LAYER_NORM_EPSILON))
    return normal
