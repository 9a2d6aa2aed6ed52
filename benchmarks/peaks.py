"""The machine's limits, measured on the spot: fused multiply-adds, memory reads, and torch's matrix products.

A share of a limit says how well a loop computes; limits taken before and after the loops show whether anything else has
used the machine meanwhile.
"""

from __future__ import annotations

import ctypes
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import load_source
from picogpt.device import instruction_set
from picogpt.wording import plural

__all__ = ["compile_source", "disturbances", "measure_peaks", "peak_flops"]

_SOURCE = Path(__file__).with_name("peaks.c")
_VECTORS = {"AVX512": (64, "-mavx512f"), "AVX2": (32, "-mavx2 -mfma")}
"""Bytes of the widest vectors that torch may use here, and the compiler's flags for them."""
_OTHERS = (16, "-march=native")
_ROUNDS = 2_000_000
"""Multiply-adds of each chain that are timed at once, some 5 ms."""
_BYTES = 2**28
"""Size of the buffer that is read, far beyond the last cache."""
_PRODUCTS = ((2048, 2048, 2048), (1024, 4096, 1024), (258, 256, 1024), (1290, 256, 1024))
"""Shapes (m, k, n) whose fastest one counts as torch's peak; the last two are the model's own: a window's rows, and a step's."""
_CALLS, _WHILE = 2, 0.4
"""How often one limit is measured at least, and for how many seconds."""
_ALIKE = 0.1
"""Share by which a limit may change between two measurements on a machine that does nothing else."""


def measure_peaks() -> dict[str, float]:
    """FLOP/s and bytes/s by name: multiply-adds and memory reads with one thread and with torch's number, torch's products.

    The former two need the C compiler that CC names, or cc, and are left out without one.
    """
    peaks: dict[str, float] = {}
    library = compile_source()
    if library is not None:
        buffer = np.ones(_BYTES // 4, np.float32)
        for threads in sorted({1, torch.get_num_threads()}):
            peaks[_name("FMA", threads)] = _in_threads(lambda *_: _multiply_add(library), threads)
            peaks[_name("memory", threads)] = _in_threads(lambda i, n: _read(library, np.array_split(buffer, n)[i]), threads)
    for dtype in (torch.float32, torch.bfloat16):
        peaks[str(dtype).removeprefix("torch.")] = max(_product_speed(*shape, dtype) for shape in _PRODUCTS)
    return peaks


def peak_flops(peaks: Mapping[str, float], dtype: str) -> float:
    """The most FLOP/s that matrix products in `dtype` can reach: for float32 the multiply-adds', where they were measured."""
    names = [dtype, *(name for name in peaks if name.startswith("FMA"))] if dtype == "float32" else [dtype]
    return max(peaks[name] for name in names)


def disturbances(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Names of the limits that have changed by more than a quiet machine's do."""
    return [name for name in before if abs(after[name] / before[name] - 1) > _ALIKE]


def _name(limit: str, threads: int) -> str:
    return f"{limit}, {plural(threads, 'thread')}"


def compile_source() -> ctypes.CDLL | None:
    """Compile and load peaks.c for the widest vectors that torch uses, or None without a working compiler."""
    width, flags = _VECTORS.get(instruction_set(), _OTHERS)
    try:
        library = load_source(_SOURCE, [*flags.split(), f"-DWIDTH={width}"])
    except (OSError, subprocess.CalledProcessError):
        return None
    library.multiply_add.restype = library.read_floats.restype = ctypes.c_double
    return library


def _multiply_add(library: ctypes.CDLL) -> float:
    return float(library.multiply_add(ctypes.c_long(_ROUNDS), ctypes.byref(ctypes.c_float())))


def _read(library: ctypes.CDLL, part: npt.NDArray[np.float32]) -> float:
    return float(library.read_floats(ctypes.c_void_p(part.ctypes.data), ctypes.c_long(part.size), ctypes.byref(ctypes.c_float())))


def _in_threads(work: Callable[[int, int], float], threads: int) -> float:
    """Most work per second when thread i of n does `work(i, n)` and returns how much it was; C code holds no lock of Python's."""
    with ThreadPoolExecutor(threads) as pool:
        return _rate(lambda: sum(pool.map(work, range(threads), [threads] * threads)))


def _product_speed(m: int, k: int, n: int, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few products of (m, k) and (k, n)."""
    a, b = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
    return _rate(lambda: 2.0 * m * k * n * (torch.nn.functional.linear(a, b).dim() > 0))


def _rate(work: Callable[[], float]) -> float:
    """Most work per second of a few calls of `work`, which returns how much it was."""
    best, calls, start = 0.0, 0, time.perf_counter()
    while calls < _CALLS or time.perf_counter() - start < _WHILE:
        before = time.perf_counter()
        best, calls = max(best, work() / (time.perf_counter() - before)), calls + 1
    return best
