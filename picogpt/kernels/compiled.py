"""The native kernels of block.c: compiled for one model shape by the machine's own C compiler, and called with tensors.

The kernels compute the model without its head, forward and backward, and Muon's updates of the blocks' matrices.

Between two GEMMs torch makes a pass over memory for every elementwise operation, and attention over short
windows makes two more copies; in bfloat16, where GEMMs are fast, that weighs most. Here it is one fused pass, and
attention stays in the processor's cache a head at a time, so that its weights are never stored (as in FlashAttention: Dao et al.,
2022). Activations that are cheap to recompute are not kept for the backward pass. Matrices are packed once a step for all
windows, and a batch is one call, so that threads seldom wait for each other, and never for Python.

Dimensions: B sequences, T characters of a sequence, C = n_embd.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from ctypes import POINTER, byref, c_int, c_long, c_void_p
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from picogpt.config import GPTConfig
from picogpt.device import has_amx, instruction_set
from picogpt.errors import BuildError, TrainingError
from picogpt.kernels.bindings import (
    Batch,
    BatchGrads,
    MatrixGrad,
    MuonMatrix,
    MuonSettings,
    Save,
    check_layout,
)
from picogpt.kernels.build import load_library
from picogpt.wording import say_nothing

__all__ = [
    "INSTRUCTIONS",
    "DataPtrs",
    "Kernels",
    "MuonStep",
    "WorkspaceSpec",
    "compile_kernels",
    "data_ptrs",
    "kernels_name",
    "select_kernels",
    "structure_of",
]

DataPtrs = ctypes.Array[c_void_p]
_S = TypeVar("_S", bound=ctypes.Structure)

_SOURCE = Path(__file__).parent / "csrc" / "block.c"
_FLAGS = "-std=gnu11 -O3 -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -freciprocal-math"
"""Sums may be reordered for SIMD; NaN and infinity keep their meaning, unlike with -ffast-math."""
INSTRUCTIONS = {"AVX512": "-march=native -mprefer-vector-width=512", "AVX2": "-mavx2 -mfma"}
"""SIMD instruction sets that the kernels were measured with, and the compiler's flags for each."""
_LANES = 4
"""Lanes of the shortest SIMD vectors; the head size must be a multiple."""
_MAX_CONTEXT_LEN = 512
"""Longest supported window: a head's attention scores have to fit in a core's cache."""
_FUNCTIONS: dict[str, tuple[object, Sequence[object]]] = {
    "pack": (None, (c_void_p, c_void_p, c_int, c_int)),
    "forward": (None, (POINTER(Batch),)),
    "backward": (None, (POINTER(Batch), POINTER(BatchGrads))),
    "weight_grad": (None, (POINTER(MatrixGrad), c_void_p)),
    "update_matrices": (None, (POINTER(MuonMatrix), POINTER(MuonSettings), c_void_p)),
    "uses_matrix_tiles": (c_int, ()),
    "panel_columns": (c_int, ()),
    "workspace_elems": (c_long, (c_int,)),
}
"""Return type and argument types of each function of block.c."""


class WorkspaceSpec(NamedTuple):
    """What a workspace is allocated for."""

    n_layer: int
    sequences: int
    slots: tuple[int, ...]
    """Slots of each window of the batch."""
    trained: bool
    """Whether there will be a backward pass."""
    recompute: bool
    """Whether activations are recomputed in the backward pass, instead of kept."""

    @property
    def save(self) -> Save:
        """How much the forward pass saves for the backward pass."""
        if not self.trained:
            return Save.NOTHING
        return Save.INPUTS if self.recompute else Save.ACTIVATIONS


class MuonStep(NamedTuple):
    """Settings of one of Muon's updates: fields of `picogpt.kernels.bindings.MuonSettings`."""

    momentum: float
    beta2: float
    decay: float
    """Factor of weight decay, 1 - lr * weight_decay."""
    step: float
    """Step size."""
    margin: float
    polynomials: Sequence[Sequence[float]]
    """Three coefficients of each Newton-Schulz iteration."""
    gram_reuse: Sequence[int]
    """How many iterations share a Gram matrix, one group after the other."""


class Kernels:
    """The native kernels, for contiguous tensors on the CPU.

    GEMM operands and results are in `dtype`, everything else is float32. Callers allocate the outputs.
    Tensors are passed as data pointers, in the structures of `picogpt.kernels.bindings`.

    Args:
        library: the compiled block.c.
        config: the model shape it was compiled for.
        dtype: type of GEMM operands and results.
        compiler: name of the compiler.
    """

    def __init__(self, library: ctypes.CDLL, config: GPTConfig, dtype: torch.dtype, compiler: str) -> None:
        # Before the first call: a structure that differs would make the kernels write to foreign memory.
        check_layout(library)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.dtype, self.compiler = dtype, compiler
        self.shape = (config.n_embd, config.n_head, config.context_len)
        # Fixed now, as buffers have a part for each thread and sums depend on their number.
        self.threads = torch.get_num_threads()
        self._library = library
        self.has_amx = bool(library.uses_matrix_tiles())
        """Whether GEMMs use AMX tile registers."""
        self._panel = int(library.panel_columns())

    def packed(self, out: int, n_in: int) -> tuple[Tensor, Tensor]:
        """Allocate the two packed copies of a matrix (out, in), for the forward pass and for the backward pass."""
        forward, backward = (self._in_panels(*shape) for shape in ((n_in, out), (out, n_in)))
        return forward, backward

    def _in_panels(self, rows: int, columns: int) -> Tensor:
        # Columns are rounded up to whole panels of SIMD width.
        return torch.empty(-(-columns // self._panel) * self._panel * rows, dtype=self.dtype)

    @cached_property
    def workspace(self) -> Tensor:
        """Scratch memory of all threads, for packed operands of weight gradients and for Muon."""
        return torch.empty(self._library.workspace_elems(self.threads), dtype=torch.float32)

    def pack(self, matrices: DataPtrs, packed: DataPtrs, layers: int) -> None:
        """Pack the four matrices of each block: attn.c_attn, attn.c_proj, mlp.c_fc and mlp.c_proj."""
        self._library.pack(matrices, packed, layers, self.threads)

    def forward(self, batch: Batch) -> None:
        """Compute the final hidden states `batch.hidden` (B, T, C) of a batch."""
        self._library.forward(byref(batch))

    def backward(self, batch: Batch, grads: BatchGrads) -> None:
        """Turn `grads.hidden` (B, T, C), the gradient of what `forward` computed, into the gradients of all weights."""
        grads.workspace = self.workspace.data_ptr()
        self._library.backward(byref(batch), byref(grads))

    def weight_grad(self, d_out: Tensor, x: Tensor, grad: Tensor) -> None:
        """Write a weight gradient (out, in), float32: grad = d_out^T x, with d_out (N, out) and the input x (N, in)."""
        shape = {"outputs": d_out.size(1), "inputs": x.size(1), "rows": x.size(0), "threads": self.threads}
        pointers = {"sums": grad.data_ptr(), "left": d_out.data_ptr(), "right": x.data_ptr()}
        self._library.weight_grad(byref(MatrixGrad(**pointers, **shape)), self.workspace.data_ptr())

    def can_update(self, rows: int, columns: int) -> bool:
        """Whether `update_matrices` supports this shape: (C, C), (C, 4C) or (4C, C)."""
        width = self.shape[0]
        return (rows, columns) in ((width, width), (width, 4 * width), (4 * width, width))

    def update_matrices(self, matrices: Sequence[Mapping[str, Tensor]], step: MuonStep) -> None:
        """Update matrices of one shape by a step of `picogpt.training.optim.Muon`, with products in `dtype`.

        Args:
            matrices: weights, gradient, momentum and mean_square of each matrix by name, contiguous and float32.
            step: the update's settings.
        """
        rows, columns = matrices[0]["weights"].shape
        table = (MuonMatrix * len(matrices))(*(structure_of(MuonMatrix, matrix) for matrix in matrices))
        coefficients = [value for polynomial in step.polynomials for value in polynomial]
        settings = MuonSettings(
            polynomials=(ctypes.c_float * len(coefficients))(*coefficients),
            # One entry more than values: the zero at its end terminates the list for C.
            gram_reuse=(ctypes.c_int32 * (len(step.gram_reuse) + 1))(*step.gram_reuse),
            momentum=step.momentum,
            beta2=step.beta2,
            decay=step.decay,
            step=step.step,
            margin=step.margin,
            rows=rows,
            columns=columns,
            matrices=len(matrices),
            threads=self.threads,
        )
        self._library.update_matrices(table, byref(settings), self.workspace.data_ptr())


def structure_of(structure: type[_S], tensors: Mapping[str, Tensor]) -> _S:
    """Return a structure whose fields are the data pointers of `tensors`, which the caller keeps alive."""
    names = [name for name, *_ in structure._fields_]
    # A missing field would be a null pointer in C.
    assert tensors.keys() == set(names), f"{structure.__name__} has {names}, got {list(tensors)}"
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    return structure(*(tensors[name].data_ptr() for name in names))


def data_ptrs(tensors: Iterable[Tensor]) -> DataPtrs:
    """Return the data pointers of `tensors`, which the caller keeps alive."""
    found = [tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * len(found))(*found)


def kernels_name(kernels: Kernels | None) -> str:
    """Return the name of `kernels` in `picogpt.checks.KERNELS`: c, or torch for None."""
    return "torch" if kernels is None else "c"


def select_kernels(
    name: str, config: GPTConfig, dtype: torch.dtype, device: torch.device, notify: Callable[[str], None] = say_nothing
) -> tuple[Kernels | None, str]:
    """Return the kernels for a name of `picogpt.checks.KERNELS`, or None for torch; and the reason in a few words.

    `auto` compiles the native kernels wherever they are supported, and falls back to torch. `notify` receives
    a line when they are compiled, once on each machine.

    Raises:
        TrainingError: `c` was requested and is not available.
    """
    if name == "torch":
        return None, "as requested"
    reason = _unsupported_reason(config, device)
    if reason is None:
        try:
            made = compile_kernels(config, dtype, notify)
            return made, f"compiled by {made.compiler}" + (", with AMX" if made.has_amx else "")
        except BuildError as error:
            # auto falls back to torch, and the reason is printed.
            reason = str(error)
    if name == "c":
        raise TrainingError(f"--kernels c: {reason}; take --kernels torch")
    return None, reason


def _unsupported_reason(config: GPTConfig, device: torch.device) -> str | None:
    """Return why the native kernels do not support this model here, or None."""
    if device.type != "cpu":
        return f"native kernels do not run on {device.type}"
    if config.dropout or not config.bias:
        return "native kernels do not support dropout or bias=False"
    if config.n_embd // config.n_head % _LANES:
        return f"native kernels need a head size that is a multiple of {_LANES}, got {config.n_embd // config.n_head}"
    if config.context_len > _MAX_CONTEXT_LEN:
        return f"native kernels support windows of at most {_MAX_CONTEXT_LEN}, got {config.context_len}"
    if instruction_set() not in INSTRUCTIONS:
        return f"native kernels need AVX2 or AVX512, and this processor has {instruction_set()}"
    return None


def compile_kernels(config: GPTConfig, dtype: torch.dtype, notify: Callable[[str], None] = say_nothing) -> Kernels:
    """Return the kernels for this model shape, compiled now or loaded from the cache.

    Raises:
        BuildError: there is no compiler, or none whose library can be loaded next to torch.
    """
    # Shapes are compile-time constants: loops have fixed lengths, and the compiler unrolls and vectorizes them.
    defines = {"WIDTH": config.n_embd, "HEAD": config.n_embd // config.n_head, "SLOTS": config.context_len + 1}
    flags = [*_FLAGS.split(), *INSTRUCTIONS.get(instruction_set(), "").split()]
    if dtype == torch.bfloat16:
        defines["BFLOAT16"] = 1
        if has_amx():
            # AMX tiles multiply bfloat16 only.
            defines["AMX"] = 1
    built = load_library(_SOURCE, defines, flags=flags, openmp=True, notify=notify)
    return Kernels(built.functions, config, dtype, built.compiler)
