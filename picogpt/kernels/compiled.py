"""The functions of block.c: compiled for one shape of model by the machine's own C compiler, and called with tensors.

Torch has a fast product of matrices. What stands between two of them costs it a pass over memory for every step of a formula,
and attention over short windows two copies more; in bfloat16, where products are fast, that is almost half of the time. Here
it is one pass each, and attention stays in the processor's cache a head at a time, so that its weights are never stored
(as in FlashAttention: Dao et al., 2022). What is cheap to compute again in the backward pass is not kept for it.

Dimensions: R rows, one for each slot of each roll; B rolls, S slots of a window, C = n_embd, H = n_head.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from picogpt.config import GPTConfig
from picogpt.device import instruction_set
from picogpt.errors import TrainingError

__all__ = ["INSTRUCTIONS", "Kernels", "choose_kernels", "compile_kernels", "kernels_name"]

_SOURCE = Path(__file__).with_name("block.c")
_COMPILERS = ("cc", "gcc")
_FLAGS = "-std=gnu11 -O3 -fPIC -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -freciprocal-math"
"""Sums may be taken in another order, for vector instructions; what is not a number stays so, unlike with -ffast-math."""
INSTRUCTIONS = {"AVX512": "-march=native -mprefer-vector-width=512", "AVX2": "-mavx2 -mfma"}
"""The vector instructions that the functions were measured with, and more flags for each."""
_LANES = 4
"""Entries of the shortest vectors, which a head is cut into."""
_MAX_CONTEXT_LEN = 512
"""Beyond it a head's scores no longer fit in a core's cache, which is what the functions live by."""
_TIMEOUT = 60.0
"""Seconds that a compiler has."""
_POINTERS = {
    "add": 4,
    "add_backward": 3,
    "layer_norm": 5,
    "add_layer_norm": 8,
    "layer_norm_backward": 9,
    "gelu": 3,
    "gelu_backward": 5,
    "attention": 4,
    "attention_backward": 6,
}
"""How many tensors each function takes, before its numbers."""


class Kernels:
    """The functions, for tensors on the CPU that are contiguous.

    Biases and whatever else is not said to be in `dtype` are float32. A bias given with a tensor is still to be added to it.
    Memory for what they write is given to them.

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
        # What torch itself takes for bfloat16; in float32 it takes MKL, which has half the speed of oneDNN on some processors.
        self.onednn: bool = dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._heads = config.n_head
        self._library = library
        for name, count in _POINTERS.items():
            numbers = 4 if name.startswith("attention") else 2
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p] * count + [ctypes.c_int] * numbers, None

    def linear(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """The product of x (R, in) and weight (out, in), transposed: (R, out), in `out` unless oneDNN brings memory along."""
        return _onednn_linear(x, weight) if self.onednn else torch.mm(x, weight.T, out=out)

    def add_product(self, sums: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        """The product of left (R, n), transposed, and right (R, m), added to sums (n, m) if there are some.

        With oneDNN n is better the smaller one: 11 to 15 % sooner than MKL in float32, with AVX2 and 516 rows.
        """
        if self.onednn:
            product = _onednn_linear(left.T, right.T)
            return product if sums is None else sums.add_(product)
        return left.T @ right if sums is None else sums.addmm_(left.T, right)

    def add(self, x: Tensor, branch: Tensor, bias: Tensor, out: Tensor) -> None:
        """Write the sum of x (R, C), branch (R, C), which is in `dtype`, and bias (C)."""
        self._library.add(*_addresses(x, branch, bias, out), x.size(0), self.threads)

    def add_backward(self, gradient: Tensor, branch: Tensor, sums: Tensor) -> None:
        """Of the gradient (R, C) of `add`, write that of the branch, in `dtype`; the bias's is added to sums (threads, C)."""
        self._library.add_backward(*_addresses(gradient, branch, sums), gradient.size(0), self.threads)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, statistics: Tensor) -> None:
        """Write the LayerNorm of x (R, C), in `dtype`.

        And `statistics`, of 2 R entries: each row's mean, and then what the distance from it was multiplied by.
        """
        self._library.layer_norm(*_addresses(x, weight, bias, out, statistics), x.size(0), self.threads)

    def add_layer_norm(
        self,
        x: Tensor,
        branch: Tensor,
        branch_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        added: Tensor,
        out: Tensor,
        statistics: Tensor,
    ) -> None:
        """Write what `add` does, and what `layer_norm` does with that."""
        tensors = (x, branch, branch_bias, weight, bias, added, out, statistics)
        self._library.add_layer_norm(*_addresses(*tensors), x.size(0), self.threads)

    def layer_norm_backward(
        self,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        statistics: Tensor,
        *,
        out: Tensor | None,
        dx: Tensor,
        branch: Tensor | None,
        sums: Tensor,
    ) -> None:
        """Backward through a LayerNorm and the residual path beside it.

        Args:
            gradient: that of the output (R, C), in `dtype`.
            x: what was normalised (R, C).
            weight: what it was multiplied by (C).
            bias: what was added (C).
            statistics: what `layer_norm` found.
            out: where the output is written again, in `dtype`, or None.
            dx: gradient of x by the other path (R, C), to which this one's is added.
            branch: where that sum is written, in `dtype`, or None.
            sums: (threads, 3, C), to which the gradients are added of weight, bias, and a bias that x was made with.
        """
        tensors = (gradient, x, weight, bias, statistics, out, dx, branch, sums)
        self._library.layer_norm_backward(*_addresses(*tensors), x.size(0), self.threads)

    def gelu(self, x: Tensor, bias: Tensor, out: Tensor) -> None:
        """Write the GELU of x (R, 4C) + bias (4C), with the normal distribution itself; in and out in `dtype`."""
        self._library.gelu(*_addresses(x, bias, out), x.size(0), self.threads)

    def gelu_backward(self, gradient: Tensor, x: Tensor, bias: Tensor, out: Tensor | None, sums: Tensor) -> None:
        """Of the gradient (R, 4C) of `gelu`, write that of x over x, and `gelu`'s output again, unless it is None, in `dtype`.

        The gradient of the bias is added to sums (threads, 4C).
        """
        self._library.gelu_backward(*_addresses(gradient, x, bias, out, sums), x.size(0), self.threads)

    def attention(self, qkv: Tensor, bias: Tensor, rolls: int, *, out: Tensor, scores: Tensor) -> None:
        """Causal attention over the windows of qkv (R, 3C) + bias (3C).

        Written are what the heads read (R, C), in `dtype` as `qkv` is; and of the scores 2 R H entries: the largest of each
        slot, and then 1 over the sum of their exponentials, each less that largest; both by roll, head and slot.
        """
        tensors = (qkv, bias, out, scores)
        self._library.attention(*_addresses(*tensors), rolls, self._heads, qkv.size(0) // rolls, self.threads)

    def attention_backward(
        self, gradient: Tensor, qkv: Tensor, bias: Tensor, rolls: int, *, out: Tensor, scores: Tensor, sums: Tensor
    ) -> None:
        """Of the gradient (R, C) of `attention`, write that of qkv over qkv, in `dtype`; its bias's is added to sums (B, 3C).

        The other arguments are those of `attention` and what it wrote.
        """
        tensors = (gradient, qkv, bias, out, scores, sums)
        self._library.attention_backward(*_addresses(*tensors), rolls, self._heads, qkv.size(0) // rolls, self.threads)


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def kernels_name(kernels: Kernels | None) -> str:
    """What computes the blocks, as `picogpt.config.KERNELS` calls it: c, or torch for None."""
    return "torch" if kernels is None else "c"


def choose_kernels(name: str, config: GPTConfig, dtype: torch.dtype, device: torch.device) -> tuple[Kernels | None, str]:
    """Turn a name of `picogpt.config.KERNELS` into the functions, or None for torch's own; and the reason in a few words.

    `auto` takes the functions wherever they can be made, on processors like those on which they were measured.

    Raises:
        TrainingError: `c` was asked for and cannot be had.
    """
    if name == "torch":
        return None, "as the run or its flags say"
    reason = _obstacle(config, device)
    if reason is None:
        try:
            made = compile_kernels(config, dtype)
            return made, f"compiled by {made.compiler}" + (", their products by oneDNN" if made.onednn else "")
        except TrainingError as error:
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


def compile_kernels(config: GPTConfig, dtype: torch.dtype) -> Kernels:
    """Have a C compiler make the functions for this shape of model, in a folder that is gone afterwards.

    The compiler is the one that CC names, or the first of cc and gcc that can.

    Raises:
        TrainingError: there is no compiler, or none that makes a library which loads beside torch.
    """
    *others, last = _compilers()
    for command in others:
        with contextlib.suppress(TrainingError):  # the last one's is said
            return _compile_in_folder(command, config, dtype)
    return _compile_in_folder(last, config, dtype)


def _compile_in_folder(command: list[str], config: GPTConfig, dtype: torch.dtype) -> Kernels:
    try:
        # What of the folder cannot be removed, as the library in it is in use, is left to who clears temporary files.
        with tempfile.TemporaryDirectory(prefix="picogpt-", ignore_cleanup_errors=True) as folder:
            return _compile(command, folder, config, dtype)
    except OSError as error:
        raise TrainingError(f"there is no temporary folder ({error})") from error


def _compile(command: list[str], folder: str, config: GPTConfig, dtype: torch.dtype) -> Kernels:
    shape = {"WIDTH": config.n_embd, "HEAD": config.n_embd // config.n_head, "SLOTS": config.context_len + 1}
    macros = [f"-D{name}={value}" for name, value in shape.items()] + ["-DBFLOAT16"] * (dtype == torch.bfloat16)
    compiled, library = f"{folder}/block.o", f"{folder}/block.so"
    flags = [*_FLAGS.split(), *INSTRUCTIONS.get(instruction_set(), "").split()]
    _run([*command, *flags, *macros, "-c", str(_SOURCE), "-o", compiled])
    # Linked without -fopenmp, so that it finds the threads of torch and brings none of its own.
    _run([*command, "-shared", compiled, "-o", library, "-lm"])
    try:
        return Kernels(ctypes.CDLL(library), config, dtype, command[0])
    except (OSError, AttributeError) as error:
        raise TrainingError(f"what {command[0]} makes cannot be loaded ({error}; TMPDIR may name another folder)") from error


def _compilers() -> list[list[str]]:
    try:
        wanted = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise TrainingError(f"CC is not a command ({error})") from error
    names = wanted[:1] or list(_COMPILERS)
    found = [[name, *wanted[1:]] for name in names if shutil.which(name)]
    if not found:
        raise TrainingError(f"no C compiler ({', '.join(names)}, by PATH or CC)")
    return found


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(  # noqa: S603 (the user's own compiler)
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TrainingError(f"{command[0]} does not run ({error})") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise TrainingError(f"{command[0]} fails ({said.strip()})")
