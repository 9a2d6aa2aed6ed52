"""What the comparisons share: turns, the machine, and how much memory a process has held."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from picogpt.device import instruction_set

__all__ = ["ROOT", "ROUNDS", "in_turns", "machine", "peak"]

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5


def in_turns(*calls: Callable[[], float]) -> list[list[float]]:
    """Results of each of `calls` over `ROUNDS` rounds, in which they take turns: A B A B ..."""
    rounds = [[call() for call in calls] for _ in range(ROUNDS)]
    return [list(results) for results in zip(*rounds, strict=True)]


def peak() -> float:
    """The most memory this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> str:
    """What the figures were measured on."""
    threads = f"{instruction_set()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores"
    return f"{threads}; numpy {np.__version__}, torch {torch.__version__}"
