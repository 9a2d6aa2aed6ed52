"""The blocks of the model, forward and backward: torch's modules against the functions in C."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import ROUNDS, backend
from picogpt.config import GPTConfig, TrainConfig
from picogpt.device import set_threads
from picogpt.kernels.compiled import Kernels
from picogpt.model.accelerate import accelerate
from picogpt.model.gpt import GPT
from picogpt.training.trainer import time_call

__all__ = ["add_arguments", "compare_kernels"]

REPEATS = 3
"""Calls that are timed in one round."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--batch-size", metavar="N", type=int, default=2, help="sequences in a step (default: 2)")


def compare_kernels(arguments: argparse.Namespace) -> None:
    """Print what each of them takes, in turns."""
    set_threads(None)
    chosen = backend(arguments.batch_size, kernels="c")
    print(f"{chosen.dtype_reason}; milliseconds of a step's windows, {arguments.batch_size} sequences, through all blocks\n")
    print("| | torch | C |\n|---|---|---|")
    ways = [passes(kernels, arguments.batch_size, chosen.dtype) for kernels in (None, chosen.kernels)]
    for direction, name in enumerate(("forward", "forward and backward")):
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for times, way in zip(found, ways, strict=True):
                times.append(statistics.median(time_call(way[direction]) for _ in range(REPEATS)))
        print(f"| {name} | " + " | ".join(f"{statistics.median(times) * 1e3:.1f}" for times in found) + " |", flush=True)


def passes(kernels: Kernels | None, sequences: int, dtype: torch.dtype) -> tuple[Callable[[], object], Callable[[], object]]:
    """Ten windows through all blocks of a model: forward, and there and back; gradients of the weights are among what is made."""
    torch.manual_seed(0)
    config = GPTConfig()
    model = GPT(config)
    accelerate(model, kernels)
    transformer = model.transformer
    slots, windows = config.context_len + 1, TrainConfig().windows
    x = torch.randn(sequences, slots, config.n_embd, requires_grad=True)
    inputs = [x, *transformer.h.parameters()]

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            blocks = transformer.begin_sequence(sequences, [slots] * windows)
            return torch.stack([blocks(x) for _ in range(windows)])

    return forward, lambda: torch.autograd.grad(forward().sum(), inputs)
