"""The functions of block.c: compiled for one shape of model by the machine's own C compiler, and called with tensors.

They are for the blocks and for Muon's updates of their matrices.

What stands between two products of matrices costs torch a pass over memory for every step of a formula, and attention over short
windows two copies more; in bfloat16, where products are fast, that is almost half of the time. Here it is one pass each, and
attention stays in the processor's cache a head at a time, so that its weights are never stored (as in FlashAttention: Dao et al.,
2022). What is cheap to compute again in the backward pass is not kept for it. Matrices are packed once a step for all windows,
and a window is one call, so that threads seldom wait for each other, and never for Python.

Dimensions: R rows, one for each slot of each roll; B rolls, S slots of a window, C = n_embd, H = n_head.
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
    MatrixGrad,
    MuonMatrix,
    MuonSettings,
    Pass,
    PassGrads,
    Save,
    check_layout,
)
from picogpt.kernels.build import load_library

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
"""Sums may be taken in another order, for vector instructions; what is not a number stays so, unlike with -ffast-math."""
INSTRUCTIONS = {"AVX512": "-march=native -mprefer-vector-width=512", "AVX2": "-mavx2 -mfma"}
"""The vector instructions that the functions were measured with, and more flags for each."""
_LANES = 4
"""Entries of the shortest vectors, which a head is cut into."""
_MAX_CONTEXT_LEN = 512
"""Beyond it a head's scores no longer fit in a core's cache, which is what the functions live by."""
_FUNCTIONS: dict[str, tuple[object, Sequence[object]]] = {
    "pack": (None, (c_void_p, c_void_p, c_int, c_int)),
    "forward": (None, (POINTER(Pass), c_void_p)),
    "backward": (None, (POINTER(Pass), POINTER(PassGrads))),
    "weight_grad": (None, (POINTER(MatrixGrad), c_void_p)),
    "update_matrices": (None, (POINTER(MuonMatrix), POINTER(MuonSettings), c_void_p)),
    "uses_matrix_tiles": (c_int, ()),
    "panel_columns": (c_int, ()),
    "workspace_elems": (c_long, (c_int,)),
}
"""What each function of block.c returns and takes."""


class WorkspaceSpec(NamedTuple):
    """What blocks are used for, which says what they need room for."""

    n_layer: int
    sequences: int
    slots: tuple[int, ...]
    """Of each window of the text."""
    trained: bool
    """Whether there will be a backward pass."""
    recompute: bool
    """Whether a block's activations are computed again in the backward pass, instead of kept for it."""

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
    """What weight decay leaves of a weight."""
    step: float
    """Length of the step."""
    margin: float
    polynomials: Sequence[Sequence[float]]
    """Three coefficients of each Newton-Schulz iteration."""
    gram_reuse: Sequence[int]
    """How many iterations share a Gram matrix, one group after the other."""


class Kernels:
    """The functions, for tensors on the CPU that are contiguous.

    What enters and leaves a product of matrices is in `dtype`, all else is float32. Memory for what they write is given to them.
    Tensors are given by their addresses, in the structures of `picogpt.kernels.bindings`.

    Args:
        library: block.c, compiled.
        config: the shape it was compiled for.
        dtype: the type of what enters and leaves a matrix product.
        compiler: what compiled it.
    """

    def __init__(self, library: ctypes.CDLL, config: GPTConfig, dtype: torch.dtype, compiler: str) -> None:
        check_layout(library)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.dtype, self.compiler = dtype, compiler
        self.shape = (config.n_embd, config.n_head, config.context_len)
        self.threads = torch.get_num_threads()
        self._library = library
        self.has_amx = bool(library.uses_matrix_tiles())
        """Whether products are made by the processor's registers for tiles (AMX)."""
        self._panel = int(library.panel_columns())

    def packed(self, out: int, n_in: int) -> tuple[Tensor, Tensor]:
        """Memory for a matrix (out, in), packed as `pack` does it for the forward pass and for the backward pass."""
        forward, backward = (self._in_panels(*shape) for shape in ((n_in, out), (out, n_in)))
        return forward, backward

    def _in_panels(self, rows: int, columns: int) -> Tensor:
        return torch.empty(-(-columns // self._panel) * self._panel * rows, dtype=self.dtype)

    @cached_property
    def workspace(self) -> Tensor:
        """Workspace of all threads, for packed operands of weight gradients and for Muon."""
        return torch.empty(self._library.workspace_elems(self.threads), dtype=torch.float32)

    def pack(self, matrices: DataPtrs, packed: DataPtrs, layers: int) -> None:
        """Pack four matrices of each block: those of attention, its projection, and the MLP."""
        self._library.pack(matrices, packed, layers, self.threads)

    def forward(self, window: Pass, out: Tensor) -> None:
        """One window of all rolls through all blocks, from the first block's x to `out` (R, C)."""
        self._library.forward(byref(window), out.data_ptr())

    def backward(self, window: Pass, grads: PassGrads) -> None:
        """Turn the gradient of what `forward` gave, `grads.dx` (R, C), into that of the first block's x."""
        grads.workspace = self.workspace.data_ptr()
        self._library.backward(byref(window), byref(grads))

    def weight_grad(self, d_out: Tensor, x: Tensor, grad: Tensor) -> None:
        """Write the gradient (out, in), float32, of a matrix that rows x (N, in) were multiplied with, from d_out (N, out)."""
        shape = {"outputs": d_out.size(1), "inputs": x.size(1), "rows": x.size(0), "threads": self.threads}
        pointers = {"sums": grad.data_ptr(), "left": d_out.data_ptr(), "right": x.data_ptr()}
        self._library.weight_grad(byref(MatrixGrad(**pointers, **shape)), self.workspace.data_ptr())

    def can_update(self, rows: int, columns: int) -> bool:
        """Whether `update_matrices` takes this shape: those of the blocks, and the parts of the matrix for attention."""
        width = self.shape[0]
        return (rows, columns) in ((width, width), (width, 4 * width), (4 * width, width))

    def update_matrices(self, matrices: Sequence[Mapping[str, Tensor]], step: MuonStep) -> None:
        """Take a step of `picogpt.training.optim.Muon` with matrices of one shape, with products in `dtype`.

        Args:
            matrices: weights, gradient, momentum and mean_square of each, by name, contiguous and float32.
            step: the update's settings.
        """
        rows, columns = matrices[0]["weights"].shape
        table = (MuonMatrix * len(matrices))(*(structure_of(MuonMatrix, matrix) for matrix in matrices))
        coefficients = [value for polynomial in step.polynomials for value in polynomial]
        settings = MuonSettings(
            polynomials=(ctypes.c_float * len(coefficients))(*coefficients),
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
    """A structure whose fields are the addresses of these tensors, which have to outlive it."""
    names = [name for name, *_ in structure._fields_]
    assert tensors.keys() == set(names), f"{structure.__name__} has {names}, got {list(tensors)}"
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    return structure(*(tensors[name].data_ptr() for name in names))


def data_ptrs(tensors: Iterable[Tensor]) -> DataPtrs:
    """Those of tensors that have to outlive them."""
    found = [tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * len(found))(*found)


def kernels_name(kernels: Kernels | None) -> str:
    """What computes the blocks, as `picogpt.checks.KERNELS` calls it: c, or torch for None."""
    return "torch" if kernels is None else "c"


def _say_nothing(_: str) -> None:
    """For callers that have nobody to notify."""


def select_kernels(
    name: str, config: GPTConfig, dtype: torch.dtype, device: torch.device, notify: Callable[[str], None] = _say_nothing
) -> tuple[Kernels | None, str]:
    """Turn a name of `picogpt.checks.KERNELS` into the functions, or None for torch's own; and the reason in a few words.

    `auto` takes the functions wherever they can be made, on processors like those on which they were measured. `notify` is given
    a line when they are compiled, as they are once on each machine.

    Raises:
        TrainingError: `c` was asked for and cannot be had.
    """
    if name == "torch":
        return None, "as requested"
    reason = _unsupported_reason(config, device)
    if reason is None:
        try:
            made = compile_kernels(config, dtype, notify)
            return made, f"compiled by {made.compiler}" + (", with AMX" if made.has_amx else "")
        except BuildError as error:
            reason = str(error)
    if name == "c":
        raise TrainingError(f"--kernels c: {reason}; take --kernels torch")
    return None, reason


def _unsupported_reason(config: GPTConfig, device: torch.device) -> str | None:
    """Why a model cannot have the functions, or None."""
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


def compile_kernels(config: GPTConfig, dtype: torch.dtype, notify: Callable[[str], None] = _say_nothing) -> Kernels:
    """The functions for this shape of model, compiled now or at an earlier start.

    Raises:
        BuildError: there is no compiler, or none that makes a library which loads beside torch.
    """
    defines = {"WIDTH": config.n_embd, "HEAD": config.n_embd // config.n_head, "SLOTS": config.context_len + 1}
    flags = [*_FLAGS.split(), *INSTRUCTIONS.get(instruction_set(), "").split()]
    if dtype == torch.bfloat16:
        defines["BFLOAT16"] = 1
        if has_amx():
            defines["AMX"] = 1
    built = load_library(_SOURCE, defines, flags=flags, openmp=True, notify=notify)
    return Kernels(built.functions, config, dtype, built.compiler)
