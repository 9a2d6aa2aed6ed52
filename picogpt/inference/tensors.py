"""A model's weights by name, validated as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.config import GPTConfig
from picogpt.errors import RunError

__all__ = ["Floats", "WeightReader", "check_largest", "to_bfloat16"]

Floats = npt.NDArray[np.float32]

_GELU_CEILING = 4096
"""Largest GELU input that is accepted; those of a trained model stay below a hundred."""


def check_largest(fc: Floats, bias: Floats) -> float:
    """Return an upper bound of a layer's GELU inputs.

    An output of `fc` is w x + b, where x is a normalised vector, so |x| <= sqrt(C). By Cauchy-Schwarz it is at most
    |w| sqrt(C) + b, over all rows w of `fc`.

    Args:
        fc: (4C, C), with the gain of the LayerNorm before it.
        bias: (4C,), with that LayerNorm's bias.

    Raises:
        RunError: the bound exceeds `_GELU_CEILING`, so the weights have diverged.
    """
    # einsum computes the squared row norms without a temporary (4C, C).
    norms = np.sqrt(np.einsum("oi,oi->o", fc, fc) * fc.shape[1])
    largest = float((norms + bias).max())
    if not largest <= _GELU_CEILING:  # true for NaN as well
        raise RunError(f"the weights have diverged: activations may reach {largest:.3g}; train with a smaller --lr")
    return largest


def to_bfloat16(array: Floats) -> npt.NDArray[np.uint16]:
    """Round `array` to bfloat16, the upper half of float32: to nearest, ties to even."""
    bits = array.view(np.uint32)
    # Adding 0x7FFF rounds ties down; the lowest bit that is kept adds 1 where that makes the result even.
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return rounded


class WeightReader:
    """The weights of one model, each read on demand, so that they need not all be in memory at once.

    Args:
        config: the model's shape.
        arrays: its state dict as arrays, nanoGPT's names; `lm_head.weight` may be missing, as it is tied to the embedding.
    """

    def __init__(self, config: GPTConfig, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self.config, self._arrays = config, arrays

    def get(self, name: str, *shape: int) -> Floats:
        """Return weight `transformer.{name}` in float32.

        Raises:
            RunError: the weight is missing, has another shape or is not finite.
        """
        name = f"transformer.{name}"
        array = self._arrays.get(name)
        if array is None or array.shape != shape:
            found = "none" if array is None else array.shape
            raise RunError(f"the weights are of another model: {name} should have shape {shape}, got {found}")
        weight: Floats = array.astype(np.float32, copy=False)  # a bfloat16 file is float32 by now
        # NaN weights would raise nothing later: every logit would be NaN.
        if not np.isfinite(weight).all():
            raise RunError(f"the weights are damaged or have diverged: {name} has values that are not finite")
        return weight

    def bias(self, name: str, size: int) -> Floats:
        """Return bias `transformer.{name}` (size,), or zeros if the model has no biases.

        Raises:
            RunError: see `get`.
        """
        return self.get(name, size) if self.config.bias else np.zeros(size, np.float32)
