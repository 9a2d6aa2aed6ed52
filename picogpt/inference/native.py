"""A model's weights, packed for `kernels/decode.c`.

Dimensions: H heads of D entries, C = n_embd.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.inference.layout import GROUP, PANEL, LayerStruct, MatrixStruct, ModelStruct, NumberType, declare_functions
from picogpt.inference.tensors import Floats, Tensors, check_largest

__all__ = ["NativeModel", "aligned", "padded"]

_TYPES = {"float32": NumberType.FLOAT32, "bfloat16": NumberType.BFLOAT16_PAIRS, "int8": NumberType.INT8_FOURS}
_PER_LINE = {"float32": 1, "bfloat16": 2, "int8": 4}
"""Inputs of an output that share 32 bits."""


def padded(count: int) -> int:
    """`count` rounded up to whole panels."""
    return -(-count // PANEL) * PANEL


def aligned(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Zeros that begin on a cache line."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array: npt.NDArray[Any] = memory[start : start + size].view(dtype).reshape(shape)
    return array


def _padded_array(array: Floats, *axes: int) -> Floats:
    """`array` with zeros up to a multiple of `PANEL` along `axes`."""
    shape = tuple(padded(n) if axis in axes else n for axis, n in enumerate(array.shape))
    result: Floats = aligned(shape, np.float32)
    result[tuple(map(slice, array.shape))] = array
    return result


class NativeModel:
    """A model's weights, packed for `decode.c`; they are not changed after that.

    Args:
        library: `decode.c`, compiled.
        tensors: the weights.
        dtype: the type of the matrices, float32, bfloat16 or int8. All else is float32, and in int8 the head is bfloat16.

    Raises:
        RunError: a weight is missing, of another shape or not finite.
    """

    def __init__(self, library: ctypes.CDLL, tensors: Tensors, dtype: str) -> None:
        declare_functions(library)
        config = self.config = tensors.config
        self.library, self.dtype, self._kept = library, dtype, []  # type: ctypes.CDLL, str, list[npt.NDArray[Any]]
        self.head_size = config.n_embd // config.n_head
        self._layers = (LayerStruct * config.n_layer)(*(self._layer(tensors, i) for i in range(config.n_layer)))
        C, embedding = config.n_embd, tensors.get("wte.weight", config.vocab_size, config.n_embd)
        self.struct = ModelStruct(
            tokens=self._keep(_padded_array(embedding, 1)),
            positions=self._keep(_padded_array(tensors.get("wpe.weight", config.context_len + 1, C), 1)),
            layers=ctypes.addressof(self._layers),
            lnf_weight=self._keep(_padded_array(tensors.get("ln_f.weight", C), 0)),
            lnf_bias=self._keep(_padded_array(tensors.bias("ln_f.bias", C), 0)),
            head=self._matrix(embedding, np.zeros(config.vocab_size, np.float32), "bfloat16" if dtype == "int8" else dtype),
            n_layer=config.n_layer,
            n_head=config.n_head,
            head_size=self.head_size,
            n_embd=C,
            slots=config.context_len + 1,
            vocab_size=config.vocab_size,
        )
        self.address = ctypes.addressof(self.struct)

    def _keep(self, array: npt.NDArray[Any]) -> int:
        """The address of `array`, which stays as long as the model does."""
        self._kept.append(array)
        return int(array.ctypes.data)

    def _layer(self, tensors: Tensors, index: int) -> LayerStruct:
        config, name = self.config, f"h.{index}."
        C, H, D = config.n_embd, config.n_head, self.head_size

        def vectors(what: str) -> tuple[Floats, Floats]:
            return tensors.get(f"{name}{what}.weight", C), tensors.bias(f"{name}{what}.bias", C)

        def linear(what: str, n_out: int, n_in: int) -> tuple[Floats, Floats]:
            return tensors.get(f"{name}{what}.weight", n_out, n_in), tensors.bias(f"{name}{what}.bias", n_out)

        # The rows of q, k and v go head by head, and each head is padded.
        qkv, qkv_bias = linear("attn.c_attn", 3 * C, C)
        by_head = _padded_array(qkv.reshape(3, H, D, C).swapaxes(0, 1), 2).reshape(-1, C)
        bias_by_head = _padded_array(qkv_bias.reshape(3, H, D).swapaxes(0, 1), 2).reshape(-1)
        proj, proj_bias = linear("attn.c_proj", C, C)
        (ln1_weight, ln1_bias), (ln2_weight, ln2_bias) = vectors("ln_1"), vectors("ln_2")
        fc, fc_bias = linear("mlp.c_fc", 4 * C, C)
        check_largest(fc * ln2_weight, fc @ ln2_bias + fc_bias)
        return LayerStruct(
            ln1_weight=self._keep(_padded_array(ln1_weight, 0)),
            ln1_bias=self._keep(_padded_array(ln1_bias, 0)),
            qkv=self._matrix(by_head, bias_by_head),
            proj=self._matrix(_padded_array(proj.reshape(C, H, D), 2).reshape(C, -1), proj_bias),
            ln2_weight=self._keep(_padded_array(ln2_weight, 0)),
            ln2_bias=self._keep(_padded_array(ln2_bias, 0)),
            fc=self._matrix(fc, fc_bias),
            out=self._matrix(*linear("mlp.c_proj", C, 4 * C)),
        )

    def _matrix(self, weight: Floats, bias: Floats, dtype: str | None = None) -> MatrixStruct:
        """Pack `weight` (out, in)."""
        dtype = dtype or self.dtype
        n_out, n_in = weight.shape
        per_line = _PER_LINE[dtype]
        lines = (-(-n_in // GROUP) * GROUP if dtype == "int8" else padded(n_in)) // per_line
        matrix = MatrixStruct(
            packed=self._keep(aligned((padded(n_out) // PANEL, lines, PANEL), np.uint32)),
            scales=self._keep(aligned((padded(n_out),), np.float32)),
            bias=self._keep(_padded_array(bias, 0)),
            type=_TYPES[dtype],
            n_out=padded(n_out),
            n_in=padded(n_in),
            lines=lines,
        )
        rows = np.ascontiguousarray(weight)
        self.library.pack(ctypes.addressof(matrix), rows.ctypes.data, n_out, n_in)
        return matrix
