"""What this machine computes with: number of threads, and the type of number that is fastest on it."""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from threadpoolctl import threadpool_info

from picogpt.errors import TrainingError
from picogpt.threads import Threads, choose_threads

__all__ = [
    "CPU",
    "DType",
    "Device",
    "check_compiler",
    "choose_device",
    "choose_dtype",
    "disable_malloc_trim",
    "flush_denormals",
    "has_amx",
    "instruction_set",
    "set_threads",
    "speedup",
]

Device = torch.device
DType = torch.dtype
"""For those who pass them on and need nothing else of torch."""

CPU = torch.device("cpu")

_TORCH_THREADS = torch.get_num_threads()
"""What torch chose when it was loaded."""

_ROWS, _IN, _OUT = 1032, 256, 1024
"""Shape of the model's largest matrix product, for eight rolls."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""As glibc's malloc.h has them: what is free at the heap's end, and the size of a piece, beyond which it goes to the system."""
_MAX_MMAP_THRESHOLD, _NEVER_TRIM = 2**25, 2**31 - 1
"""In bytes; the first is the largest that glibc takes."""
_MIN_BF16_SPEEDUP = 1.3
"""How many times faster bfloat16 has to be before its coarser numbers are worth having."""
_MIN_ROUNDS, _MIN_SECONDS = 6, 0.1
"""How often two ways to compute are timed at least, and for how many seconds both."""


def set_threads(asked: int | None) -> Threads:
    """Have torch compute with `asked` threads, or with as many as suit the machine for None.

    Returns:
        The number that computes, which can be lower than `asked`: see `picogpt.threads.choose_threads`.
    """
    threads = choose_threads(asked)
    if asked is None and threads.count > _TORCH_THREADS:
        # On systems other than Linux torch knows more of the processor, such as which cores of an Apple one are slow.
        threads = Threads(_TORCH_THREADS, "as torch chooses")
    if os.environ.get("OMP_DYNAMIC", "").strip().lower() in {"true", "1"}:
        _switch_off_dynamic_threads()
        threads = replace(threads, reason=f"{threads.reason}; OMP_DYNAMIC is switched off")
    torch.set_num_threads(threads.count)
    return threads


def _switch_off_dynamic_threads() -> None:
    """Have OpenMP start as many threads as it is told: with `OMP_DYNAMIC` results would depend on how busy the machine is."""
    os.environ["OMP_DYNAMIC"] = "false"  # for a library that is loaded later
    for library in threadpool_info():
        if library["user_api"] == "openmp":
            ctypes.CDLL(library["filepath"]).omp_set_dynamic(0)


def instruction_set() -> str:
    """The vector instructions that torch uses here, such as AVX2 or AVX512; the processor may have more."""
    return str(torch.backends.cpu.get_cpu_capability())


def has_amx() -> bool:
    """Whether the processor multiplies tiles of matrices in registers for them (Intel's AMX), and the system lets it."""
    return bool(torch.cpu._init_amx())


def check_compiler() -> None:
    """Make sure that torch.compile finds a C++ compiler.

    Raises:
        TrainingError: it does not.
    """
    # Imported here: it takes a second, and few ask for it.
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
    """Have numbers too small for full precision become zero, which are slow to compute with; False where that is not possible."""
    return torch.set_flush_denormal(True)


def disable_malloc_trim() -> bool:
    """Have the C library keep what is freed for what comes next; False where it has no such setting.

    A step needs the same memory as the one before, and the system hands out pages one by one, each filled with zeros.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (TypeError, OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM))


def choose_device(name: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """Turn a name of `picogpt.checks.DEVICES` into where training computes, and the reason for it in a few words.

    `auto` takes a CUDA GPU if torch sees one. It takes no other GPU by itself: on a small model the CPU can be faster.

    Args:
        name: the device.
        local_rank: number of this process on its machine; each has a GPU of its own.

    Raises:
        TrainingError: it is not there.
    """
    if name == "auto":
        name, reason = ("cuda", "torch sees a GPU") if torch.cuda.is_available() else ("cpu", "torch sees no CUDA GPU")
    else:
        reason = "as requested"
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[name]
    if local_rank >= found and name != "cpu":
        raise TrainingError(
            f"--device {name}: torch {torch.__version__} sees {found} such devices here, and {local_rank + 1} are needed; "
            "install a torch that is built for it, or take --device cpu"
        )
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device(name), reason


def choose_dtype(name: str, device: torch.device = CPU) -> tuple[torch.dtype, str]:
    """Turn a name of `picogpt.checks.DTYPES` into the type of the matrix products, and the reason for it in a few words.

    `auto` asks a GPU whether it has bfloat16. On a CPU it times one product of the model's shape in both types: whether bfloat16
    is fast depends on the processor's instructions (without them it is many times slower than float32), and the clock is the
    judge that counts.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name], "as requested"
    if device.type != "cpu":
        has = "has" if _has_bfloat16(device) else "has no"
        return (torch.bfloat16 if has == "has" else torch.float32), f"the GPU {has} bfloat16"
    ratio = _bf16_speedup()
    chosen = torch.bfloat16 if ratio >= _MIN_BF16_SPEEDUP else torch.float32
    return chosen, f"bfloat16 products run at {ratio:.1f} times the speed of float32 on {instruction_set()}"


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.backends.mps.is_macos_or_newer(14, 0))


def _bf16_speedup() -> float:
    """How many times as fast a matrix product is in bfloat16 as in float32."""
    types = (torch.float32, torch.bfloat16)
    slow, fast = (
        functools.partial(torch.nn.functional.linear, torch.ones(_ROWS, _IN, dtype=dtype), torch.ones(_OUT, _IN, dtype=dtype))
        for dtype in types
    )
    return speedup(fast, slow)


def speedup(call: Callable[[], object], other: Callable[[], object]) -> float:
    """How many times as fast `call` is as `other`, by the shortest time of each.

    They take turns for a while, so that it does not decide if something else has a core for a moment.
    """
    seconds: list[list[float]] = [[], []]
    start = time.perf_counter()
    while len(seconds[0]) < _MIN_ROUNDS or time.perf_counter() - start < _MIN_SECONDS:
        for found, timed in zip(seconds, (call, other), strict=True):
            before = time.perf_counter()
            timed()
            found.append(time.perf_counter() - before)
    quicker, slower = (min(found[1:]) for found in seconds)  # the first one warms up
    return slower / quicker
