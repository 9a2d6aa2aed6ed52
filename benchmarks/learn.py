"""How long each recipe takes to learn as much: `fast` with our loop and `seed`, the original's, with the plain one.

Both learn from the same text, each in its own order, until the loss on the same validation text is at most the target. Only
the seconds spent training count; validation is left out of both.

With `--loop ours` recipe seed is trained by our loop too: as many characters, sooner; its seconds say nothing of the plain one.

Recipe fast comes down to its end with its learning rate, so it is given its length (`--chars`), and the moment counts at which
its validation loss is first measured to be at most the target. Recipe seed goes on until it gets there, or to `--chars-seed`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import full_trainer
from benchmarks.plain import PlainLoop
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import (
    ArticleReader,
    Batch,
    Source,
    StreamSource,
    TextSource,
    draw_validation,
    find_shards,
    read_texts,
    resolve_stream,
)
from picogpt.data.batches import evenly_spaced_batches
from picogpt.device import set_threads
from picogpt.kernels.compiled import kernels_name
from picogpt.schedule import Budget, learning_rate
from picogpt.training.trainer import Trainer

__all__ = ["LearningCurve", "add_arguments", "learning", "train_until"]

VALIDATION_BATCH = 8
"""Sequences that are validated at once."""
VALIDATION_LEN = 1280
"""Characters of such a sequence: the same ones whatever the length of those that are trained on."""


@dataclass
class LearningCurve:
    """How a recipe learns."""

    chars: int = 0
    seconds: float = 0.0
    """Spent training."""
    losses: list[float] = field(default_factory=list)
    """Each time it was validated, in nats per character."""
    reached: bool = False
    """Whether the last of them is at most the target."""


class _NoRun:
    """A place for validation text that needs none: nothing here goes on later."""

    def save_validation(self, ids: npt.NDArray[np.uint8]) -> None:
        """Nothing to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="FILE", nargs="+", help="text files")
    text.add_argument("--folder", metavar="DIR", type=Path, help="a data set laid out like the hub's")
    parser.add_argument("--loss", metavar="X", type=float, required=True, help="validation loss to reach, nats per character")
    parser.add_argument("--chars", metavar="N", type=int, default=5_000_000, help="length of recipe fast (default: 5,000,000)")
    parser.add_argument(
        "--chars-seed", metavar="N", type=int, default=100_000_000, help="where recipe seed gives up (default: 100,000,000)"
    )
    parser.add_argument("--every", metavar="N", type=int, default=250_000, help="characters between validations")
    parser.add_argument("--val-sequences", metavar="N", type=int, default=64, help="sequences of 1,280 characters to validate on")
    parser.add_argument("--only", choices=["fast", "seed"], help="one of the two (default: both)")
    parser.add_argument("--loop", choices=["plain", "ours"], default="plain", help="the loop of recipe seed (default: plain)")
    parser.add_argument("--threads", metavar="N", type=int, help="threads to compute with (default: one a core)")


def learning(arguments: argparse.Namespace) -> None:
    """Let the recipes learn, one after the other, and print what each took."""
    set_threads(arguments.threads)
    parts = {"fast": learn_fast, "seed": learn_seed}
    courses = {name: parts[name](arguments) for name in ([arguments.only] if arguments.only else parts)}
    for name, course in courses.items():
        outcome = "reached" if course.reached else "not reached"
        print(f"{name}: {arguments.loss} {outcome} after {course.chars:,} characters and {course.seconds:,.0f} s of training")
    if len(courses) == len(parts) and all(course.reached for course in courses.values()):
        fast, seed = courses["fast"], courses["seed"]
        print(f"seconds of seed over those of fast: {seed.seconds / fast.seconds:.1f}; characters: {seed.chars / fast.chars:.1f}")


def learn_fast(arguments: argparse.Namespace) -> LearningCurve:
    """Recipe fast, in this machine's own number type."""
    source, val_batches = open_source(arguments, TrainConfig())
    config = suitable_config({}, arguments.chars, source)
    trainer = full_trainer(config, source)
    print(f"fast: {describe(trainer)}")
    total = -(-arguments.chars // trainer.chars_per_step)

    def step() -> int:
        trainer.train_step(learning_rate(trainer.step, total, config))
        return trainer.chars_per_step

    def validate() -> float:
        return mean_loss(trainer.loss, val_batches, trainer.model)

    course = train_until(step, validate, target=arguments.loss, every=arguments.every, most=arguments.chars, name="fast")
    source.close()
    return course


def learn_seed(arguments: argparse.Namespace) -> LearningCurve:
    """Recipe seed, on the plain loop unless ours is asked for."""
    config = TrainConfig.from_recipe("seed", {})
    source, val_batches = open_source(arguments, config)
    loop: PlainLoop | Trainer = PlainLoop(GPTConfig(), config, source)
    if arguments.loop == "ours":
        loop = full_trainer(config, source)
        print(f"seed, with our loop: {describe(loop)}")
    chars_per_step = config.batch_size * sequence_len(config)

    def step() -> int:
        # The schedule is the original's own, of 600,000 steps, whatever the length.
        loop.train_step(learning_rate(loop.step, loop.step + 1, config))
        return chars_per_step

    def validate() -> float:
        return mean_loss(loop.loss, val_batches, loop.model)

    course = train_until(step, validate, target=arguments.loss, every=arguments.every, most=arguments.chars_seed, name="seed")
    source.close()
    return course


def describe(trainer: Trainer) -> str:
    """What computes."""
    return f"{trainer.dtype}, blocks by --kernels {kernels_name(trainer.runner.kernels)}"


def train_until(
    step: Callable[[], int], validate: Callable[[], float], *, target: float, every: int, most: int, name: str
) -> LearningCurve:
    """Take steps until the validation loss, measured every so many characters, is at most `target`.

    Args:
        step: takes one and returns its characters.
        validate: the loss in nats per character.
        target: the loss to reach.
        every: characters between two validations.
        most: characters at which it ends in any case.
        name: of the recipe, for the lines of progress.
    """
    course = LearningCurve()
    due = every
    while course.chars < most and not course.reached:
        start = time.perf_counter()
        course.chars += step()
        course.seconds += time.perf_counter() - start
        if course.chars >= min(due, most):
            due += every
            course.losses.append(validate())
            course.reached = course.losses[-1] <= target
            line = f"{name}: {course.chars:,} characters in {course.seconds:,.0f} s, validation loss {course.losses[-1]:.4f}"
            print(line, flush=True)
    return course


@torch.no_grad()
def mean_loss(loss: Callable[[Batch], torch.Tensor], batches: list[Batch], model: torch.nn.Module) -> float:
    """Mean loss over all characters of `batches`."""
    model.eval()
    total = sum(loss(batch).item() * batch.targets.size for batch in batches)
    model.train()
    return total / sum(batch.targets.size for batch in batches)


def suitable_config(settings: Mapping[str, Any], chars: int, source: Source) -> TrainConfig:
    """Settings of recipe fast for a run of `chars` characters, as `picogpt-train` has them: some depend on the length."""
    config = TrainConfig(**settings)
    chars_per_step = config.batch_size * sequence_len(config)
    suitable = Budget(chars=chars).suitable_settings(chars_per_step=chars_per_step, train_chars=source.train_chars)
    return TrainConfig(**{**suitable, **settings})


def sequence_len(config: TrainConfig) -> int:
    """Characters of a sequence."""
    return config.windows * GPTConfig().context_len


def open_source(arguments: argparse.Namespace, config: TrainConfig) -> tuple[Source, list[Batch]]:
    """Batches for a recipe, and the validation batches, the same ones for both."""
    length, size = sequence_len(config), config.batch_size
    source: TextSource | StreamSource
    if arguments.text is not None:
        source = TextSource(read_texts(arguments.text, name="text"), sequence_len=length, batch_size=size, seed=config.seed)
    else:
        shards = find_shards(resolve_stream(str(arguments.folder), None))
        validation = draw_validation(ArticleReader(shards, config.seed, print)).ids
        source = StreamSource(
            ArticleReader(shards, config.seed, print), validation, sequence_len=length, batch_size=size, seed=config.seed
        )
        source.begin(_NoRun())
    most = -(-arguments.val_sequences // VALIDATION_BATCH)
    return source, list(evenly_spaced_batches(source.val_ids, VALIDATION_LEN, VALIDATION_BATCH, most))
