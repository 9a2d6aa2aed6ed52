"""A model's weights, packed for the GEMM and GEMV of `kernels/csrc/decode.c`.

A packed matrix is a sequence of panels of `PANEL` outputs. Within a panel the values of all its outputs for the same inputs
are adjacent, so that one vector load serves `PANEL` outputs.

Dimensions: H heads of D entries, C = n_embd, V = vocab_size.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.inference.layout import GROUP, PANEL, LayerStruct, MatrixStruct, ModelStruct, NumberType, declare_functions
from picogpt.inference.tensors import Floats, WeightReader, check_largest

__all__ = ["MAX_WORKERS", "NativeModel", "aligned", "padded"]

MAX_WORKERS = 64
"""Most threads that work on a model, the caller's included; `MAX_THREADS` in threads.h."""

_TYPES = {"float32": NumberType.FLOAT32, "bfloat16": NumberType.BFLOAT16_PAIRS, "int8": NumberType.INT8_FOURS}
_INPUTS_PER_WORD = {"float32": 1, "bfloat16": 2, "int8": 4}
"""Inputs of one output that share a 32-bit word; `inputs_per_word` in C."""


def padded(count: int) -> int:
    """Round `count` up to whole panels."""
    return -(-count // PANEL) * PANEL


def aligned(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Return zeros aligned to a cache line (64 bytes)."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    # numpy aligns to 16 bytes only, so allocate a line more and start at the first boundary.
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array: npt.NDArray[Any] = memory[start : start + size].view(dtype).reshape(shape)
    return array


def _padded_array(array: Floats, *axes: int) -> Floats:
    """Pad `array` with zeros to a multiple of `PANEL` along `axes`, so that the kernels need no code for remainders."""
    shape = tuple(padded(n) if axis in axes else n for axis, n in enumerate(array.shape))
    result: Floats = aligned(shape, np.float32)
    result[tuple(map(slice, array.shape))] = array
    return result


class NativeModel:
    """A model's weights, packed for `decode.c`; immutable afterwards.

    Args:
        library: the compiled `decode.c`.
        tensors: the weights.
        dtype: type of the matrices: float32, bfloat16 or int8. Vectors are float32; with int8 the head is bfloat16.
        threads: number of layers that are read and packed at a time.

    Raises:
        RunError: a weight is missing, has another shape, is not finite or has diverged.
    """

    def __init__(self, library: ctypes.CDLL, tensors: WeightReader, dtype: str, threads: int = 1) -> None:
        declare_functions(library)
        config = self.config = tensors.config
        self.library, self.dtype, self._arrays = library, dtype, []  # type: ctypes.CDLL, str, list[npt.NDArray[Any]]
        self.head_size = config.n_embd // config.n_head
        # numpy and the kernels release the interpreter's lock, so threads pack beside one another.
        with ThreadPoolExecutor(threads) as pool:
            layers = pool.map(lambda i: self._layer(tensors, i), range(config.n_layer))
            self._layers = (LayerStruct * config.n_layer)(*layers)
        C, embedding = config.n_embd, tensors.get("wte.weight", config.vocab_size, config.n_embd)
        # The embedding is used twice: as rows for the lookup, and packed as the head (nanoGPT ties the two).
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
        """Return the data pointer of `array`, and keep the array alive as long as the model."""
        self._arrays.append(array)
        return int(array.ctypes.data)

    def _layer(self, tensors: WeightReader, index: int) -> LayerStruct:
        config, name = self.config, f"h.{index}."
        C, H, D = config.n_embd, config.n_head, self.head_size

        def layer_norm(module: str) -> tuple[Floats, Floats]:
            return tensors.get(f"{name}{module}.weight", C), tensors.bias(f"{name}{module}.bias", C)

        def linear(module: str, n_out: int, n_in: int) -> tuple[Floats, Floats]:
            return tensors.get(f"{name}{module}.weight", n_out, n_in), tensors.bias(f"{name}{module}.bias", n_out)

        # (3, H, D) rows become (H, 3, DP): a head's q, k and v are adjacent in the output, each padded to DP.
        qkv, qkv_bias = linear("attn.c_attn", 3 * C, C)
        by_head = _padded_array(qkv.reshape(3, H, D, C).swapaxes(0, 1), 2).reshape(-1, C)
        bias_by_head = _padded_array(qkv_bias.reshape(3, H, D).swapaxes(0, 1), 2).reshape(-1)
        proj, proj_bias = linear("attn.c_proj", C, C)
        (ln1_weight, ln1_bias), (ln2_weight, ln2_bias) = layer_norm("ln_1"), layer_norm("ln_2")
        fc, fc_bias = linear("mlp.c_fc", 4 * C, C)
        # The bound is that of `fc` with the LayerNorm before it folded in; only the check uses the folded values.
        check_largest(fc * ln2_weight, fc @ ln2_bias + fc_bias)
        return LayerStruct(
            ln1_weight=self._keep(_padded_array(ln1_weight, 0)),
            ln1_bias=self._keep(_padded_array(ln1_bias, 0)),
            qkv=self._matrix(by_head, bias_by_head),
            # The projection's inputs are the padded heads, so its columns are padded in the same way.
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
        per_word = _INPUTS_PER_WORD[dtype]
        # A line is one word for each output of a panel. int8 inputs are padded to whole groups.
        lines = (-(-n_in // GROUP) * GROUP if dtype == "int8" else padded(n_in)) // per_word
        matrix = MatrixStruct(
            packed=self._keep(aligned((padded(n_out) // PANEL, lines, PANEL), np.uint32)),
            scales=self._keep(aligned((padded(n_out),), np.float32)),  # only int8 uses the scales
            bias=self._keep(_padded_array(bias, 0)),
            type=_TYPES[dtype],
            n_out=padded(n_out),
            n_in=padded(n_in),
            lines=lines,
        )
        # C rounds, quantizes and reorders, so that packing and unpacking stand in one file.
        rows = np.ascontiguousarray(weight)
        self.library.pack(ctypes.addressof(matrix), rows.ctypes.data, n_out, n_in)
        return matrix
