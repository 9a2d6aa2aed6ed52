"""Length and learning rate of a run: a budget becomes a schedule of steps and epochs. Pure functions, without torch.

An epoch here is a stretch of steps between two entries of the loss log, not a pass over the text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from picogpt.checks import require, require_between, require_whole
from picogpt.config import Decay, TrainConfig
from picogpt.errors import ConfigError

__all__ = [
    "EPOCHS_OF_A_BUDGET",
    "MAX_SUITABLE_CHARS",
    "MAX_SUITABLE_PASSES",
    "MIN_STEPS_PER_EPOCH",
    "MIN_SUITABLE_CHARS",
    "RECIPE_BUDGETS",
    "SETTINGS_RULES",
    "SHARE_OF_EPOCH_ENDS",
    "STEPS_PER_EPOCH",
    "SUITABLE_PASSES",
    "SUITABLE_RULE",
    "VAL_SHARE",
    "Budget",
    "Pace",
    "Schedule",
    "decay_progress",
    "epochs_since_best",
    "fraction_of_peak",
    "learning_rate",
    "lr_at_step",
    "suitable_chars",
    "suitable_settings",
    "warmup_steps_of",
]

RECIPE_BUDGETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"seed": MappingProxyType({"epochs": 300})})
"""Length of each recipe that has its own."""
STEPS_PER_EPOCH = 500
"""Default length of an epoch in a run with a number of epochs."""
MIN_STEPS_PER_EPOCH = 4  # a validation batch, being a forward pass, costs a third of a step: less than a tenth of four
"""Minimum length of an epoch in a run with a budget."""
VAL_SHARE = 0.2
"""Default number of validation batches per training step."""
EPOCHS_OF_A_BUDGET = 20  # so that a curve, a sample and a checkpoint come early
"""Approximate number of epochs in a run with a budget."""
SHARE_OF_EPOCH_ENDS = 0.25
"""Largest fraction of a budget of minutes that ends of epochs may take; a short run has fewer epochs."""

# Constants of `suitable_chars`.
SUITABLE_PASSES = 4
MIN_SUITABLE_CHARS = 700_000
MAX_SUITABLE_PASSES = 20
MAX_SUITABLE_CHARS = 20_000_000
SUITABLE_RULE = (
    f"without a length {SUITABLE_PASSES} passes over the text; a short text is repeated up to {MIN_SUITABLE_CHARS:,} characters "
    f"(at most {MAX_SUITABLE_PASSES} passes), a long text or stream ends at {MAX_SUITABLE_CHARS:,} characters"
)
"""The rule of `suitable_chars`, in words for the help text."""

# Constants of `suitable_settings`.
STEPS_AT_FULL_MUON_LR = 800
REPEATED_TEXT, REPEATED_TEXT_DECAY = 2, 0.1  # passes, and weight decay from there on
SETTINGS_RULES = {
    "muon_lr": f"{TrainConfig.muon_lr}; beyond {STEPS_AT_FULL_MUON_LR} steps it falls with the square root of their number",
    "weight_decay": f"{TrainConfig.weight_decay}; {REPEATED_TEXT_DECAY} if the text is read twice or more",
}
"""The rules of `suitable_settings`, in words for the help text."""
NOMINAL_SPEED = 3_000
"""Characters per second, of the order of two cores with AVX2; only for the settings that suit a run of minutes."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A run in whole steps, computed from a `Budget` on this machine. Stored with the run, so that it is reproducible.

    A run with a budget of minutes is rescheduled while it trains (`picogpt.training.pacing`). The last three fields record where
    a schedule replaced its predecessor.

    Raises:
        ConfigError: a field is out of its range.
    """

    total_steps: int
    """Optimizer steps of the whole run."""
    steps_per_epoch: int
    """Steps between two entries of the loss log; the last epoch may be shorter."""
    val_steps: int
    """Validation batches per epoch; fewer if the validation text is shorter."""
    epoch_start: int = 0
    """Step from which epochs of this length are counted."""
    decay_start: int | None = None
    """Step at which the decay of the learning rate begins or changes its slope; None means after the warm-up."""
    decay_done: float = 0.0
    """Progress of the decay at `decay_start`, in [0, 1]."""

    def __post_init__(self) -> None:
        # A schedule is read from config.json, which may have been edited.
        for name in ("total_steps", "steps_per_epoch", "val_steps"):
            require_whole(name, getattr(self, name), 1)
        require_whole("epoch_start", self.epoch_start, 0)
        if self.decay_start is not None:
            require_whole("decay_start", self.decay_start, 0)
        require_between("decay_done", self.decay_done, 0.0, 1.0, "a share from 0 to 1")

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends after `step` steps."""
        # The last epoch ends with the run, whatever its length.
        return (step - self.epoch_start) % self.steps_per_epoch == 0 or step >= self.total_steps

    def epochs_left(self, step: int) -> int:
        """Return the number of epochs that end after `step`."""
        if step >= self.total_steps:
            return 0
        # Epochs of the whole run, rounded up as the last may be shorter, minus those that have ended.
        return (
            -(-(self.total_steps - self.epoch_start) // self.steps_per_epoch) - (step - self.epoch_start) // self.steps_per_epoch
        )


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Measured speed of a run on this machine, in seconds."""

    seconds_per_step: float
    """Seconds of an optimizer step."""
    seconds_per_val_batch: float
    """Seconds of a validation batch."""
    seconds_per_epoch_end: float
    """Seconds after an epoch's validation: saving, the sample and the plot."""
    seconds_spent: float = 0.0
    """Seconds of the budget already spent: in earlier starts, and in this one since the command began."""


def suitable_chars(train_chars: int | None) -> int:
    """Return the number of characters to train on when no length is given.

    Four passes over a text. A short text is repeated up to 700,000 characters, but at most 20 times; a long text or stream
    ends at 20 million characters. docs/training.md has the measurements for short texts.

    Args:
        train_chars: length of the training text; None for a stream of unknown length.
    """
    if train_chars is None:
        return MAX_SUITABLE_CHARS
    # The order matters: the limit on passes also holds for a text that is repeated up to the minimum.
    wanted = max(SUITABLE_PASSES * train_chars, MIN_SUITABLE_CHARS)
    return min(wanted, MAX_SUITABLE_PASSES * train_chars, MAX_SUITABLE_CHARS)


def suitable_settings(steps: int, passes: float) -> dict[str, Any]:
    """Return the settings of recipe fast that depend on the length of a run, where none are requested.

    Muon's peak learning rate, to two digits, is the default of `TrainConfig` up to 800 steps. From there on it is proportional to
    1 / sqrt(steps), the classical rate of stochastic gradient descent for a known number of steps. Weight decay keeps a model
    from memorizing a text that it reads several times. docs/training.md has the measurements.

    Args:
        steps: optimizer steps of the whole run.
        passes: passes over the text; 0 for a stream.

    Returns:
        Fields of `TrainConfig`.
    """
    muon_lr = TrainConfig.muon_lr * min(1.0, math.sqrt(STEPS_AT_FULL_MUON_LR / steps))
    weight_decay = REPEATED_TEXT_DECAY if passes >= REPEATED_TEXT else TrainConfig.weight_decay
    return {"muon_lr": float(f"{muon_lr:.2g}"), "weight_decay": weight_decay}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Length of a run: epochs of a fixed number of steps, minutes, or characters; by default `suitable_chars`.

    Raises:
        ConfigError: a field is out of its range, or both minutes and characters are given.
    """

    epochs: int | None = None
    """Epochs, if neither minutes nor characters are given; None means `suitable_chars`."""
    steps_per_epoch: int | None = None
    """Steps per epoch; None means `STEPS_PER_EPOCH` with `epochs`, else about a twentieth of the run."""
    val_steps: int | None = None
    """Validation batches per epoch; None means a fifth of the steps, a fifteenth of the work: there is no backward pass."""
    minutes: float | None = None
    """Minutes of wall-clock time from the start of the command to its end, summed over all starts of the run."""
    chars: int | None = None
    """Characters to train on, rounded up to whole steps."""
    patience: int | None = None
    """Epochs without a better validation loss after which the run ends; None trains to the end.

    By default epochs have at most a pass over the text then."""

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "val_steps", "chars", "patience"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), 1)
        if self.minutes is not None:
            require(math.isfinite(self.minutes) and self.minutes > 0, "minutes", "a number above 0", self.minutes)
        # Two lengths would contradict each other.
        require(self.minutes is None or self.chars is None, "minutes", "given without chars", self.minutes)
        # A budget of minutes is rescheduled during the run, which always ends with the clock.
        if self.minutes is not None and self.patience is not None:
            raise ConfigError("patience cannot be combined with minutes", "patience")

    @property
    def is_open(self) -> bool:
        """Whether no length is given."""
        return self.epochs is None and self.minutes is None and self.chars is None

    def schedule(
        self, *, chars_per_step: int, train_chars: int | None = None, pace: Pace | None = None, steps_done: int = 0
    ) -> Schedule:
        """Convert the budget to a schedule.

        Args:
            chars_per_step: characters in an optimizer step.
            train_chars: length of the training text; None for a stream of unknown length.
            pace: measured speed of this machine; required for minutes.
            steps_done: steps that the run has already taken; they count, as do the seconds of `pace`.
        """
        # Epochs give the number of steps directly, whatever the text and the machine.
        if self.minutes is None and self.chars is None and self.epochs is not None:
            steps = self.steps_per_epoch or STEPS_PER_EPOCH
            return self._with_validation(self.epochs * steps, steps)
        n_epochs = EPOCHS_OF_A_BUDGET
        if self.minutes is not None:
            assert pace is not None
            steps, n_epochs = self._steps_in_time(max(0.0, self.minutes * 60 - pace.seconds_spent), pace)
            total = steps_done + max(steps, 0 if steps_done else 1)  # a new run takes at least one step
        else:
            total = math.ceil((self.chars or suitable_chars(train_chars)) / chars_per_step)
        # Equal epochs over the whole run, also over the steps already taken, so that the loss curve is evenly spaced.
        share = math.ceil(total / n_epochs)
        if self.patience is not None and train_chars is not None:
            # A plan for far more passes than it takes to overfit would have few epochs until then.
            share = min(share, train_chars // chars_per_step)
        share = max(MIN_STEPS_PER_EPOCH, share)
        return self._with_validation(total, self.steps_per_epoch or share)

    def expected_steps(self, *, chars_per_step: int, train_chars: int | None) -> int:
        """Return the number of steps of a new run, with minutes converted at a nominal speed, the same on every machine.

        Args:
            chars_per_step: characters in an optimizer step.
            train_chars: length of the training text; None for a stream of unknown length.
        """
        nominal = Pace(seconds_per_step=chars_per_step / NOMINAL_SPEED, seconds_per_val_batch=0.0, seconds_per_epoch_end=1.0)
        return self.schedule(chars_per_step=chars_per_step, train_chars=train_chars, pace=nominal).total_steps

    def suitable_settings(self, *, chars_per_step: int, train_chars: int | None) -> dict[str, Any]:
        """Return the settings that suit a new run of this length: see the function of the same name."""
        steps = self.expected_steps(chars_per_step=chars_per_step, train_chars=train_chars)
        return suitable_settings(steps, steps * chars_per_step / (train_chars or math.inf))

    def _steps_in_time(self, left: float, pace: Pace) -> tuple[int, int]:
        """Return the numbers of steps and of epochs that fit into `left` seconds; no step if the budget is used up."""
        step, end = self._with_share_of_validation(pace)
        # As few epochs as keep their ends within their share of the time, and at least the minimum of steps in each.
        by_time, by_steps = int(SHARE_OF_EPOCH_ENDS * left / end), int(left / step / MIN_STEPS_PER_EPOCH)
        n_epochs = max(1, min(EPOCHS_OF_A_BUDGET, by_time, by_steps))
        # Solve left = steps * step + epochs * end, for a given length of the epochs or a given number.
        if self.steps_per_epoch is not None:
            return round(left / (step + end / self.steps_per_epoch)), n_epochs
        return round((left - n_epochs * end) / step), n_epochs

    def _with_share_of_validation(self, pace: Pace) -> tuple[float, float]:
        """Return the seconds of a step and of an epoch's end; validation is included in one of them."""
        # A fixed number of validation batches belongs to an epoch's end; by default their number grows with the steps.
        if self.val_steps is not None:
            return pace.seconds_per_step, pace.seconds_per_epoch_end + self.val_steps * pace.seconds_per_val_batch
        return pace.seconds_per_step + pace.seconds_per_val_batch * VAL_SHARE, pace.seconds_per_epoch_end

    def _with_validation(self, total: int, steps_per_epoch: int) -> Schedule:
        val_steps = self.val_steps or max(1, int(steps_per_epoch * VAL_SHARE))
        return Schedule(total_steps=total, steps_per_epoch=steps_per_epoch, val_steps=val_steps)


def learning_rate(
    step: int, total_steps: int, config: TrainConfig, *, decay_start: int | None = None, decay_done: float = 0.0
) -> float:
    """Return the learning rate of step 0, 1, ..., total_steps - 1: linear warm-up, then decay to `config.min_lr`.

    The decay ends at `config.decay_steps`, or exactly with the run if that is None; in that case the warm-up takes at most
    a tenth of the run. After the decay the rate stays at `config.min_lr`.

    Args:
        step: steps taken before.
        total_steps: steps of the whole run.
        config: peak, floor and shape.
        decay_start: step at which the decay begins or changes its slope; None means after the warm-up.
        decay_done: progress of the decay at `decay_start`.
    """
    # [start, end): the steps of the decay.
    if config.decay_steps is None:
        end, start = total_steps, warmup_steps_of(total_steps, config) if decay_start is None else decay_start
    else:
        end, start = config.decay_steps, config.warmup_steps
    # Warm-up: + 1 because a first step with rate 0 would be wasted.
    if step < start:
        return config.lr * (step + 1) / (start + 1)
    if step >= end:
        return config.min_lr
    # From `decay_done` at `start` to 1 at `end`; `decay_done` is 0 unless the run was replanned.
    progress = decay_done + (1 - decay_done) * (step - start) / max(1, end - start)
    return config.min_lr + decay_height(progress, config.decay) * (config.lr - config.min_lr)


def decay_height(progress: float, decay: Decay) -> float:
    """Return the height of the decay between floor and peak, from 1 at its start (`progress` 0) to 0 at its end (1)."""
    return 1 - progress if decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def decay_progress(height: float, decay: Decay) -> float:
    """Return the progress at which the decay has `height`: the inverse of `decay_height`."""
    return 1 - height if decay == "linear" else math.acos(2 * height - 1) / math.pi


def lr_at_step(step: int, schedule: Schedule, config: TrainConfig) -> float:
    """Return the learning rate of step 0, 1, ... of `schedule`; see `learning_rate`."""
    return learning_rate(step, schedule.total_steps, config, decay_start=schedule.decay_start, decay_done=schedule.decay_done)


def epochs_since_best(val_losses: Sequence[float]) -> int:
    """Count the epochs after the one with the lowest validation loss; `val_losses` has at least one."""
    return len(val_losses) - 1 - min(range(len(val_losses)), key=val_losses.__getitem__)


def warmup_steps_of(total_steps: int, config: TrainConfig) -> int:
    """Return the number of warm-up steps of a run whose decay ends at `total_steps`."""
    # A short run would otherwise spend most of its steps on the warm-up.
    return min(config.warmup_steps, total_steps // 10)


def fraction_of_peak(rate: float, config: TrainConfig) -> float:
    """Return a learning rate as a fraction of the peak, `config.lr`. Each parameter group scales its own peak by it.

    Raises:
        ConfigError: `rate` is negative, above the peak, or NaN.
    """
    share = rate / config.lr
    # The tolerance is for rounding in `learning_rate`; NaN fails every comparison.
    if not 0 <= share <= 1 + 1e-9:
        raise ConfigError(
            f"the learning rate of a step must be from 0 to the config's lr ({config.lr:g}), got {rate:g}; it is a rate, not a "
            "fraction of the peak; for larger steps use a config with a larger lr or muon_lr"
        )
    return share
