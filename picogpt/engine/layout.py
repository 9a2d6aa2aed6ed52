"""The structures of `kernels/decode.c`, and its functions: names, fields and order are those of their twins in C.

Sizes are compared when the library is loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

__all__ = [
    "STRUCTURES",
    "DecodeStruct",
    "LayerStruct",
    "MatrixStruct",
    "ModelStruct",
    "PrefillStruct",
    "SamplingStruct",
    "ScoringStruct",
    "WindowsStruct",
    "declare_functions",
]


def _pointers(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


def _int32(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int32) for name in names.split()]


def _doubles(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_double) for name in names.split()]


class MatrixStruct(ctypes.Structure):
    """A packed matrix."""

    _fields_ = (*_pointers("packed scales bias"), *_int32("type n_out n_in lines"))


class LayerStruct(ctypes.Structure):
    """The weights of one layer."""

    _fields_ = (
        *_pointers("gain_1 bias_1"),
        *((name, MatrixStruct) for name in ("qkv", "proj")),
        *_pointers("gain_2 bias_2"),
        *((name, MatrixStruct) for name in ("fc", "out")),
    )


class ModelStruct(ctypes.Structure):
    """All weights, and the model's shape."""

    _fields_ = (
        *_pointers("tokens positions layers final_gain final_bias"),
        ("head", MatrixStruct),
        *_int32("n_layer n_head head_size n_embd slots vocab_size"),
    )


class WindowsStruct(ctypes.Structure):
    """The KV cache of several windows."""

    _fields_ = (*_pointers("keys values sums contexts"), *_int32("texts filled cache reserved"))


class SamplingStruct(ctypes.Structure):
    """How ids are drawn."""

    _fields_ = (*_doubles("temperature top_p min_p"), *_pointers("allowed"), *_int32("top_k reserved"))


class PrefillStruct(ctypes.Structure):
    """A request to read ids."""

    _fields_ = (*_pointers("model windows ids logits workspace"), *_int32("length every threads reserved"))


class DecodeStruct(ctypes.Structure):
    """A request to read and draw ids in turns."""

    _fields_ = (*_pointers("model windows sampling ids numbers drawn workspace"), *_int32("count threads"))


class ScoringStruct(ctypes.Structure):
    """A request for the losses of whole windows."""

    _fields_ = (*_pointers("model ids contexts losses means workspace"), *_int32("windows length threads reserved"))


STRUCTURES: Sequence[type[ctypes.Structure]] = (
    MatrixStruct, LayerStruct, ModelStruct, WindowsStruct, SamplingStruct, PrefillStruct, DecodeStruct, ScoringStruct,
)  # fmt: skip
"""In the order of `structure_sizes` in C."""


def declare_functions(library: ctypes.CDLL) -> None:
    """Compare the sizes of all structures, and declare what the functions take and return."""
    sizes = list((ctypes.c_int32 * len(STRUCTURES)).in_dll(library, "structure_sizes"))
    assert sizes == [ctypes.sizeof(structure) for structure in STRUCTURES], sizes
    pointer, number = ctypes.c_void_p, ctypes.c_int
    for name, arguments, result in (
        ("workspace_bytes", [pointer, number, number], ctypes.c_long),
        ("scoring_bytes", [pointer, number, number], ctypes.c_long),
        ("prefill", [pointer], None),
        ("decode", [pointer], None),
        ("score", [pointer], None),
        ("pack", [pointer, pointer, number, number], None),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
