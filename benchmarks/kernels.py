"""The model without its head, forward and backward: torch's modules against the functions in C."""

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
    print(f"{chosen.dtype_reason}; milliseconds of a step's windows, {arguments.batch_size} sequences, without the head\n")
    print("| | torch | C |\n|---|---|---|")
    ways = [passes(kernels, arguments.batch_size, chosen.dtype) for kernels in (None, chosen.kernels)]
    for direction, name in enumerate(("forward", "forward and backward")):
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for times, way in zip(found, ways, strict=True):
                times.append(statistics.median(time_call(way[direction]) for _ in range(REPEATS)))
        print(f"| {name} | " + " | ".join(f"{statistics.median(times) * 1e3:.1f}" for times in found) + " |", flush=True)


def passes(kernels: Kernels | None, sequences: int, dtype: torch.dtype) -> tuple[Callable[[], object], Callable[[], object]]:
    """A step's windows through a model without its head: forward, and there and back, with the gradients of all weights."""
    torch.manual_seed(0)
    config = GPTConfig()
    model = GPT(config)
    runner = accelerate(model, kernels)
    idx = torch.randint(0, config.vocab_size, (sequences, config.context_len * TrainConfig().windows))
    weights = list(model.transformer.parameters())
    # A plain sum of normalized states is constant: its gradients would be nothing but rounding.
    direction = torch.randn(config.n_embd)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            return runner.hidden_states(model, idx)

    return forward, lambda: torch.autograd.grad((forward().float() @ direction).sum(), weights)
