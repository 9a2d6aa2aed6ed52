"""The training loop against plain ones: speed, share of what the machine reaches, and memory.

Each loop has a process of its own, with the settings it would have if it ran alone.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.common import backend, full_trainer, interleave, machine, process
from benchmarks.peaks import disturbances, measure_peaks, peak_flops
from benchmarks.plain import NanoGPTLoop, PlainLoop
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import RandomSource
from picogpt.device import set_threads
from picogpt.training.memory import peak_memory
from picogpt.training.trainer import Trainer, time_call

__all__ = ["add_arguments", "flops_per_char", "report", "training"]

PROFILES = {
    "native": {},
    "laptop": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
"""Environment of each profile: the machine as it is, and without the instructions that a laptop of some years does not have.

The last one is for torch's products in float32, which are MKL's, and on a processor by Intel use AVX-512 in spite of the others.
"""
CHARS_IN_A_TURN = 7680
"""Characters that a turn takes at least, in whole steps."""
NANOGPT_WINDOWS = (20, 64)
"""Windows of a step, the nanoGPT way; the faster one is what ours is compared with."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the loops of a profile are measured on."""

    machine: str
    dtype: str
    """Why the type of number was chosen."""
    kernels: str
    """Why what computes the blocks was."""
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
    default = TrainConfig()
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=default.batch_size,
        help=f"sequences in a step (default: {default.batch_size})",
    )
    parser.add_argument(
        "--windows", metavar="N", type=int, default=default.windows, help=f"windows in a sequence (default: {default.windows})"
    )
    parser.add_argument(
        "--muon-interval",
        metavar="N",
        type=int,
        default=default.muon_interval,
        help=f"steps between two of Muon's updates of a block (default: {default.muon_interval})",
    )


def training(arguments: argparse.Namespace) -> None:
    """Print the comparison for each profile."""
    config = TrainConfig(batch_size=arguments.batch_size, windows=arguments.windows, muon_interval=arguments.muon_interval)
    print(f"{flops_per_char(GPTConfig()) / 1e6:.1f} MFLOP a character: (6 x 12 C^2 + 12 S C) x layers x S / (S - 1) + 6 V C")
    print(f"{config.batch_size} x {config.windows} windows a step, Muon's interval {config.muon_interval}")
    for profile in PROFILES if arguments.profile == "both" else (arguments.profile,):
        compare(profile, config)


def compare(profile: str, config: TrainConfig) -> None:
    """Print the comparison for one profile: the loops take turns, each in a process of its own."""
    with process(PROFILES[profile]) as call:
        basis: Setup = call(describe_setup)
        print(f"\nprofile {profile}: {basis.machine}\n{basis.dtype}; blocks: {basis.kernels}", flush=True)
        before = call(measure_peaks)
    with ExitStack() as stack:
        calls = {name: stack.enter_context(process(PROFILES[profile])) for name in basis.loops}
        types = {name: call(begin, name, config) for name, call in calls.items()}
        speeds = interleave(*(partial(call, take_turn) for call in calls.values()))
        rows = [
            Row(name, types[name], found, call(peak_memory) / 1e6)
            for (name, call), found in zip(calls.items(), speeds, strict=True)
        ]
    with process(PROFILES[profile]) as call:
        call(describe_setup)
        after = call(measure_peaks)
    print(report(rows, before, after), flush=True)


class Row(NamedTuple):
    """What was measured of a loop."""

    name: str
    dtype: str
    """Type of its matrix products."""
    speeds: list[float]
    """Characters a second in each turn."""
    memory: float
    """At its peak, in MB."""


def report(rows: list[Row], before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """The machine's limits and the loops as two tables in Markdown, and a line where the machine was not quiet."""
    lines = ["", "| limit | before | after |", "|---|---|---|"]
    for name, value in before.items():
        unit = "GB/s" if name.startswith("memory") else "GFLOP/s"
        lines.append(f"| {name} | {value / 1e9:,.1f} {unit} | {after[name] / 1e9:,.1f} {unit} |")
    if not any(name.startswith("FMA") for name in before):
        lines += ["", "no C compiler: multiply-adds and memory reads are not measured"]
    if changed := disturbances(before, after):
        lines += ["", f"DISTURBED: not the same before and after: {'; '.join(changed)}; repeat it on a quiet machine"]
    plain = next(row for row in rows if row.name == "plain")
    nanogpt = max((row for row in rows if row.name.startswith("nanoGPT")), key=lambda row: statistics.median(row.speeds))
    lines += ["", f"times nanoGPT: against {nanogpt.name}, the fastest of its kind"]
    lines += ["", "| loop | products | characters/s | times nanoGPT | times plain | share of the peak | peak memory, MB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        speed = statistics.median(row.speeds)
        share = speed * flops_per_char(GPTConfig()) / max(peak_flops(peaks, row.dtype) for peaks in (before, after))
        ratios = " | ".join(f"{times(row, other):.2f}" for other in (nanogpt, plain))
        lines.append(f"| {row.name} | {row.dtype} | {speed:,.0f} | {ratios} | {share:.0%} | {row.memory:,.0f} |")
    return "\n".join(lines)


def times(row: Row, other: Row) -> float:
    """How many times as fast one loop is as another: the median over the turns."""
    return statistics.median(a / b for a, b in zip(row.speeds, other.speeds, strict=True))


def describe_setup() -> Setup:
    """What this process computes with."""
    set_threads(None)
    chosen = backend(TrainConfig().batch_size)
    float32 = chosen.dtype is torch.float32
    return Setup(
        machine=machine(),
        dtype=chosen.dtype_reason,
        kernels=chosen.kernels_reason,
        loops=[name for name in LOOPS if not (float32 and name in IN_BFLOAT16)],
    )


def ours(config: TrainConfig, *, dtype: str = "auto", kernels: str = "auto", adamw: bool = False) -> Trainer:
    """The loop of `picogpt-train` with these flags."""
    if adamw:
        config = replace(config, optimizer="adamw")
    source = RandomSource(sequence_len=config.windows * GPTConfig().context_len, batch_size=config.batch_size)
    return full_trainer(config, source, dtype=dtype, kernels=kernels)


def plain(config: TrainConfig) -> PlainLoop:
    """The plain loop with the same batches."""
    source = RandomSource(sequence_len=config.windows * GPTConfig().context_len, batch_size=config.batch_size)
    return PlainLoop(GPTConfig(), config, source)


def nanogpt(config: TrainConfig, *, windows: int, dtype: torch.dtype = torch.float32) -> NanoGPTLoop:  # noqa: ARG001 (has its own)
    """The nanoGPT way with so many windows a step."""
    source = RandomSource(sequence_len=GPTConfig().context_len, batch_size=windows)
    return NanoGPTLoop(GPTConfig(), source, dtype)


LOOPS: dict[str, Callable[[TrainConfig], Trainer | PlainLoop | NanoGPTLoop]] = {
    "ours": ours,
    "ours, --optimizer adamw": partial(ours, adamw=True),
    "ours, --kernels torch": partial(ours, kernels="torch"),
    "ours, --kernels torch --optimizer adamw": partial(ours, kernels="torch", adamw=True),
    "ours, --dtype float32": partial(ours, dtype="float32"),
    "plain": plain,
    **{f"nanoGPT, {n} windows": partial(nanogpt, windows=n) for n in NANOGPT_WINDOWS},
    **{f"nanoGPT, {n} windows, autocast": partial(nanogpt, windows=n, dtype=torch.bfloat16) for n in NANOGPT_WINDOWS},
}
"""What makes each of them, with the model and number type that are the default here unless it says otherwise."""
IN_BFLOAT16 = {"ours, --dtype float32", *(name for name in LOOPS if name.endswith("autocast"))}
"""Those that differ from the others only where products are in bfloat16."""
_own: list[Trainer | PlainLoop | NanoGPTLoop] = []
"""The loop of this process."""


def begin(name: str, config: TrainConfig) -> str:
    """Make the loop of this process; return the type of its matrix products."""
    set_threads(None)
    loop = LOOPS[name](config)
    _own.append(loop)
    loop.train_step(1e-3)  # the first step makes buffers and kernels
    return str(loop.dtype).removeprefix("torch.")


def take_turn() -> float:
    """Take a few steps; return characters a second."""
    (loop,) = _own
    steps = math.ceil(CHARS_IN_A_TURN / loop.chars_per_step)
    return steps * loop.chars_per_step / time_call(lambda: [loop.train_step(1e-3) for _ in range(steps)])
