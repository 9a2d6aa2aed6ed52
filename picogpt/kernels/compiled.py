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
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from picogpt.config import GPTConfig
from picogpt.device import has_matrix_tiles, instruction_set
from picogpt.errors import BuildError, TrainingError
from picogpt.kernels.build import load_library

__all__ = ["INSTRUCTIONS", "Addresses", "Kernels", "Use", "addresses", "choose_kernels", "compile_kernels", "kernels_name"]

Addresses = ctypes.Array[ctypes.c_void_p]

_SOURCE = Path(__file__).with_name("block.c")
_FLAGS = "-std=gnu11 -O3 -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -freciprocal-math"
"""Sums may be taken in another order, for vector instructions; what is not a number stays so, unlike with -ffast-math."""
INSTRUCTIONS = {"AVX512": "-march=native -mprefer-vector-width=512", "AVX2": "-mavx2 -mfma"}
"""The vector instructions that the functions were measured with, and more flags for each."""
_LANES = 4
"""Entries of the shortest vectors, which a head is cut into."""
_MAX_CONTEXT_LEN = 512
"""Beyond it a head's scores no longer fit in a core's cache, which is what the functions live by."""
_ARGUMENTS = {"pack": (2, 2), "forward": (3, 6), "backward": (6, 5), "gradient_of_matrix": (4, 4), "update_matrices": (4, 4)}
"""How many pointers each function takes, and then how many numbers."""


class Use(NamedTuple):
    """What blocks are used for, which says what they need room for."""

    n_layer: int
    rolls: int
    slots: tuple[int, ...]
    """Of each window of the text."""
    trained: bool
    """Whether there will be a backward pass."""
    recompute: bool
    """Whether a block's inner values are computed again in the backward pass, instead of kept for it."""


class Kernels:
    """The functions, for tensors on the CPU that are contiguous.

    What enters and leaves a product of matrices is in `dtype`, all else is float32. Memory for what they write is given to them.
    Tensors are given by their addresses, in structures of them in the order that block.c says.

    Args:
        library: block.c, compiled.
        config: the shape it was compiled for.
        dtype: the type of what enters and leaves a matrix product.
        compiler: what compiled it.
    """

    def __init__(self, library: ctypes.CDLL, config: GPTConfig, dtype: torch.dtype, compiler: str) -> None:
        self.dtype, self.compiler = dtype, compiler
        self.shape = (config.n_embd, config.n_head, config.context_len)
        self.threads = torch.get_num_threads()
        self._library = library
        for name, (pointers, numbers) in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p] * pointers + [ctypes.c_int] * numbers, None
        self.matrix_tiles = bool(library.uses_matrix_tiles())
        """Whether products are made by the processor's registers for tiles (AMX)."""
        self._panel = int(library.panel_columns())
        library.room_units.restype = ctypes.c_long

    def packed(self, out: int, n_in: int) -> tuple[Tensor, Tensor]:
        """Memory for a matrix (out, in), packed as `pack` does it for the forward pass and for the backward pass."""
        forward, backward = (self._in_panels(*shape) for shape in ((n_in, out), (out, n_in)))
        return forward, backward

    def _in_panels(self, rows: int, columns: int) -> Tensor:
        return torch.empty(-(-columns // self._panel) * self._panel * rows, dtype=self.dtype)

    @cached_property
    def room(self) -> Tensor:
        """Memory that threads pack matrices in, and update them."""
        return torch.empty(self._library.room_units(self.threads), dtype=torch.float32)

    def pack(self, matrices: Addresses, packed: Addresses, layers: int) -> None:
        """Pack four matrices of each block, those of attention, its projection, and the feed-forward layer."""
        self._library.pack(matrices, packed, layers, self.threads)

    def forward(self, weights: Addresses, values: Addresses, out: Tensor, use: Use) -> None:
        """One window of all rolls through all blocks, from the first block's x to `out` (R, C)."""
        slots = out.size(0) // use.rolls
        kept = use.trained, use.trained and not use.recompute
        self._library.forward(weights, values, out.data_ptr(), *kept, use.n_layer, use.rolls, slots, self.threads)

    def backward(
        self,
        tables: tuple[Addresses, Addresses, Addresses],
        dx: Tensor,
        last_bias: Tensor,
        use: Use,
        *,
        at_once: bool,
    ) -> None:
        """Turn the gradient dx (R, C) of what `forward` gave into that of the first block's x.

        Args:
            tables: the blocks' weights; what `forward` has left of that window, or x alone where the rest is to be computed
                again; and sums to which gradients of weights are added.
            dx: the gradient.
            last_bias: (threads, C), to which that of the last block's last bias is added.
            use: how many blocks and rolls there are, and whether to compute again.
            at_once: leave the gradients of matrices for later, and `gradient_of_matrix`.
        """
        pointers = dx.data_ptr(), last_bias.data_ptr(), None if at_once else self.room.data_ptr()
        shape = use.n_layer, use.rolls, dx.size(0) // use.rolls
        self._library.backward(*tables, *pointers, use.recompute, *shape, self.threads)

    def gradient_of_matrix(self, of_rows: Tensor, rows: Tensor, out: Tensor) -> None:
        """Write (out, in), float32: of the products of a matrix with rows (N, in), whose gradients are of_rows (N, out)."""
        sizes = of_rows.size(1), rows.size(1), rows.size(0)
        self._library.gradient_of_matrix(*(x.data_ptr() for x in (out, of_rows, rows, self.room)), *sizes, self.threads)

    def can_update(self, rows: int, columns: int) -> bool:
        """Whether `update_matrices` takes this shape: those of the blocks, and the parts of the matrix for attention."""
        width = self.shape[0]
        return (rows, columns) in ((width, width), (width, 4 * width), (4 * width, width))

    def update_matrices(
        self, parts: Addresses, settings: Sequence[float], in_a_row: Sequence[int], rows: int, columns: int
    ) -> None:
        """Take a step of `picogpt.optim.Muon` with matrices (rows, columns), with products in `dtype`.

        Args:
            parts: weights, gradient, mean gradient and mean square of each, all of them contiguous.
            settings: numbers in muon.h's order, and at the end three coefficients of each polynomial.
            in_a_row: how many polynomials are applied before the gram matrix is formed anew, and so on.
            rows: of each matrix.
            columns: likewise.
        """
        tables = (ctypes.c_float * len(settings))(*settings), (ctypes.c_int * (len(in_a_row) + 1))(*in_a_row)
        self._library.update_matrices(parts, *tables, self.room.data_ptr(), len(parts) // 4, rows, columns, self.threads)


def addresses(tensors: Iterable[Tensor]) -> Addresses:
    """Those of tensors that have to outlive them."""
    found = [tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * len(found))(*found)


def kernels_name(kernels: Kernels | None) -> str:
    """What computes the blocks, as `picogpt.config.KERNELS` calls it: c, or torch for None."""
    return "torch" if kernels is None else "c"


def _say_nothing(_: str) -> None:
    """For callers that have nobody to notify."""


def choose_kernels(
    name: str, config: GPTConfig, dtype: torch.dtype, device: torch.device, notify: Callable[[str], None] = _say_nothing
) -> tuple[Kernels | None, str]:
    """Turn a name of `picogpt.config.KERNELS` into the functions, or None for torch's own; and the reason in a few words.

    `auto` takes the functions wherever they can be made, on processors like those on which they were measured. `notify` is given
    a line when they are compiled, as they are once on each machine.

    Raises:
        TrainingError: `c` was asked for and cannot be had.
    """
    if name == "torch":
        return None, "as the run or its flags say"
    reason = _obstacle(config, device)
    if reason is None:
        try:
            made = compile_kernels(config, dtype, notify)
            return made, f"compiled by {made.compiler}" + (", with AMX" if made.matrix_tiles else "")
        except BuildError as error:
            reason = str(error)
    if name == "c":
        raise TrainingError(f"--kernels c: {reason}; take --kernels torch")
    return None, reason


def _obstacle(config: GPTConfig, device: torch.device) -> str | None:
    """Why a model cannot have the functions, or None."""
    if device.type != "cpu":
        return f"those in C are not for {device.type}"
    if config.dropout or not config.bias:
        return "those in C know no dropout, and no blocks without biases"
    if config.n_embd // config.n_head % _LANES:
        return f"those in C need heads of a multiple of {_LANES}, got {config.n_embd // config.n_head}"
    if config.context_len > _MAX_CONTEXT_LEN:
        return f"those in C are for windows of at most {_MAX_CONTEXT_LEN}, got {config.context_len}"
    if instruction_set() not in INSTRUCTIONS:
        return f"those in C are for AVX2 and AVX512, and this is {instruction_set()}"
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
        if has_matrix_tiles():
            defines["AMX"] = 1
    built = load_library(_SOURCE, defines, flags=flags, openmp=True, notify=notify)
    return Kernels(built.functions, config, dtype, built.compiler)
