"""Settings of recipe fast compared at equal characters: the same text in the same order, the same validation text, paired.

Each run has a process of its own with its share of the cores. What a run comes to is the mean loss over the validation text in
nats per character; two runs are compared sequence by sequence, so that the text's own spread drops out of the difference's error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import full_trainer
from benchmarks.learn import open_source, sequence_len, suitable_config
from picogpt.config import TrainConfig
from picogpt.data import Batch
from picogpt.device import set_threads
from picogpt.schedule import learning_rate
from picogpt.threads import spin_briefly
from picogpt.training.trainer import Trainer

__all__ = ["Outcome", "add_arguments", "paired", "parse_arm", "sweep"]

AVERAGED_SHARE = 0.1
"""Share of a run, at its end, over which weights are averaged for `--average`."""
AVERAGE_EVERY = 10
"""Steps between two of the weights that are averaged."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    arm: str
    seed: int
    losses: list[float]
    """Of each validation sequence, in nats per character."""
    averaged: list[float]
    """The same for the mean of the last weights; empty without `--average`."""
    seconds: float
    """Spent training."""
    chars: int

    @property
    def mean(self) -> float:
        """Nats per character."""
        return float(np.mean(self.losses))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="FILE", nargs="+", help="text files")
    text.add_argument("--folder", metavar="DIR", type=Path, help="a data set laid out like the hub's")
    parser.add_argument("--chars", metavar="N", type=int, default=1_000_000, help="length of each run (default: 1,000,000)")
    parser.add_argument("--seeds", metavar="N", type=int, nargs="+", default=[TrainConfig().seed], help="seeds (default: 1337)")
    parser.add_argument("--val-sequences", metavar="N", type=int, default=200, help="sequences to validate on (default: 200)")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--average", action="store_true", help="also score the mean of the weights over the last tenth")
    parser.add_argument(
        "--results",
        metavar="FILE",
        type=Path,
        help="keep outcomes here, a JSON object a line; runs in it are not repeated: begin a new file for another text or length",
    )
    parser.add_argument(
        "arms",
        metavar="ARM",
        nargs="+",
        help="settings like 'batch_size=1 muon_interval=4', '' for none; others are compared with the first",
    )


def sweep(arguments: argparse.Namespace) -> None:
    """Train every arm with every seed; print a line as each ends, then the table."""
    outcomes = read_outcomes(arguments.results)
    runs = [(arm, seed) for seed in arguments.seeds for arm in arguments.arms]
    due = [run for run in runs if run not in outcomes]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    spin_briefly()  # the runs' processes inherit it
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train_arm, arguments, *run, threads) for run in due]
        for future in as_completed(futures):
            outcome = future.result()
            outcomes[outcome.arm, outcome.seed] = outcome
            if arguments.results is not None:
                with arguments.results.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            print(f"{outcome.arm or 'as it is'}, seed {outcome.seed}: {outcome.mean:.4f} in {outcome.seconds:,.0f} s", flush=True)
    print(report([[outcomes[arm, seed] for seed in arguments.seeds] for arm in arguments.arms]))


def read_outcomes(file: Path | None) -> dict[tuple[str, int], Outcome]:
    """Outcomes of earlier sweeps, by arm and seed."""
    if file is None or not file.exists():
        return {}
    found = [Outcome(**json.loads(line)) for line in file.read_text().splitlines()]
    return {(outcome.arm, outcome.seed): outcome for outcome in found}


def parse_arm(arm: str) -> dict[str, Any]:
    """Settings of `TrainConfig` by name, from words like `lr=0.01`.

    Raises:
        ValueError: a word names no setting.
    """
    defaults = dataclasses.asdict(TrainConfig())
    settings: dict[str, Any] = {}
    for word in arm.split():
        name, equals, value = word.partition("=")
        if not equals or name not in defaults:
            raise ValueError(f"{word!r} is no setting; write NAME=VALUE with a name of {', '.join(defaults)}")
        settings[name] = type(defaults[name])(value)
    return settings


def train_arm(arguments: argparse.Namespace, arm: str, seed: int, threads: int) -> Outcome:
    """Train one run from its first step to its last, and score it."""
    set_threads(threads)
    settings = {**parse_arm(arm), "seed": seed}
    source, val_batches = open_source(arguments, TrainConfig(**settings))
    config = suitable_config(settings, arguments.chars, source)
    trainer = full_trainer(config, source)
    total = math.ceil(arguments.chars / trainer.chars_per_step)
    first_averaged = math.ceil((1 - AVERAGED_SHARE) * total)
    mean, count = [torch.zeros_like(parameter) for parameter in trainer.model.parameters()], 0
    start = time.perf_counter()
    while trainer.step < total:
        trainer.train_step(learning_rate(trainer.step, total, config))
        if arguments.average and trainer.step >= first_averaged and trainer.step % AVERAGE_EVERY == 0:
            count += 1
            add_to_mean(mean, trainer, count)
    seconds = time.perf_counter() - start
    losses = sequence_losses(trainer, val_batches)
    averaged = []
    if count:
        with torch.no_grad():
            for parameter, value in zip(trainer.model.parameters(), mean, strict=True):
                parameter.copy_(value)
        averaged = sequence_losses(trainer, val_batches)
    source.close()
    return Outcome(arm, seed, losses, averaged, seconds, total * config.batch_size * sequence_len(config))


@torch.no_grad()
def add_to_mean(mean: Sequence[torch.Tensor], trainer: Trainer, count: int) -> None:
    """Take the weights as they are into their mean, as its `count`-th."""
    for parameter, value in zip(trainer.model.parameters(), mean, strict=True):
        value.lerp_(parameter, 1 / count)


@torch.no_grad()
def sequence_losses(trainer: Trainer, batches: Sequence[Batch]) -> list[float]:
    """Mean loss of each sequence, in nats per character."""
    trainer.model.eval()
    sequences = [Batch(batch.inputs[i : i + 1], batch.targets[i : i + 1]) for batch in batches for i in range(len(batch.inputs))]
    losses = [trainer.loss(sequence).item() for sequence in sequences]
    trainer.model.train()
    return losses


def paired(arm: Sequence[Outcome], first: Sequence[Outcome]) -> tuple[float, float]:
    """Mean difference to the first arm's runs of the same seeds, and its standard error.

    With one seed the error is that of the validation sequences alone; with more it is that of the seeds' differences.
    """
    differences: list[npt.NDArray[np.float64]] = [np.subtract(a.losses, b.losses) for a, b in zip(arm, first, strict=True)]
    samples = differences[0] if len(differences) == 1 else np.array([d.mean() for d in differences])
    return float(np.mean(differences)), float(samples.std(ddof=1) / math.sqrt(len(samples)))


def report(arms: Sequence[Sequence[Outcome]]) -> str:
    """A table in Markdown."""
    lines = ["", "| settings | nats a character | minus the first | averaged | characters/s |", "|---|---|---|---|---|"]
    for runs in arms:
        loss = np.mean([run.mean for run in runs])
        difference, error = paired(runs, arms[0])
        averaged = f"{np.mean([run.averaged for run in runs]):.4f}" if runs[0].averaged else ""
        speed = sum(run.chars for run in runs) / sum(run.seconds for run in runs)
        name = runs[0].arm or "as it is"
        against = f"{difference:+.4f} ± {error:.4f}" if runs is not arms[0] else ""
        lines.append(f"| {name} | {loss:.4f} | {against} | {averaged} | {speed:,.0f} |")
    return "\n".join(lines)
