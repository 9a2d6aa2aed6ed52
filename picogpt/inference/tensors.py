"""A model's weights by name, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.config import GPTConfig
from picogpt.errors import RunError
from picogpt.tokenizer import VOCAB_SIZE

__all__ = ["Floats", "Tensors", "check_largest"]

Floats = npt.NDArray[np.float32]

_GELU_CEILING = 4096
"""Largest input of a GELU that is taken for sound; those of a trained model stay below a hundred."""


def check_largest(fc: Floats, bias: Floats) -> float:
    """The largest number that a layer can put into its GELU: the norm of its input is at most sqrt(C) (Cauchy-Schwarz).

    Args:
        fc: (4C, C), with the gain of the LayerNorm before it.
        bias: (4C,), with that LayerNorm's bias.

    Raises:
        RunError: it is beyond all bounds.
    """
    norms = np.sqrt(np.einsum("oi,oi->o", fc, fc) * fc.shape[1])
    largest = float((norms + bias).max())
    if not largest <= _GELU_CEILING:
        raise RunError(f"the weights have diverged: numbers up to {largest:.3g} may occur; train with a smaller --lr")
    return largest


class Tensors:
    """The weights of one model; each is read when it is asked for, so that all need not be in memory at once.

    Args:
        config: the model's shape.
        arrays: its state dict as arrays, nanoGPT's names; `lm_head.weight` may be missing, as it is the embedding.

    Raises:
        RunError: the vocabulary is another.
    """

    def __init__(self, config: GPTConfig, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        if config.vocab_size != VOCAB_SIZE:
            raise RunError(
                f"the weights are of another model: a vocabulary of {config.vocab_size} where {VOCAB_SIZE} ids are known"
            )
        self.config, self._arrays = config, arrays

    def get(self, name: str, *shape: int) -> Floats:
        """Weight `transformer.{name}` in float32.

        Raises:
            RunError: it is missing, of another shape or not finite.
        """
        name = f"transformer.{name}"
        array = self._arrays.get(name)
        if array is None or array.shape != shape:
            found = "none" if array is None else array.shape
            raise RunError(f"the weights are of another model: {name} should have shape {shape}, got {found}")
        weight: Floats = array.astype(np.float32, copy=False)
        if not np.isfinite(weight).all():
            raise RunError(f"the weights are damaged or have diverged: {name} has values that are not finite")
        return weight

    def bias(self, name: str, size: int) -> Floats:
        """Bias `transformer.{name}` (size,), or zeros where the model has none.

        Raises:
            RunError: see `get`.
        """
        return self.get(name, size) if self.config.bias else np.zeros(size, np.float32)
