"""The training loop against a plain one: speed, share of what the machine's matrix products reach, and memory."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.common import computing, full_trainer, in_new_process, in_turns, machine
from benchmarks.plain import PlainLoop
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import RepeatedSource
from picogpt.device import set_threads
from picogpt.memory import peak_memory
from picogpt.train import Trainer, seconds_of

__all__ = ["add_arguments", "flops_per_char", "training"]

PROFILES = {"native": {}, "laptop": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}
"""Environment of each profile: the machine as it is, and without the instructions that a laptop of some years does not have."""
PRODUCTS = ((2048, 2048, 2048), (1024, 4096, 1024), (516, 256, 1024), (5160, 256, 1024))
"""Shapes (m, k, n) whose fastest one counts as the machine's peak; the last two are the model's own."""
STEPS_FOR_MEMORY = 3
ENOUGH = 0.5
"""Seconds after which a product is not timed again."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the loops of one profile came to."""

    machine: str
    dtype: str
    """Why the type of number was chosen."""
    kernels: str
    """Why what computes the blocks was."""
    peaks: dict[str, float]
    """FLOP/s of the fastest matrix product in each type."""
    types: dict[str, str]
    """Type of the matrix products of each loop."""
    speeds: dict[str, list[float]]
    """Characters a second of each loop, round by round."""


def flops_per_char(config: GPTConfig) -> float:
    """Floating-point operations that training on one character needs, forward and backward.

    6 for each parameter of a matrix product (2 forward, 4 backward), and in each layer 12 S C for attention, all keys
    counted; times S slots over the S - 1 characters they stand for, and 6 V C for the head.
    """
    S, C = config.context_len + 1, config.n_embd
    per_slot = config.n_layer * (6 * 12 * C**2 + 12 * S * C)
    return per_slot * S / (S - 1) + 6 * config.vocab_size * C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument(
        "--profile", choices=[*PROFILES, "both"], default="native", help="laptop: as if without AVX-512 (default: native)"
    )
    default = TrainConfig().batch_size
    parser.add_argument("--batch-size", metavar="N", type=int, default=default, help=f"rolls in a step (default: {default})")


def training(arguments: argparse.Namespace) -> None:
    """Print the comparison for each profile."""
    print(f"{flops_per_char(GPTConfig()) / 1e6:.1f} MFLOP a character: (6 x 12 C^2 + 12 S C) x layers x S / (S - 1) + 6 V C")
    for profile in PROFILES if arguments.profile == "both" else (arguments.profile,):
        environment, size = PROFILES[profile], arguments.batch_size
        found = in_new_process(measure, size, environment=environment)
        memory = {name: in_new_process(memory_of, name, size, environment=environment) for name in found.speeds}
        print(f"\nprofile {profile}: {found.machine}\n{found.dtype}; blocks: {found.kernels}")
        print("; ".join(f"{name} products reach {peak / 1e9:,.0f} GFLOP/s" for name, peak in found.peaks.items()))
        print(
            "\n| loop | products | characters/s | times plain | share of the peak | peak memory, MB |\n|---|---|---|---|---|---|"
        )
        for name, speeds in found.speeds.items():
            speed, dtype = statistics.median(speeds), found.types[name]
            ratio = statistics.median(a / b for a, b in zip(speeds, found.speeds["plain"], strict=True))
            share = speed * flops_per_char(GPTConfig()) / found.peaks[dtype]
            print(f"| {name} | {dtype} | {speed:,.0f} | {ratio:.2f} | {share:.0%} | {memory[name]:,.0f} |", flush=True)


def loops(batch_size: int) -> dict[str, Callable[[], Trainer | PlainLoop]]:
    """What makes each of the loops, with the model and number type that are the default here."""
    model, config = GPTConfig(), TrainConfig(batch_size=batch_size)
    source = RepeatedSource(roll_len=config.windows * model.context_len, batch_size=config.batch_size)
    adamw = replace(config, optimizer="adamw")
    found: dict[str, Callable[[], Trainer | PlainLoop]] = {
        "ours": lambda: full_trainer(config, source),
        "ours, --kernels torch": lambda: full_trainer(config, source, kernels="torch"),
        "ours, --optimizer adamw": lambda: full_trainer(adamw, source),
    }
    if computing().dtype is not torch.float32:
        found["ours, --dtype float32"] = lambda: full_trainer(config, source, dtype="float32")
    return {**found, "plain": lambda: PlainLoop(model, config, source)}


def measure(batch_size: int) -> Found:
    """Time the loops in turns."""
    set_threads(None)
    made = {name: make() for name, make in loops(batch_size).items()}
    types = {
        name: str(loop.dtype if isinstance(loop, Trainer) else torch.float32).removeprefix("torch.")
        for name, loop in made.items()
    }
    for loop in made.values():
        loop.update(1e-3)  # the first step makes buffers and kernels
    results = in_turns(*(timed(loop, batch_size) for loop in made.values()))
    return Found(
        machine=machine(),
        dtype=computing().dtype_reason,
        kernels=computing().kernels_reason,
        peaks={name: max(map(product_speed, PRODUCTS, [name] * len(PRODUCTS))) for name in ("float32", "bfloat16")},
        types=types,
        speeds=dict(zip(made, results, strict=True)),
    )


def timed(loop: Trainer | PlainLoop, batch_size: int) -> Callable[[], float]:
    """Takes a step and returns characters a second."""
    chars = batch_size * TrainConfig().windows * GPTConfig().context_len
    return lambda: chars / seconds_of(lambda: loop.update(1e-3))


def product_speed(shape: tuple[int, int, int], dtype: str) -> float:
    """FLOP/s of the fastest of a few products of (m, k) and (k, n)."""
    m, k, n = shape
    a, b = torch.ones(m, k, dtype=getattr(torch, dtype)), torch.ones(n, k, dtype=getattr(torch, dtype))
    seconds: list[float] = []
    while sum(seconds) < ENOUGH and len(seconds) < 5:
        seconds.append(seconds_of(lambda: torch.nn.functional.linear(a, b)))
    return 2 * m * k * n / min(seconds)


def memory_of(name: str, batch_size: int) -> float:
    """Peak memory in MB of this process after a few steps of a loop."""
    loop = loops(batch_size)[name]()
    for _ in range(STEPS_FOR_MEMORY):
        loop.update(1e-3)
    return peak_memory() / 1e6
