"""The model's weights, rearranged once, when they are loaded, so that little is left to do for each character.

- Nothing but LayerNorms reads the residual stream, and each of them subtracts its mean. So everything that is written to
  the stream is centred beforehand, in the weights, and a norm is one scalar: the root of the mean square.
- A norm's gain and bias move into the matrix behind it, the attention's 1/sqrt(D) into the queries.
- The bias of the keys shifts all scores of a query alike and so cancels in the softmax; that of the values passes through
  it unchanged, because its weights add up to 1, and moves into the output's bias.
- GELU is read from a table with straight lines between its entries, fine enough to be off by less than 1e-6 and long enough
  for the largest value that a layer can put into it.
- Every bias is the last row of its matrix, for a 1 at the end of what the matrix is multiplied with.

Dimensions: S slots of a window, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.config import GPTConfig
from picogpt.errors import RunError
from picogpt.tokenizer import VOCAB_SIZE

__all__ = ["Floats", "Layer", "Weights"]

Floats = npt.NDArray[np.float32]

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
class Layer:
    """A block's weights, or the share of one process: each matrix is (inputs + 1, outputs), the bias in its last row."""

    qkv: Floats  # (C + 1, 3C)
    out: Floats  # (C + 1, C)
    fc: Floats  # (C + 1, 4C), times _GELU_STEPS, from the beginning of the GELU's table
    proj: Floats  # (4C + 1, C)

    def share(self, rank: int, size: int) -> Layer:
        """What process `rank` of `size` computes: its heads and its part of the MLP's inside.

        The outputs of all shares add up to the layer's (Shoeybi et al., 2019: Megatron-LM); the first one brings the biases.
        """
        C = self.out.shape[1]
        return Layer(
            qkv=np.concatenate([_columns(part, rank, size) for part in self.qkv.reshape(C + 1, 3, C).swapaxes(0, 1)], axis=1),
            out=_rows(self.out, rank, size),
            fc=np.ascontiguousarray(_columns(self.fc, rank, size)),
            proj=_rows(self.proj, rank, size),
        )

    def largest_input(self) -> float:
        """The largest number that this layer can put into its GELU: its input's norm is at most sqrt(C) (Cauchy-Schwarz)."""
        norms = np.sqrt(np.square(self.fc[:-1], dtype=np.float64).sum(axis=0) * (len(self.fc) - 1))
        return float((norms + self.fc[-1]).max() / _GELU_STEPS - _GELU_FLOOR)


def _columns(matrix: Floats, rank: int, size: int) -> Floats:
    """Part `rank` of `size` of the outputs of `matrix`."""
    width = matrix.shape[1] // size
    return matrix[:, rank * width : (rank + 1) * width]


def _rows(matrix: Floats, rank: int, size: int) -> Floats:
    """Part `rank` of `size` of the inputs of `matrix`; only the first has the bias, the others' is 0."""
    height = (len(matrix) - 1) // size
    bias = matrix[-1:] if rank == 0 else np.zeros_like(matrix[-1:])
    return np.concatenate((matrix[rank * height : (rank + 1) * height], bias))


class Weights:
    """All weights of a model, ready to run.

    Args:
        config: the model's shape.
        arrays: its state dict as arrays, nanoGPT's names; `lm_head.weight` may be missing, as it is the embedding.

    Raises:
        RunError: a weight is missing, of another shape, not finite or beyond all bounds, or the vocabulary is another.
    """

    def __init__(self, config: GPTConfig, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        if config.vocab_size != VOCAB_SIZE:
            raise RunError(
                f"the weights are of another model: a vocabulary of {config.vocab_size} where {VOCAB_SIZE} ids are known"
            )
        self.config = config
        self._arrays = arrays
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
        del self._arrays

    def _get(self, name: str, shape: tuple[int, ...]) -> Floats:
        array = self._arrays.get(name)
        if array is None or array.shape != shape:
            found = "none" if array is None else array.shape
            raise RunError(f"the weights are of another model: {name} should have shape {shape}, got {found}")
        weight: Floats = array.astype(np.float32, copy=False)
        if not np.isfinite(weight).all():
            raise RunError(f"the weights are damaged or have diverged: {name} has values that are not finite")
        return weight

    def _bias(self, name: str, size: int) -> Floats:
        return self._get(name, (size,)) if self.config.bias else np.zeros(size, np.float32)

    def _layer(self, name: str) -> Layer:
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
        return Layer(
            qkv=qkv,
            out=_centred(np.vstack((out, out_bias))),
            fc=np.vstack(((fc * gain).T, fc_bias + np.float32(_GELU_FLOOR))) * np.float32(_GELU_STEPS),
            proj=_centred(np.vstack((proj, self._bias(name + "mlp.c_proj.bias", C)))),
        )


def _centred(array: Floats) -> Floats:
    """`array` (..., C) less its mean over the last axis, contiguous."""
    return np.ascontiguousarray(array - array.mean(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32))
