"""What the comparisons share: turns, processes of their own, and what the machine is."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_info

from picogpt.backend import Backend, BackendChoice
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import Source
from picogpt.device import instruction_set
from picogpt.training.build import build_trainer
from picogpt.training.trainer import Trainer

__all__ = ["ROOT", "ROUNDS", "backend", "full_trainer", "interleave", "kilobytes", "load_source", "machine", "process"]

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5


def interleave(*calls: Callable[[], float]) -> list[list[float]]:
    """Results of each of `calls` over `ROUNDS` rounds, in which they take turns: A B A B ..."""
    rounds = [[call() for call in calls] for _ in range(ROUNDS)]
    return [list(results) for results in zip(*rounds, strict=True)]


@contextmanager
def process(environment: Mapping[str, str]) -> Iterator[Callable[..., Any]]:
    """A process whose memory and environment nothing else has touched: calls there the function that it is given, and returns."""
    before = dict(os.environ)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        os.environ.update(environment)
        try:
            pool.submit(os.getpid).result()  # starts it
        finally:
            os.environ.clear()
            os.environ.update(before)
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def kilobytes(process: int, file: str, entry: str) -> int:
    """Return an entry of /proc/PROCESS/FILE in kB; 0 once the process has ended, and on systems without /proc."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
            if line.startswith(f"{entry}:"):
                return int(line.split()[1])
    return 0


def load_source(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Compile a C source of the benchmarks with the compiler that CC names, or cc, and load it.

    Raises:
        OSError: there is no compiler, or what it makes cannot be loaded.
        CalledProcessError: it fails.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    with tempfile.TemporaryDirectory(prefix="picogpt-", ignore_cleanup_errors=True) as folder:
        library = f"{folder}/{source.stem}.so"
        command = [*compiler, "-O3", "-std=gnu11", *flags, "-shared", "-fPIC", str(source), "-o", library, "-lm"]
        subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(library)


def machine() -> str:
    """What the figures were measured on; numpy's matrix products may use other instructions than torch."""
    threads = f"{instruction_set()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores"
    blas = {library["architecture"] for library in threadpool_info() if library["internal_api"] == "openblas"}
    kernels = ", ".join(sorted(blas)) or "no OpenBLAS"
    return f"{threads}; numpy {np.__version__} ({kernels}), torch {torch.__version__}"


@cache
def backend(sequences: int, dtype: str = "auto", kernels: str = "auto") -> Backend:
    """Choose as `picogpt-train` does with these flags on a CPU, once for all trainers of this process."""
    choice = BackendChoice(device="cpu", dtype=dtype, kernels=kernels, threads=torch.get_num_threads())
    return Backend.select(GPTConfig(), choice, sequences=sequences)


def full_trainer(config: TrainConfig, source: Source, *, dtype: str = "auto", kernels: str = "auto") -> Trainer:
    """The full model, trained as `picogpt-train` does with these flags."""
    return build_trainer(GPTConfig(), config, source, backend(config.batch_size, dtype, kernels))
