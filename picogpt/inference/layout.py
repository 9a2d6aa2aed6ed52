"""ctypes declarations of the structures, constants and functions of `kernels/csrc/decode.c`.

Names, fields and their order match the C declarations, which also say what each field holds. Every offset, size and value is
compared when the library is loaded: a field in the wrong place would be a write to foreign memory.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int32, c_void_p
from enum import IntEnum

from picogpt.kernels.layout import compare_layouts, fields_of

__all__ = [
    "GROUP",
    "PANEL",
    "STRUCTURES",
    "CacheType",
    "DecodeStruct",
    "LayerStruct",
    "MatrixStruct",
    "ModelStruct",
    "NumberType",
    "PrefillStruct",
    "SamplingStruct",
    "ScoringStruct",
    "WindowsStruct",
    "declare_functions",
]


class MatrixStruct(ctypes.Structure):
    """A packed matrix, in panels of `PANEL` outputs."""

    _fields_ = (*fields_of(c_void_p, "packed scales bias"), *fields_of(c_int32, "type n_out n_in lines"))


class LayerStruct(ctypes.Structure):
    """The weights of one layer."""

    _fields_ = (
        *fields_of(c_void_p, "ln1_weight ln1_bias"),
        *fields_of(MatrixStruct, "qkv proj"),
        *fields_of(c_void_p, "ln2_weight ln2_bias"),
        *fields_of(MatrixStruct, "fc out"),
    )


class ModelStruct(ctypes.Structure):
    """The model's weights and shape."""

    _fields_ = (
        *fields_of(c_void_p, "tokens positions layers lnf_weight lnf_bias"),
        ("head", MatrixStruct),
        *fields_of(c_int32, "n_layer n_head head_size n_embd slots vocab_size"),
    )


class WindowsStruct(ctypes.Structure):
    """The KV cache of a batch of windows, and the sums of their outputs."""

    _fields_ = (*fields_of(c_void_p, "keys values sums contexts"), *fields_of(c_int32, "texts filled cache reserved"))


class SamplingStruct(ctypes.Structure):
    """Sampling parameters."""

    _fields_ = (
        *fields_of(c_double, "temperature top_p min_p"),
        *fields_of(c_void_p, "allowed"),
        *fields_of(c_int32, "top_k reserved"),
    )


class PrefillStruct(ctypes.Structure):
    """Arguments of `prefill`: read many ids of each text."""

    _fields_ = (*fields_of(c_void_p, "model windows ids logits workspace"), *fields_of(c_int32, "length every threads reserved"))


class DecodeStruct(ctypes.Structure):
    """Arguments of `decode`: read one id of each text and draw the next, `count` times."""

    _fields_ = (*fields_of(c_void_p, "model windows sampling ids uniforms drawn workspace"), *fields_of(c_int32, "count threads"))


class ScoringStruct(ctypes.Structure):
    """Arguments of `score`: the losses of whole windows."""

    _fields_ = (
        *fields_of(c_void_p, "model ids contexts losses means workspace"),
        *fields_of(c_int32, "windows length threads reserved"),
    )


# `reserved` fields fill each structure up to a multiple of 8 bytes, so that no compiler pads it in its own way.
STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "matrix": MatrixStruct,
    "layer": LayerStruct,
    "model": ModelStruct,
    "windows": WindowsStruct,
    "sampling": SamplingStruct,
    "prefill": PrefillStruct,
    "decode": DecodeStruct,
    "scoring": ScoringStruct,
}
"""The structures, by their names in C."""
PANEL, GROUP = 16, 64
"""Outputs in a panel, and inputs that share a quantization scale in int8."""


class NumberType(IntEnum):
    """Number type of a packed matrix: `enum number_type`."""

    FLOAT32 = 0
    BFLOAT16_PAIRS = 1
    INT8_FOURS = 2


class CacheType(IntEnum):
    """Number type of a KV cache: `enum cache_type`."""

    CACHE_FLOAT32 = 0
    CACHE_BFLOAT16 = 1


def declare_functions(library: ctypes.CDLL) -> None:
    """Check this module against the library, and declare the arguments and results of its functions.

    Raises:
        AssertionError: decode.c and this module differ.
    """
    constants = {"PANEL": PANEL, "GROUP": GROUP, **NumberType.__members__, **CacheType.__members__}
    compare_layouts(library, STRUCTURES, constants, sides="decode.c and picogpt/inference/layout.py")
    pointer, number = c_void_p, ctypes.c_int
    for name, arguments, result in (
        ("workspace_bytes", [pointer, number, number], ctypes.c_long),
        ("scoring_bytes", [pointer, number, number], ctypes.c_long),
        ("prefill", [pointer], None),
        ("decode", [pointer], None),
        ("score", [pointer], None),
        ("pack", [pointer, pointer, number, number], None),
    ):
        function = getattr(library, name)
        # Without argtypes ctypes would pass addresses as 32-bit integers.
        function.argtypes, function.restype = arguments, result
