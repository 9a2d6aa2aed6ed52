"""Setup of torch for this machine: threads, device, dtype, denormals and the memory allocator."""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from threadpoolctl import threadpool_info

from picogpt.errors import TrainingError
from picogpt.signals import deferred_interrupt
from picogpt.threads import Threads, choose_threads
from picogpt.wording import plural

__all__ = [
    "CPU",
    "check_compiler",
    "choose_device",
    "choose_dtype",
    "disable_malloc_trim",
    "flush_denormals",
    "has_amx",
    "instruction_set",
    "set_threads",
    "speedup",
    "torch_threads",
]

CPU = torch.device("cpu")

_TORCH_THREADS = torch.get_num_threads()  # torch's own choice, before we set another number

# The default model's largest GEMM, for a window of eight sequences: (8 * 129, 256) x (256, 1024).
_ROWS, _IN, _OUT = 1032, 256, 1024
# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAX_MMAP_THRESHOLD, _NEVER_TRIM = 2**25, 2**31 - 1  # bytes; the first is the largest that glibc accepts
_MIN_BF16_SPEEDUP = 1.3  # a smaller speedup does not justify the rounding
_MIN_ROUNDS, _MIN_SECONDS = 6, 0.1  # minimum length of a benchmark of two functions


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run torch's operations of the calling thread on `count` threads, and restore the number before at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def set_threads(asked: int | None) -> Threads:
    """Set torch's number of threads to `asked`, or for None to the machine's default.

    Returns:
        The number set, which can be lower than `asked`: see `picogpt.threads.choose_threads`.
    """
    threads = choose_threads(asked)
    if asked is None and threads.count > _TORCH_THREADS:
        # Outside Linux, torch knows more about the processor, such as the efficiency cores of an Apple one.
        threads = Threads(_TORCH_THREADS, "as torch chooses")
    if os.environ.get("OMP_DYNAMIC", "").strip().lower() in {"true", "1"}:
        _switch_off_dynamic_threads()
        threads = replace(threads, reason=f"{threads.reason}; OMP_DYNAMIC is switched off")
    torch.set_num_threads(threads.count)
    return threads


def _switch_off_dynamic_threads() -> None:
    """Switch off `OMP_DYNAMIC`, with which OpenMP starts fewer threads on a busy machine: results would not be reproducible."""
    os.environ["OMP_DYNAMIC"] = "false"  # for a runtime that is loaded later
    # Runtimes that are already loaded have read the variable; there may be several, as torch, numpy and others bring their own.
    for library in threadpool_info():
        if library["user_api"] == "openmp":
            ctypes.CDLL(library["filepath"]).omp_set_dynamic(0)


def instruction_set() -> str:
    """Return the SIMD instruction set that torch uses, such as AVX2 or AVX512; the processor may have more."""
    return str(torch.backends.cpu.get_cpu_capability())


def has_amx() -> bool:
    """Return whether the processor has AMX tile registers and the system permits their use."""
    # On Linux a process has to ask for the tile registers; torch does so here.
    return bool(torch.cpu._init_amx())


def check_compiler() -> None:
    """Check that torch.compile finds a C++ compiler.

    Raises:
        TrainingError: there is no working C++ compiler.
    """
    # Imported here: the import is slow, and only --compile needs it.
    with deferred_interrupt():
        from torch._inductor import config
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        looked_for = ", ".join(name for name in config.cpp.cxx if name)
        raise TrainingError(
            f"--compile: no C++ compiler that works ({looked_for}, by PATH or CXX); install g++, or leave --compile out"
        ) from error


def flush_denormals() -> bool:
    """Flush denormals, which are slow on many processors, to zero; return False if the processor cannot."""
    return torch.set_flush_denormal(True)


def disable_malloc_trim() -> bool:
    """Make glibc keep freed memory instead of returning it to the system; return False for another C library."""
    # Each step needs the same amount of memory. Returned to the system, its pages would be faulted in and zeroed again.
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (TypeError, OSError, AttributeError):
        return False
    # Without the first setting, large blocks would still be mapped and unmapped one by one.
    return bool(mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM))


def choose_device(name: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """Return the torch device for a name of `picogpt.checks.DEVICES`, and the reason in a few words.

    `auto` takes a CUDA GPU if torch sees one. It takes no other GPU: for a small model the CPU can be faster.

    Args:
        name: the device.
        local_rank: number of this process on its machine; each process has its own GPU.

    Raises:
        TrainingError: torch sees no such device, or too few.
    """
    if name == "auto":
        name, reason = ("cuda", "torch sees a GPU") if torch.cuda.is_available() else ("cpu", "torch sees no CUDA GPU")
    else:
        reason = "as requested"
    # All ranks of a machine may share its CPU.
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[name]
    if local_rank >= found and name != "cpu":
        seen = f"{plural(found, 'such device')} here, and {local_rank + 1} are needed" if found else "no such device here"
        raise TrainingError(
            f"--device {name}: torch {torch.__version__} sees {seen}; install a torch that is built for it, or take --device cpu"
        )
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device(name), reason


def choose_dtype(name: str, device: torch.device = CPU) -> tuple[torch.dtype, str]:
    """Return the type of the GEMMs for a name of `picogpt.checks.DTYPES`, and the reason in a few words.

    `auto` asks a GPU whether it supports bfloat16. On a CPU it times a GEMM of the default model in both types.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name], "as requested"
    if device.type != "cpu":
        has = "has" if _has_bfloat16(device) else "has no"
        return (torch.bfloat16 if has == "has" else torch.float32), f"the GPU {has} bfloat16"
    # Measured, as the instruction set does not tell enough: without the right instructions bfloat16 is many times slower.
    ratio = _bf16_speedup()
    chosen = torch.bfloat16 if ratio >= _MIN_BF16_SPEEDUP else torch.float32
    return chosen, f"bfloat16 matmuls run at {ratio:.1f} times the speed of float32 on {instruction_set()}"


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))  # emulated bfloat16 is slow
    # mps supports it from macOS 14 on.
    return bool(torch.backends.mps.is_macos_or_newer(14, 0))


def _bf16_speedup() -> float:
    """Return the speed of a GEMM in bfloat16 as a multiple of its speed in float32."""
    types = (torch.float32, torch.bfloat16)
    slow, fast = (
        functools.partial(torch.nn.functional.linear, torch.ones(_ROWS, _IN, dtype=dtype), torch.ones(_OUT, _IN, dtype=dtype))
        for dtype in types
    )
    return speedup(fast, slow)


def speedup(call: Callable[[], object], other: Callable[[], object]) -> float:
    """Return the speed of `call` as a multiple of that of `other`, by the shortest time of each."""
    # They alternate, so that a moment in which another program uses a core affects both.
    seconds: list[list[float]] = [[], []]
    start = time.perf_counter()
    while len(seconds[0]) < _MIN_ROUNDS or time.perf_counter() - start < _MIN_SECONDS:
        for found, timed in zip(seconds, (call, other), strict=True):
            before = time.perf_counter()
            timed()
            found.append(time.perf_counter() - before)
    quicker, slower = (min(found[1:]) for found in seconds)  # the first call is a warm-up
    return slower / quicker
