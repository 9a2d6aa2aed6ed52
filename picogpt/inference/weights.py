"""The model's weights for numpy, transformed once at load time so that each character needs few operations.

- Only LayerNorms read the residual stream, and each subtracts the mean. So every matrix that writes to the stream is centred
  in advance, and a norm is a division by one scalar: the root mean square.
- A norm's gain and bias are folded into the matrix after it, the attention's 1/sqrt(D) into the queries.
- The bias of the keys shifts all scores of a query by the same amount, so it cancels in the softmax. The bias of the values
  passes through unchanged, because the softmax sums to 1, and is folded into the bias of the output projection.
- GELU is a lookup table with linear interpolation, off by less than 1e-6, and long enough for the largest input that a layer
  can produce.
- Each bias is the last row of its matrix; the input of the matrix ends in a 1.

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
from picogpt.inference.tensors import Floats, WeightReader, check_largest

__all__ = ["Layer", "Weights", "check_weights"]

_GELU_FLOOR = 6
"""Below minus this value GELU is taken as 0; it is within 6e-9 of 0 there."""
_GELU_STEPS = 512
"""Table entries per unit; linear interpolation between them is off by at most 4e-7."""


def _gelu_table(largest: float) -> tuple[Floats, Floats]:
    """Tabulate GELU from -`_GELU_FLOOR` to `largest` in steps of 1 / `_GELU_STEPS`: values, and differences to the next value."""
    edges = np.arange(-_GELU_FLOOR * _GELU_STEPS, math.ceil(largest + 1) * _GELU_STEPS) / _GELU_STEPS
    # From +_GELU_FLOOR on GELU(x) = x to float32 precision, so erfc is evaluated only below it.
    curved = edges < _GELU_FLOOR
    # GELU(x) = x Phi(x) = x erfc(-x / sqrt 2) / 2
    values = edges.copy()
    values[curved] = [x * math.erfc(-x / math.sqrt(2)) / 2 for x in edges[curved].tolist()]
    slopes = np.diff(values, append=0.0)
    values[0] = slopes[0] = 0.0  # inputs below the table are clipped to the first entry
    return values.astype(np.float32), slopes.astype(np.float32)


@dataclass(frozen=True)
class Layer:
    """A block's weights; each matrix is (inputs + 1, outputs), with the bias as its last row."""

    qkv: Floats  # (C + 1, 3C)
    out: Floats  # (C + 1, C)
    fc: Floats  # (C + 1, 4C), scaled and shifted so that its output indexes the GELU table
    proj: Floats  # (4C + 1, C)
    largest_input: float
    """Upper bound of the GELU inputs."""


def check_weights(config: GPTConfig, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Check that the engine can run a model.

    Raises:
        RunError: see `Weights`.
    """
    Weights(WeightReader(config, arrays))


class Weights:
    """All weights of a model, transformed for numpy.

    Args:
        tensors: the weights as trained.

    Raises:
        RunError: a weight is missing, has another shape, is not finite or has diverged.
    """

    def __init__(self, tensors: WeightReader) -> None:
        config = self.config = tensors.config
        C = config.n_embd
        embedding = tensors.get("wte.weight", config.vocab_size, C)
        self.wte = _centred(embedding)  # (V, C)
        self.wpe = _centred(tensors.get("wpe.weight", config.context_len + 1, C))  # (S, C)
        self.layers = [self._layer(tensors, f"h.{i}.") for i in range(config.n_layer)]
        # The final norm's gain and bias are kept too: the context vector is a mean of its full outputs.
        self.final_gain, self.final_bias = tensors.get("ln_f.weight", C), tensors.bias("ln_f.bias", C)
        self.head = np.vstack(((embedding * self.final_gain).T, embedding @ self.final_bias))  # (C + 1, V)
        # One table serves all layers, as long as the widest of them needs.
        self.gelu_values, self.gelu_slopes = _gelu_table(max(layer.largest_input for layer in self.layers))

    def _layer(self, tensors: WeightReader, name: str) -> Layer:
        C, D = self.config.n_embd, self.config.n_embd // self.config.n_head
        # W (gain * x + bias) + b = (W * gain) x + (W bias + b): LayerNorm folded into the matrix after it.
        gain, bias = tensors.get(name + "ln_1.weight", C), tensors.bias(name + "ln_1.bias", C)
        qkv = tensors.get(name + "attn.c_attn.weight", 3 * C, C)
        qkv_bias = qkv @ bias + tensors.bias(name + "attn.c_attn.bias", 3 * C)
        # Only the queries keep their bias: that of the keys cancels, that of the values moves to the output.
        value_bias = qkv_bias[2 * C :].copy()
        qkv_bias[C:] = 0
        qkv = np.vstack(((qkv * gain).T, qkv_bias))
        qkv[:, :C] /= math.sqrt(D)  # scores = q k / sqrt(D)
        out = tensors.get(name + "attn.c_proj.weight", C, C).T
        out_bias = tensors.bias(name + "attn.c_proj.bias", C) + value_bias @ out
        gain, bias = tensors.get(name + "ln_2.weight", C), tensors.bias(name + "ln_2.bias", C)
        fc = tensors.get(name + "mlp.c_fc.weight", 4 * C, C)
        fc_bias = fc @ bias + tensors.bias(name + "mlp.c_fc.bias", 4 * C)
        proj = tensors.get(name + "mlp.c_proj.weight", C, 4 * C).T
        return Layer(
            qkv=qkv,
            out=_centred(np.vstack((out, out_bias))),
            # The table index of x is (x + _GELU_FLOOR) * _GELU_STEPS.
            fc=np.vstack(((fc * gain).T, fc_bias + np.float32(_GELU_FLOOR))) * np.float32(_GELU_STEPS),
            proj=_centred(np.vstack((proj, tensors.bias(name + "mlp.c_proj.bias", C)))),
            largest_input=check_largest(fc * gain, fc_bias),
        )


def _centred(array: Floats) -> Floats:
    """Return `array` (..., C) minus its mean over the last axis, contiguous."""
    # The mean is taken in float64, so that the result is centred to float32 precision.
    return np.ascontiguousarray(array - array.mean(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32))
