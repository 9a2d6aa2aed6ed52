"""The length of a run and its learning rate: budgets, epochs and steps. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from picogpt.checks import require, require_between, require_whole
from picogpt.config import TrainConfig
from picogpt.errors import ConfigError

__all__ = [
    "EPOCHS_OF_A_BUDGET",
    "MAX_SUITABLE_CHARS",
    "MAX_SUITABLE_PASSES",
    "MIN_STEPS_PER_EPOCH",
    "MIN_SUITABLE_CHARS",
    "RECIPE_BUDGETS",
    "SHARE_OF_EPOCH_ENDS",
    "SUITABLE_PASSES",
    "SUITABLE_RULE",
    "VAL_SHARE",
    "Budget",
    "Pace",
    "Schedule",
    "cool_down",
    "epochs_since_best",
    "fraction_of_peak",
    "learning_rate",
    "lr_at_step",
    "suitable_chars",
    "warmup_steps_of",
]

RECIPE_BUDGETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"seed": MappingProxyType({"epochs": 300})})
"""The length of each recipe that has one of its own."""
MIN_STEPS_PER_EPOCH = 4
"""A run on a budget has no shorter epochs, or validation would take more than a tenth of its time."""
VAL_SHARE = 0.2
"""Validation batches for each step, where their number is not given."""
EPOCHS_OF_A_BUDGET = 20
"""A run on a budget is cut into about as many, so that a curve, a sample and a checkpoint come early."""
SHARE_OF_EPOCH_ENDS = 0.25
"""Most of a run on a budget of minutes that the ends of its epochs take; a short run has fewer of them for that."""

COOL_DOWN_SHARE = 0.2
"""Steps of a cool-down, as a share of the steps to the weights that it starts from."""

SUITABLE_PASSES = 4
MIN_SUITABLE_CHARS = 1_000_000
MAX_SUITABLE_PASSES = 20
MAX_SUITABLE_CHARS = 20_000_000
SUITABLE_RULE = (
    f"without a length {SUITABLE_PASSES} passes over the text, at least {MIN_SUITABLE_CHARS:,} characters but no more than "
    f"{MAX_SUITABLE_PASSES} passes, and at most {MAX_SUITABLE_CHARS:,} characters, as many as of a stream"
)
"""See `suitable_chars`."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A run in whole steps: what a `Budget` comes to on this machine. Stored with the run, which it makes reproducible.

    A run on a budget of minutes is re-planned as it goes (`picogpt.training.pacing`). Each plan is a schedule, and the last three
    fields say where it took over from the one before.

    Raises:
        ConfigError: a field is out of its range.
    """

    total_steps: int
    """Optimizer steps of the whole run."""
    steps_per_epoch: int
    """Steps between two entries of the loss log; the last epoch may be shorter."""
    val_steps: int
    """Batches of validation text an epoch; fewer where the validation text is shorter."""
    epoch_start: int = 0
    """Step from which epochs of this length are counted."""
    decay_start: int | None = None
    """Step at which the decay of the learning rate begins, or takes another slope; None means after the warm-up."""
    decay_done: float = 0.0
    """Share of the decay that was done by `decay_start`, in [0, 1]."""

    def __post_init__(self) -> None:
        for name in ("total_steps", "steps_per_epoch", "val_steps"):
            require_whole(name, getattr(self, name), 1)
        require_whole("epoch_start", self.epoch_start, 0)
        if self.decay_start is not None:
            require_whole("decay_start", self.decay_start, 0)
        require_between("decay_done", self.decay_done, 0.0, 1.0, "a share from 0 to 1")

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends with `step` steps taken."""
        return (step - self.epoch_start) % self.steps_per_epoch == 0 or step >= self.total_steps

    def epochs_left(self, step: int) -> int:
        """Ends of epochs that come after `step` steps taken."""
        if step >= self.total_steps:
            return 0
        return (
            -(-(self.total_steps - self.epoch_start) // self.steps_per_epoch) - (step - self.epoch_start) // self.steps_per_epoch
        )


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a run trains on this machine, as measured."""

    seconds_per_step: float
    """One optimizer step."""
    seconds_per_val_batch: float
    """One batch of validation."""
    seconds_per_epoch_end: float
    """What comes after an epoch's validation: saving, the sample and the picture."""
    seconds_spent: float = 0.0
    """Seconds of the budget that have passed: those of earlier starts, and of this one since the command began."""


def suitable_chars(train_chars: int | None) -> int:
    """Characters to train on where no length is given.

    A first rule, not tuned yet: four passes over a text; at least a million characters, as a short text takes more passes, but
    no more than 20 of them; at most 20 million, as many as of a stream. docs/training.md gives the reasons.

    Args:
        train_chars: length of the text that is trained on; None for a stream, which has no end.
    """
    if train_chars is None:
        return MAX_SUITABLE_CHARS
    wanted = max(SUITABLE_PASSES * train_chars, MIN_SUITABLE_CHARS)
    return min(wanted, MAX_SUITABLE_PASSES * train_chars, MAX_SUITABLE_CHARS)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train: epochs of a fixed number of steps, or minutes, or characters; or what suits the text.

    Raises:
        ConfigError: a field is out of its range, or both minutes and characters are given.
    """

    epochs: int | None = None
    """Epochs, where neither minutes nor characters are given; None means `suitable_chars`."""
    steps_per_epoch: int | None = None
    """Steps an epoch; None means 500 with `epochs`, else about a twentieth of the run."""
    val_steps: int | None = None
    """Validation batches an epoch; None means a fifth of the steps, which takes under a tenth of the time."""
    minutes: float | None = None
    """Minutes on the clock from the start of the command to its end, over all starts of the run."""
    chars: int | None = None
    """Characters to train on, rounded up to whole steps."""
    patience: int | None = None
    """Epochs without a better validation loss after which the run cools down and ends; None trains to the end."""

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "val_steps", "chars", "patience"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), 1)
        if self.minutes is not None:
            require(math.isfinite(self.minutes) and self.minutes > 0, "minutes", "a number above 0", self.minutes)
        require(self.minutes is None or self.chars is None, "minutes", "given without chars", self.minutes)
        # A budget of minutes is re-planned all the time, and its plan always ends with the clock.
        require(self.minutes is None or self.patience is None, "patience", "given without minutes", self.patience)

    @classmethod
    def from_recipe(cls, recipe: str, given: Mapping[str, Any]) -> Budget:
        """The budget of `recipe`, or with `given` fields instead.

        Raises:
            ConfigError: a value is out of its range.
        """
        lengths = {"epochs", "minutes", "chars"}
        return cls(**({} if lengths & given.keys() else RECIPE_BUDGETS.get(recipe, {})), **given)

    @property
    def is_open(self) -> bool:
        """Whether no length is given."""
        return self.epochs is None and self.minutes is None and self.chars is None

    def schedule(
        self, *, chars_per_step: int, train_chars: int | None = None, pace: Pace | None = None, steps_done: int = 0
    ) -> Schedule:
        """Turn the budget into steps.

        Args:
            chars_per_step: characters in one optimizer step.
            train_chars: length of the text that is trained on; None for a stream.
            pace: how fast this machine trains; needed for minutes.
            steps_done: steps that the run has taken already; they count, as do the seconds of `pace`.
        """
        n_epochs = EPOCHS_OF_A_BUDGET
        if self.minutes is not None:
            assert pace is not None
            left = max(0.0, self.minutes * 60 - pace.seconds_spent)
            step, end = self._with_share_of_validation(pace)
            n_epochs = max(1, min(n_epochs, int(SHARE_OF_EPOCH_ENDS * left / end), int(left / step / MIN_STEPS_PER_EPOCH)))
            if self.steps_per_epoch is not None:
                steps = round(left / (step + end / self.steps_per_epoch))
            else:
                steps = round((left - n_epochs * end) / step)
            total = steps_done + max(steps, 0 if steps_done else 1)
        elif self.chars is None and self.epochs is not None:
            steps = self.steps_per_epoch or 500
            return self._with_validation(self.epochs * steps, steps)
        else:
            total = math.ceil((self.chars or suitable_chars(train_chars)) / chars_per_step)
        share = max(MIN_STEPS_PER_EPOCH, math.ceil(total / n_epochs))
        return self._with_validation(total, self.steps_per_epoch or share)

    def _with_share_of_validation(self, pace: Pace) -> tuple[float, float]:
        """Seconds of a step and of an epoch's end, the one of them that validation grows with including it."""
        if self.val_steps is not None:
            return pace.seconds_per_step, pace.seconds_per_epoch_end + self.val_steps * pace.seconds_per_val_batch
        return pace.seconds_per_step + pace.seconds_per_val_batch * VAL_SHARE, pace.seconds_per_epoch_end

    def _with_validation(self, total: int, steps_per_epoch: int) -> Schedule:
        val_steps = self.val_steps or max(1, int(steps_per_epoch * VAL_SHARE))
        return Schedule(total_steps=total, steps_per_epoch=steps_per_epoch, val_steps=val_steps)


def learning_rate(
    step: int, total_steps: int, config: TrainConfig, *, decay_start: int | None = None, decay_done: float = 0.0
) -> float:
    """Learning rate of step 0, 1, ..., total_steps - 1: up in a straight line, then down to `config.min_lr`.

    The decay ends at `config.decay_steps`, or exactly with the run where that is None; there the warm-up takes at most
    a tenth of the run. After the decay the rate stays at `config.min_lr`.

    Args:
        step: steps taken before.
        total_steps: steps of the whole run.
        config: peak, floor and shape.
        decay_start: step at which the decay begins, or from which on it takes another slope; None means after the warm-up.
        decay_done: share of the decay that was done by then.
    """
    if config.decay_steps is None:
        end, start = total_steps, warmup_steps_of(total_steps, config) if decay_start is None else decay_start
    else:
        end, start = config.decay_steps, config.warmup_steps
    if step < start:
        return config.lr * (step + 1) / (start + 1)
    if step >= end:
        return config.min_lr
    progress = decay_done + (1 - decay_done) * (step - start) / max(1, end - start)
    share = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + share * (config.lr - config.min_lr)


def lr_at_step(step: int, schedule: Schedule, config: TrainConfig) -> float:
    """Learning rate of step 0, 1, ... of `schedule` (`learning_rate`)."""
    return learning_rate(step, schedule.total_steps, config, decay_start=schedule.decay_start, decay_done=schedule.decay_done)


def epochs_since_best(val_losses: Sequence[float]) -> int:
    """Count the epochs after the one with the lowest validation loss; `val_losses` has at least one."""
    return len(val_losses) - 1 - min(range(len(val_losses)), key=val_losses.__getitem__)


def cool_down(schedule: Schedule, step: int, best_step: int, config: TrainConfig) -> Schedule:
    """Plan a cool-down at `step` with the weights of `best_step`: the learning rate of that step comes down to its floor.

    A run that was planned to end there would have had a lower rate by then, and a lower loss for that. The cool-down makes up
    for it in a fifth of the steps that led to the weights (compare Hägele et al., arXiv 2405.18392).

    Args:
        schedule: the plan until now; its decay must end with the run.
        step: steps taken.
        best_step: steps taken when the weights were the best.
        config: peak, floor and shape of the learning rate.
    """
    rate = lr_at_step(max(best_step - 1, 0), schedule, config)
    # A rate of the warm-up can be below the floor, and the floor can be the peak.
    span = config.lr - config.min_lr
    share = max(0.0, rate - config.min_lr) / span if span else 0.0
    # The inverse of the decay: how much of it is done where the rate has come down to this share.
    done = 1 - share if config.decay == "linear" else math.acos(2 * share - 1) / math.pi
    total = step + math.ceil(COOL_DOWN_SHARE * best_step)
    return replace(schedule, total_steps=total, decay_start=step, decay_done=done)


def warmup_steps_of(total_steps: int, config: TrainConfig) -> int:
    """Steps of warm-up in a run of `total_steps` whose decay ends with it."""
    return min(config.warmup_steps, total_steps // 10)


def fraction_of_peak(rate: float, config: TrainConfig) -> float:
    """What a learning rate is of the highest one, `config.lr`, in [0, 1]: each group of parameters has that share of its own.

    Raises:
        ConfigError: `rate` is negative, above the highest one, or no number.
    """
    share = rate / config.lr
    if not 0 <= share <= 1 + 1e-9:
        raise ConfigError(
            f"the learning rate of a step must be from 0 to the config's lr ({config.lr:g}), got {rate:g}; it is a rate, not a "
            "fraction of the peak; for larger steps use a config with a larger lr or muon_lr"
        )
    return share
