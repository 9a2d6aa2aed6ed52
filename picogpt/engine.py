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
- GELU(x) is max(x, 0) plus a small even correction, which is looked up in a table.

Dimensions: B texts side by side, n characters, k characters or slots at once, S slots of a window, C = n_embd, H = n_head,
D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.config import GPTConfig
from picogpt.errors import RunError
from picogpt.run import load_model

__all__ = ["Engine", "Window"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.integer[Any]]

_LAYER_NORM_EPSILON = 1e-5
_GELU_RANGE = 6.0
"""Beyond this distance from 0 the correction to max(x, 0) is below 1e-8."""
_GELU_STEPS = 1 << 15
"""Table entries per unit; the nearest one is off by at most 1/4 of a step: 8e-6."""


def _gelu_corrections() -> Floats:
    """GELU(x) - max(x, 0) at the middle of every table cell, times `_GELU_STEPS`."""
    x = np.arange(int(2 * _GELU_RANGE * _GELU_STEPS) + 1) / _GELU_STEPS - _GELU_RANGE
    z = np.abs(x) / math.sqrt(2)
    # erfc to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
    t = 1 / (1 + 0.3275911 * z)
    erfc = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))) * np.exp(-z * z)
    corrections = -np.abs(x) * erfc / 2 * _GELU_STEPS
    corrections[[0, -1]] = 0.0  # beyond the table
    return corrections.astype(np.float32)


@dataclass(frozen=True)
class _Layer:
    """A block's weights, rearranged; matrices are (inputs, outputs)."""

    qkv: Floats  # (C, 3C)
    q_bias: Floats  # (C,)
    out: Floats  # (C, C)
    out_bias: Floats  # (C,)
    fc: Floats  # (C, 4C), times _GELU_STEPS
    fc_bias: Floats  # (4C,), times _GELU_STEPS
    proj: Floats  # (4C, C), divided by _GELU_STEPS
    proj_bias: Floats  # (C,)


class Engine:
    """The model's weights, ready to run.

    Args:
        config: the model's shape.
        weights: its state dict as arrays, nanoGPT's names; `lm_head.weight` may be missing, as it is the embedding.

    Raises:
        RunError: a weight is missing or of another shape.
    """

    def __init__(self, config: GPTConfig, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        self.config = config
        self._weights = weights
        C, T = config.n_embd, "transformer."
        self.wte = _centred(self._get(T + "wte.weight", (config.vocab_size, C)))  # (V, C)
        self.wpe = _centred(self._get(T + "wpe.weight", (config.context_len + 1, C)))  # (S, C)
        self.layers = [self._layer(f"{T}h.{i}.") for i in range(config.n_layer)]
        self.final_gain = self._get(T + "ln_f.weight", (C,))
        self.final_bias = self._bias(T + "ln_f.bias", C)
        embedding = self._get(T + "wte.weight", (config.vocab_size, C))
        self.head = np.ascontiguousarray((embedding * self.final_gain).T)  # (C, V)
        self.head_bias = embedding @ self.final_bias  # (V,)
        self.gelu = _gelu_corrections()
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
        return array.astype(np.float32, copy=False)

    def _bias(self, name: str, size: int) -> Floats:
        return self._get(name, (size,)) if self.config.bias else np.zeros(size, np.float32)

    def _layer(self, name: str) -> _Layer:
        C, D = self.config.n_embd, self.config.n_embd // self.config.n_head
        gain, bias = self._get(name + "ln_1.weight", (C,)), self._bias(name + "ln_1.bias", C)
        qkv = self._get(name + "attn.c_attn.weight", (3 * C, C))
        qkv_bias = qkv @ bias + self._bias(name + "attn.c_attn.bias", 3 * C)
        qkv = qkv * gain
        qkv[:C] /= math.sqrt(D)
        out = _centred(self._get(name + "attn.c_proj.weight", (C, C)).T)  # (C, C)
        out_bias = _centred(self._bias(name + "attn.c_proj.bias", C)) + np.asarray(qkv_bias[2 * C :] @ out, np.float32)
        gain, bias = self._get(name + "ln_2.weight", (C,)), self._bias(name + "ln_2.bias", C)
        fc = self._get(name + "mlp.c_fc.weight", (4 * C, C))
        fc_bias = fc @ bias + self._bias(name + "mlp.c_fc.bias", 4 * C)
        return _Layer(
            qkv=np.ascontiguousarray(qkv.T),
            q_bias=qkv_bias[:C] / np.float32(math.sqrt(D)),
            out=out,
            out_bias=out_bias,
            fc=np.ascontiguousarray((fc * gain).T) * np.float32(_GELU_STEPS),
            fc_bias=fc_bias * np.float32(_GELU_STEPS),
            proj=_centred(self._get(name + "mlp.c_proj.weight", (C, 4 * C)).T) / np.float32(_GELU_STEPS),
            proj_bias=_centred(self._bias(name + "mlp.c_proj.bias", C)),
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
        self._keys = np.zeros((*shape, self._head_size, slots), np.float32)  # (L, B, H, D, S)
        self._values = np.ones((*shape, slots, self._head_size + 1), np.float32)  # (L, B, H, S, D + 1), a 1 at the end
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
        other._keys[...] = self._keys
        other._values[...] = self._values
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
        logits: Floats = read @ engine.head + engine.head_bias
        return logits

    def _advance(self, x: Floats) -> Floats:
        """Run slots `x` (B, k, C) through all layers, behind those that are cached; return them normalised (B, k, C)."""
        B, k, C = x.shape
        first, end = self._slots, self._slots + k
        for i, layer in enumerate(self._engine.layers):
            qkv = _normal(x) @ layer.qkv  # (B, k, 3C)
            qkv[..., :C] += layer.q_bias
            q, key, value = qkv.reshape(B, k, 3, self._n_head, self._head_size).transpose(2, 0, 3, 1, 4)  # each (B, H, k, D)
            self._keys[i, ..., first:end] = key.swapaxes(-1, -2)
            self._values[i, ..., first:end, :-1] = value
            scores = q @ self._keys[i, ..., :end]  # (B, H, k, S)
            if k > 1:
                scores += self._mask[first:end, :end]
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            y = scores @ self._values[i, ..., :end, :]  # (B, H, k, D + 1)
            y = (y[..., :-1] / y[..., -1:]).transpose(0, 2, 1, 3).reshape(B, k, C)  # (B, k, C)
            x = x + y @ layer.out + layer.out_bias
            hidden = _normal(x) @ layer.fc + layer.fc_bias  # (B, k, 4C)
            x = x + self._gelu(hidden) @ layer.proj + layer.proj_bias
        self._slots = end
        return _normal(x)

    def _gelu(self, x: Floats) -> Floats:
        """GELU of `x`, both times `_GELU_STEPS`; `x` is overwritten."""
        cells = (x + np.float32(_GELU_RANGE * _GELU_STEPS + 0.5)).astype(np.intp)
        corrections = self._engine.gelu.take(cells, mode="clip")
        np.maximum(x, 0, out=x)
        x += corrections
        return x


class _Step:
    """One character of one text: the sums of `Window._advance` with every array made beforehand and as few calls as can be.

    An array operation on a few hundred numbers costs mostly its call, so this is what decides the speed of generation.
    """

    def __init__(self, window: Window) -> None:
        engine = window._engine
        C, H, D = engine.config.n_embd, window._n_head, window._head_size
        self._engine, self._window = engine, window
        self._normal = np.empty(C, np.float32)
        self._qkv = np.empty(3 * C, np.float32)
        self._q, self._key, self._value = self._qkv[:C], self._qkv[C : 2 * C].reshape(H, D), self._qkv[2 * C :].reshape(H, D)
        self._q_rows = self._q.reshape(H, 1, D)
        self._scores = np.empty(H * (engine.config.context_len + 1), np.float32)
        self._attended = np.empty((H, 1, D + 1), np.float32)
        self._sums, self._parts = self._attended[:, 0, D:], self._attended[:, 0, :D]
        self._heads = np.empty((H, D), np.float32)
        self._y = self._heads.reshape(C)
        self._update = np.empty(C, np.float32)
        self._hidden = np.empty(4 * C, np.float32)
        self._shifted = np.empty(4 * C, np.float32)
        self._cells = np.empty(4 * C, np.intp)
        self._logits = np.empty(engine.config.vocab_size, np.float32)
        self._offset = np.float32(_GELU_RANGE * _GELU_STEPS + 0.5)

    def __call__(self, token: int, slot: int) -> Floats:
        """Read `token` into `slot`; return the logits (V,) of the character after it."""
        engine, window = self._engine, self._window
        x = engine.wte[token] + engine.wpe[slot]
        with np.errstate(over="ignore", invalid="ignore"):
            for layer, keys, values in zip(engine.layers, window._keys, window._values, strict=True):
                self._attend(x, layer, keys[0], values[0], slot)
                self._feed(x, layer)
            self._normalise(x)
            np.dot(self._normal, engine.head, out=self._logits)
        if not math.isfinite(self._logits.dot(self._logits)):
            return window._carefully(token)
        window._slots = slot + 1
        window._sum[0] += self._normal
        return self._logits + engine.head_bias

    def _normalise(self, x: Floats) -> None:
        np.multiply(x, 1.0 / math.sqrt(x.dot(x) / x.size + _LAYER_NORM_EPSILON), out=self._normal)

    def _attend(self, x: Floats, layer: _Layer, keys: Floats, values: Floats, slot: int) -> None:
        """Add the attention's output to `x`."""
        self._normalise(x)
        np.dot(self._normal, layer.qkv, out=self._qkv)
        q = self._q
        q += layer.q_bias
        keys[:, :, slot] = self._key
        values[:, slot, :-1] = self._value
        scores = self._scores[: keys.shape[0] * (slot + 1)].reshape(keys.shape[0], 1, slot + 1)
        np.matmul(self._q_rows, keys[:, :, : slot + 1], out=scores)
        np.exp(scores, out=scores)
        np.matmul(scores, values[:, : slot + 1], out=self._attended)
        np.divide(self._parts, self._sums, out=self._heads)
        np.dot(self._y, layer.out, out=self._update)
        x += self._update
        x += layer.out_bias

    def _feed(self, x: Floats, layer: _Layer) -> None:
        """Add the MLP's output to `x`."""
        hidden, cells, shifted = self._hidden, self._cells, self._shifted
        self._normalise(x)
        np.dot(self._normal, layer.fc, out=hidden)
        hidden += layer.fc_bias
        np.add(hidden, self._offset, out=shifted)
        cells[:] = shifted
        self._engine.gelu.take(cells, mode="clip", out=shifted)
        np.maximum(hidden, 0, out=hidden)
        hidden += shifted
        np.dot(hidden, layer.proj, out=self._update)
        x += self._update
        x += layer.proj_bias


def _normal(x: Floats) -> Floats:
    """Divide centred vectors `x` (..., C) by their root mean square: LayerNorm without gain and bias."""
    mean_square = np.einsum("...c,...c->...", x, x)[..., None] / np.float32(x.shape[-1])
    normal: Floats = x / np.sqrt(mean_square + np.float32(_LAYER_NORM_EPSILON))
    return normal
