"""The training loop against a plain one: speed, share of what the machine's matrix products reach, and memory.

Each loop has a process of its own, with the settings it would have if it ran alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.common import computing, full_trainer, in_turns, machine, process
from benchmarks.plain import PlainLoop
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import RepeatedSource, Source
from picogpt.device import set_threads
from picogpt.memory import peak_memory
from picogpt.train import Trainer, seconds_of

__all__ = ["add_arguments", "flops_per_char", "training"]

PROFILES = {
    "native": {},
    "laptop": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
"""Environment of each profile: the machine as it is, and without the instructions that a laptop of some years does not have.

The last one is for torch's products in float32, which are MKL's, and on a processor by Intel use AVX-512 in spite of the others.
"""
PRODUCTS = ((2048, 2048, 2048), (1024, 4096, 1024), (516, 256, 1024), (5160, 256, 1024))
"""Shapes (m, k, n) whose fastest one counts as the machine's peak; the last two are the model's own."""
STEPS_IN_A_TURN = 3
ENOUGH = 0.5
"""Seconds after which a product is not timed again."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What the loops of a profile are measured on."""

    machine: str
    dtype: str
    """Why the type of number was chosen."""
    kernels: str
    """Why what computes the blocks was."""
    peaks: dict[str, float]
    """FLOP/s of the fastest matrix product in each type."""
    loops: list[str]
    """Names of the loops that differ here."""


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
        compare(profile, arguments.batch_size)


def compare(profile: str, batch_size: int) -> None:
    """Print the comparison for one profile: the loops take turns, each in a process of its own."""
    with process(PROFILES[profile]) as call:
        basis: Basis = call(find_basis)
    print(f"\nprofile {profile}: {basis.machine}\n{basis.dtype}; blocks: {basis.kernels}")
    print("; ".join(f"{name} products reach {peak / 1e9:,.0f} GFLOP/s" for name, peak in basis.peaks.items()))
    with ExitStack() as stack:
        calls = {name: stack.enter_context(process(PROFILES[profile])) for name in basis.loops}
        types = {name: call(begin, name, batch_size) for name, call in calls.items()}
        results = in_turns(*(partial(call, take_turn) for call in calls.values()))
        memory = {name: call(peak_memory) / 1e6 for name, call in calls.items()}
    speeds = dict(zip(calls, results, strict=True))
    print("\n| loop | products | characters/s | times plain | share of the peak | peak memory, MB |\n|---|---|---|---|---|---|")
    for name, found in speeds.items():
        speed = statistics.median(found)
        ratio = statistics.median(a / b for a, b in zip(found, speeds["plain"], strict=True))
        share = speed * flops_per_char(GPTConfig()) / basis.peaks[types[name]]
        print(f"| {name} | {types[name]} | {speed:,.0f} | {ratio:.2f} | {share:.0%} | {memory[name]:,.0f} |", flush=True)


def find_basis() -> Basis:
    """What this process computes with."""
    set_threads(None)
    chosen = computing()
    loops = [name for name in LOOPS if name != "ours, --dtype float32" or chosen.dtype is not torch.float32]
    return Basis(
        machine=machine(),
        dtype=chosen.dtype_reason,
        kernels=chosen.kernels_reason,
        peaks={name: max(map(product_speed, PRODUCTS, [name] * len(PRODUCTS))) for name in ("float32", "bfloat16")},
        loops=loops,
    )


LOOPS: dict[str, Callable[[TrainConfig, Source], Trainer | PlainLoop]] = {
    "ours": full_trainer,
    "ours, --kernels torch": partial(full_trainer, kernels="torch"),
    "ours, --optimizer adamw": lambda config, source: full_trainer(replace(config, optimizer="adamw"), source),
    "ours, --dtype float32": partial(full_trainer, dtype="float32"),
    "plain": lambda config, source: PlainLoop(GPTConfig(), config, source),
}
"""What makes each of them, with the model and number type that are the default here unless it says otherwise."""
_own: list[tuple[Trainer | PlainLoop, int]] = []
"""The loop of this process, and the characters of one of its steps."""


def begin(name: str, batch_size: int) -> str:
    """Make the loop of this process; return the type of its matrix products."""
    set_threads(None)
    config = TrainConfig(batch_size=batch_size)
    roll_len = config.windows * GPTConfig().context_len
    loop = LOOPS[name](config, RepeatedSource(roll_len=roll_len, batch_size=batch_size))
    _own.append((loop, batch_size * roll_len))
    loop.update(1e-3)  # the first step makes buffers and kernels
    return str(loop.dtype if isinstance(loop, Trainer) else torch.float32).removeprefix("torch.")


def take_turn() -> float:
    """Take a few steps; return characters a second."""
    ((loop, chars),) = _own
    return STEPS_IN_A_TURN * chars / seconds_of(lambda: [loop.update(1e-3) for _ in range(STEPS_IN_A_TURN)])


def product_speed(shape: tuple[int, int, int], dtype: str) -> float:
    """FLOP/s of the fastest of a few products of (m, k) and (k, n)."""
    m, k, n = shape
    a, b = torch.ones(m, k, dtype=getattr(torch, dtype)), torch.ones(n, k, dtype=getattr(torch, dtype))
    seconds: list[float] = []
    while sum(seconds) < ENOUGH and len(seconds) < 5:
        seconds.append(seconds_of(lambda: torch.nn.functional.linear(a, b)))
    return 2 * m * k * n / min(seconds)
