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
from dataclasses import dataclass

import numpy as np

from picogpt.inference.tensors import Floats, Tensors, check_largest

__all__ = ["Layer", "Weights"]

_GELU_FLOOR = 6
"""Below minus this, GELU is taken for 0; it is within 6e-9 of it."""
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
    """A block's weights: each matrix is (inputs + 1, outputs), the bias in its last row."""

    qkv: Floats  # (C + 1, 3C)
    out: Floats  # (C + 1, C)
    fc: Floats  # (C + 1, 4C), times _GELU_STEPS, from the beginning of the GELU's table
    proj: Floats  # (4C + 1, C)
    largest_input: float
    """The largest number that its GELU can be given."""


class Weights:
    """All weights of a model, ready to run.

    Args:
        tensors: the weights as they were trained.

    Raises:
        RunError: a weight is missing, of another shape, not finite or beyond all bounds.
    """

    def __init__(self, tensors: Tensors) -> None:
        config = self.config = tensors.config
        C = config.n_embd
        embedding = tensors.get("wte.weight", config.vocab_size, C)
        self.wte = _centred(embedding)  # (V, C)
        self.wpe = _centred(tensors.get("wpe.weight", config.context_len + 1, C))  # (S, C)
        self.layers = [self._layer(tensors, f"h.{i}.") for i in range(config.n_layer)]
        self.final_gain, self.final_bias = tensors.get("ln_f.weight", C), tensors.bias("ln_f.bias", C)
        self.head = np.vstack(((embedding * self.final_gain).T, embedding @ self.final_bias))  # (C + 1, V)
        self.gelu_values, self.gelu_slopes = _gelu_table(max(layer.largest_input for layer in self.layers))

    def _layer(self, tensors: Tensors, name: str) -> Layer:
        C, D = self.config.n_embd, self.config.n_embd // self.config.n_head
        gain, bias = tensors.get(name + "ln_1.weight", C), tensors.bias(name + "ln_1.bias", C)
        qkv = tensors.get(name + "attn.c_attn.weight", 3 * C, C)
        qkv_bias = qkv @ bias + tensors.bias(name + "attn.c_attn.bias", 3 * C)
        value_bias = qkv_bias[2 * C :].copy()
        qkv_bias[C:] = 0
        qkv = np.vstack(((qkv * gain).T, qkv_bias))
        qkv[:, :C] /= math.sqrt(D)
        out = tensors.get(name + "attn.c_proj.weight", C, C).T
        out_bias = tensors.bias(name + "attn.c_proj.bias", C) + value_bias @ out
        gain, bias = tensors.get(name + "ln_2.weight", C), tensors.bias(name + "ln_2.bias", C)
        fc = tensors.get(name + "mlp.c_fc.weight", 4 * C, C)
        fc_bias = fc @ bias + tensors.bias(name + "mlp.c_fc.bias", 4 * C)
        proj = tensors.get(name + "mlp.c_proj.weight", C, 4 * C).T
        return Layer(
            qkv=qkv,
            out=_centred(np.vstack((out, out_bias))),
            fc=np.vstack(((fc * gain).T, fc_bias + np.float32(_GELU_FLOOR))) * np.float32(_GELU_STEPS),
            proj=_centred(np.vstack((proj, tensors.bias(name + "mlp.c_proj.bias", C)))),
            largest_input=check_largest(fc * gain, fc_bias),
        )


def _centred(array: Floats) -> Floats:
    """`array` (..., C) less its mean over the last axis, contiguous."""
    return np.ascontiguousarray(array - array.mean(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32))
