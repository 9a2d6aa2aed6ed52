"""What this machine computes with: number of threads, and the type of number that is fastest on it."""

from __future__ import annotations

import time

import torch

__all__ = ["choose_dtype", "instruction_set", "set_threads"]

_ROWS, _IN, _OUT = 1032, 256, 1024
"""Shape of the model's largest matrix product, for eight rolls."""
_WORTHWHILE = 1.3
"""How many times faster bfloat16 has to be before its coarser numbers are worth having."""


def set_threads(count: int | None) -> int:
    """Have torch compute with `count` threads, or its own choice (one a core) for None; return how many it is."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def instruction_set() -> str:
    """The vector instructions that torch uses here, such as AVX2 or AVX512."""
    return str(torch.backends.cpu.get_cpu_capability())


def choose_dtype(name: str) -> tuple[torch.dtype, str]:
    """Turn a name of `picogpt.config.DTYPES` into the type of the matrix products, and the reason for it in a few words.

    `auto` times one product of the model's shape in both types: whether bfloat16 is fast depends on the processor's
    instructions (without them it is many times slower than float32), and the clock is the judge that counts.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name], "as the run or its flags say"
    ratio = _product_seconds(torch.float32) / _product_seconds(torch.bfloat16)
    chosen = torch.bfloat16 if ratio >= _WORTHWHILE else torch.float32
    return chosen, f"bfloat16 products run at {ratio:.1f} times the speed of float32 on {instruction_set()}"


def _product_seconds(dtype: torch.dtype) -> float:
    """Shortest time of a matrix product in `dtype`, after a first one to warm up."""
    a, b = torch.ones(_ROWS, _IN, dtype=dtype), torch.ones(_OUT, _IN, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
