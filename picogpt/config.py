"""Settings of the model, of training and of sampling: each with its unit, its range and its reason.

Every default of the project stands here once. A value out of range is refused where it enters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from picogpt.errors import ConfigError

__all__ = [
    "ENGINE_DTYPES",
    "RECIPES",
    "RECIPE_BUDGETS",
    "SUITABLE_RULE",
    "X_AXES",
    "Budget",
    "DataConfig",
    "Decay",
    "EngineDType",
    "EvalConfig",
    "GPTConfig",
    "GenerateConfig",
    "Pace",
    "RunSettings",
    "SampleConfig",
    "Schedule",
    "TextConfig",
    "TextRequest",
    "TrainConfig",
    "check_device",
    "check_dtype",
    "check_kernels",
    "check_run_name",
    "check_text_column",
    "check_threads",
    "check_x_axis",
    "parse_count",
    "parse_new_tokens",
    "suitable_chars",
]

Decay = Literal["linear", "cosine"]
OptimizerName = Literal["muon", "adamw"]
EngineDType = Literal["auto", "float32", "bfloat16", "int8"]

DTYPES = ("auto", "float32", "bfloat16")
"""Types of the matrix products; auto is the faster one on this machine."""
ENGINE_DTYPES = ("auto", "float32", "bfloat16", "int8")
"""Types of the weights that text is generated with; auto is bfloat16, in which the bundled models are stored."""
DEVICES = ("auto", "cpu", "cuda", "mps")
"""Where training computes; auto is a CUDA GPU if there is one, else the CPU."""
KERNELS = ("auto", "c", "torch")
"""What computes the blocks on a CPU: functions in C that are compiled for the model, or torch's; auto is C where that works."""
X_AXES: Mapping[str, str] = MappingProxyType(
    {"epochs": "epoch", "characters": "characters trained on (millions)", "seconds": "seconds of training"}
)
"""What the x axis of a loss curve can count, and its label."""
ATTENTIONS = ("fused", "products")
"""Forms of attention where torch computes the blocks: its fused function, or batched products of matrices."""
MAX_THREADS = 1024
MAX_MUON_INTERVAL = 100
MAX_LR, MAX_MUON_LR = 0.1, 1.0
"""Thirty and fifty times the defaults: what is above them is a slip, a share of the rate for instance, and no rate."""

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

MIN_STEPS_PER_EPOCH = 4
"""A run on a budget has no shorter epochs, or validation would take more than a tenth of its time."""
VAL_SHARE = 0.2
"""Validation batches for each step, where their number is not given."""
EPOCHS_OF_A_BUDGET = 20
"""A run on a budget is cut into about as many, so that a curve, a sample and a checkpoint come early."""
SHARE_OF_EPOCH_ENDS = 0.25
"""Most of a run on a budget of minutes that the ends of its epochs take; a short run has fewer of them for that."""

SUITABLE_PASSES = 4
MIN_SUITABLE_CHARS = 1_000_000
MAX_SUITABLE_PASSES = 20
MAX_SUITABLE_CHARS = 20_000_000
SUITABLE_RULE = (
    f"without a length {SUITABLE_PASSES} passes over the text, at least {MIN_SUITABLE_CHARS:,} characters but no more than "
    f"{MAX_SUITABLE_PASSES} passes, and at most {MAX_SUITABLE_CHARS:,} characters, as many as of a stream"
)
"""See `suitable_chars`."""


def _require(ok: bool, name: str, allowed: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}", name)


def _require_whole(name: str, value: object, minimum: int) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    _require(ok, name, f"a whole number of at least {minimum}", value)


def _require_between(name: str, value: float, low: float, high: float, allowed: str) -> None:
    _require(math.isfinite(value) and low <= value <= high, name, allowed, value)


def check_run_name(name: str) -> str:
    """Return `name` if it can be a run's name.

    Raises:
        ConfigError: it could be mistaken for a path or a flag.
    """
    _require(bool(_RUN_NAME.fullmatch(name)), "run", "1 to 64 letters, digits, '.', '_' or '-', a letter or digit first", name)
    return name


def check_dtype(name: str | None) -> str | None:
    """Return `name` if it is one of `DTYPES` or None.

    Raises:
        ConfigError: there is no such type.
    """
    _require(name is None or name in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", name)
    return name


def check_device(name: str | None) -> str | None:
    """Return `name` if it is one of `DEVICES` or None.

    Raises:
        ConfigError: there is no such device.
    """
    _require(name is None or name in DEVICES, "device", f"one of {', '.join(DEVICES)}", name)
    return name


def check_x_axis(name: str | None) -> str | None:
    """Return `name` if it is one of `X_AXES` or None.

    Raises:
        ConfigError: the x axis cannot count that.
    """
    _require(name is None or name in X_AXES, "x", f"one of {', '.join(X_AXES)}", name)
    return name


def check_kernels(name: str | None) -> str | None:
    """Return `name` if it is one of `KERNELS` or None.

    Raises:
        ConfigError: there are no such functions.
    """
    _require(name is None or name in KERNELS, "kernels", f"one of {', '.join(KERNELS)}", name)
    return name


def check_attention(name: str | None) -> str | None:
    """Return `name` if it is one of `ATTENTIONS` or None.

    Raises:
        ConfigError: there is no such form.
    """
    _require(name is None or name in ATTENTIONS, "attention", f"one of {', '.join(ATTENTIONS)}", name)
    return name


def check_text_column(name: str | None, *, streamed: bool) -> str | None:
    """Return `name`, the column of a data set that holds its text, or None.

    Raises:
        ConfigError: there is a name and the text, not `streamed`, has no columns.
    """
    if name is not None and not streamed:
        raise ConfigError("text_column is for a streamed data set; name one with --dataset, or leave it out", "text_column")
    return name


def check_threads(count: int | None) -> int | None:
    """Return `count` if it is a number of threads or None.

    Raises:
        ConfigError: it is out of range.
    """
    _require(count is None or 1 <= count <= MAX_THREADS, "threads", f"from 1 to {MAX_THREADS}", count)
    return count


_COUNT = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)(\.\d+)?(?:e\+?(\d{1,2}))?([kmg]?)", re.ASCII | re.IGNORECASE)
_SCALES: Mapping[str, int] = MappingProxyType({"": 0, "k": 3, "m": 6, "g": 9})
"""Letters after a number, and the powers of ten that they stand for."""


def parse_count(text: str) -> int:
    """A whole number, written as `2000000`, `2,000,000`, `2_000_000`, `2e6`, `2M` or `0.002G`.

    Raises:
        ConfigError: it is no number of this form, or not a whole one.
    """
    match = _COUNT.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a whole number; write it like 2000000, 2M or 2e6")
    sign, whole, fraction, exponent, letter = match.groups()
    decimals = (fraction or ".")[1:].rstrip("0")
    zeros = int(exponent or 0) + _SCALES[letter.lower()] - len(decimals)
    if zeros < 0:
        raise ConfigError(f"{text!r} is not a whole number; write it like 2000000, 2M or 2e6")
    return int(sign + re.sub("[,_]", "", whole) + decimals + "0" * zeros)


def parse_new_tokens(text: str) -> int | None:
    """A number of characters to write, or None for `inf`: no end.

    Raises:
        ConfigError: it is neither.
    """
    if text == "inf":
        return None
    try:
        count = parse_count(text)
    except ConfigError:
        count = -1
    _require(count >= 0, "max_new_tokens", "a whole number of at least 0, or inf", text)
    return count


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of the model. The defaults are PicoGPT's: 6,374,144 parameters.

    Raises:
        ConfigError: a field is out of its range.
    """

    n_layer: int = 8
    """Blocks."""
    n_head: int = 8
    """Attention heads a block; divides `n_embd`."""
    n_embd: int = 256
    """Width of the embeddings and of every block."""
    context_len: int = 128
    """Characters in a window; the position table has one row more, for the context vector in front."""
    vocab_size: int = 88
    """Token ids: 82 in use, 6 spare, a multiple of 8 for the matrix products."""
    dropout: float = 0.0
    """Probability of dropping an activation in training, in [0, 1). None by default: the texts are longer than the runs."""
    bias: bool = True
    """Whether linear layers and LayerNorms have biases."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "context_len", "vocab_size"):
            _require_whole(name, getattr(self, name), 1)
        _require(self.n_embd % self.n_head == 0, "n_embd", f"a multiple of n_head ({self.n_head})", self.n_embd)
        _require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained: one optimizer step and the learning rate over the steps.

    The field defaults are recipe `fast`; see `RECIPES` and `from_recipe`.

    Raises:
        ConfigError: a field is out of its range.
    """

    recipe: str = "fast"
    """The recipe the other settings started from."""
    batch_size: int = 2
    """Rolls in a step. Small steps, and so more of them, learn more from the same characters."""
    windows: int = 10
    """Windows in a roll: 10 windows of 128 are the 1280 characters that the context vector reaches over."""
    optimizer: OptimizerName = "muon"
    """Muon for the matrices of the blocks (Jordan et al., 2024) with AdamW for the rest, or AdamW for everything."""
    lr: float = 3e-3
    """Highest learning rate of AdamW, reached at the end of the warm-up."""
    muon_lr: float = 0.02
    """Highest learning rate of Muon; it rises and falls with `lr`."""
    muon_interval: int = 2
    """Steps from one of Muon's updates of a block to the next, which goes as many times as far; the blocks take turns."""
    momentum: float = 0.95
    """Decay of Muon's mean gradient, in [0, 1)."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay, at most `lr`."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero; at most a tenth of a run whose decay ends with it."""
    decay: Decay = "linear"
    """Form of the decay from `lr` to `min_lr`. Linear to zero: Bergsma et al., 2025."""
    decay_steps: int | None = None
    """Step at which the decay ends; None means with the run, whose last step is then the last one above `min_lr`."""
    beta1: float = 0.9
    """Decay of the mean gradient, in [0, 1)."""
    beta2: float = 0.95
    """Decay of the mean squared gradient, in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices and embeddings, times the learning rate; biases and norms have none."""
    grad_clip: float = 1.0
    """Largest norm of the gradient over all parameters; 0 turns clipping off."""
    sync_every: int = 0
    """Steps that each rank takes by itself before an outer step (DiLoCo); 0 averages the gradients of every step instead."""
    seed: int = 1337
    """Seed of the initial weights, of the order of the text and of dropout; at least 0, below 2**63."""

    def __post_init__(self) -> None:
        _require(self.recipe in RECIPES, "recipe", f"one of {', '.join(RECIPES)}", self.recipe)
        _require(self.optimizer in get_args(OptimizerName), "optimizer", " or ".join(get_args(OptimizerName)), self.optimizer)
        _require(self.decay in get_args(Decay), "decay", f"one of {', '.join(get_args(Decay))}", self.decay)
        _require_whole("batch_size", self.batch_size, 1)
        _require_whole("windows", self.windows, 1)
        _require_whole("warmup_steps", self.warmup_steps, 0)
        _require_whole("sync_every", self.sync_every, 0)
        if self.decay_steps is not None:
            _require_whole("decay_steps", self.decay_steps, 1)
        _require_between("lr", self.lr, 1e-9, MAX_LR, f"a rate from 1e-9 to {MAX_LR:g}")
        _require_between("min_lr", self.min_lr, 0.0, self.lr, f"from 0 to lr ({self.lr:g})")
        _require_between("muon_lr", self.muon_lr, 1e-9, MAX_MUON_LR, f"a rate from 1e-9 to {MAX_MUON_LR:g}")
        _require_whole("muon_interval", self.muon_interval, 1)
        _require(self.muon_interval <= MAX_MUON_INTERVAL, "muon_interval", f"at most {MAX_MUON_INTERVAL}", self.muon_interval)
        for name in ("beta1", "beta2", "momentum"):
            _require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        for name in ("weight_decay", "grad_clip"):
            _require_between(name, getattr(self, name), 0.0, 1e6, "a number of at least 0")
        _require_whole("seed", self.seed, 0)
        _require(self.seed < 2**63, "seed", "below 2**63", self.seed)

    @classmethod
    def from_recipe(cls, recipe: str, overrides: Mapping[str, Any]) -> TrainConfig:
        """Settings of `recipe`, with those of `overrides` instead where they are not None.

        Raises:
            ConfigError: there is no such recipe, or a value is out of its range.
        """
        _require(recipe in RECIPES, "recipe", f"one of {', '.join(RECIPES)}", recipe)
        given = {name: value for name, value in overrides.items() if value is not None}
        settings = {**RECIPES[recipe], **given, "recipe": recipe}
        if "lr" in given and "min_lr" in RECIPES[recipe]:
            # The recipe's floor is a share of its peak, and stays one.
            settings["min_lr"] = RECIPES[recipe]["min_lr"] / RECIPES[recipe]["lr"] * given["lr"]
        return cls(**settings)


RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": MappingProxyType({}),
        # The settings of the original project.
        "seed": MappingProxyType(
            {
                "optimizer": "adamw",
                "batch_size": 8,
                "weight_decay": 0.1,
                "lr": 6e-4,
                "min_lr": 6e-5,
                "warmup_steps": 2000,
                "decay": "cosine",
                "decay_steps": 600_000,
            }
        ),
    }
)
"""What each recipe sets differently from the field defaults of `TrainConfig`."""
RECIPE_BUDGETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"seed": MappingProxyType({"epochs": 300})})
"""The length of each recipe that has one of its own."""


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
            _require_whole(name, getattr(self, name), 1)
        _require_whole("epoch_start", self.epoch_start, 0)
        if self.decay_start is not None:
            _require_whole("decay_start", self.decay_start, 0)
        _require_between("decay_done", self.decay_done, 0.0, 1.0, "a share from 0 to 1")

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

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "val_steps", "chars"):
            if getattr(self, name) is not None:
                _require_whole(name, getattr(self, name), 1)
        if self.minutes is not None:
            _require(math.isfinite(self.minutes) and self.minutes > 0, "minutes", "a number above 0", self.minutes)
        _require(self.minutes is None or self.chars is None, "minutes", "given without chars", self.minutes)

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


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How the next character is drawn from the model's prediction.

    Raises:
        ConfigError: a field is out of its range.
    """

    temperature: float = 0.5
    """Divides the logits: below 1 surer, above 1 wilder; 0 always takes the likeliest character (greedy)."""
    top_k: int = 0
    """Draw from the k likeliest characters only; 0 from all of them."""
    top_p: float = 1.0
    """Draw from the likeliest characters that together reach this probability, in (0, 1]."""
    min_p: float = 0.0
    """Draw from characters at least so many times as likely as the likeliest, in [0, 1]."""
    seed: int | None = None
    """Seed of the draws; None takes a new one each time."""

    def __post_init__(self) -> None:
        _require_between("temperature", self.temperature, 0.0, 1e6, "a number from 0 to 1,000,000")
        _require_whole("top_k", self.top_k, 0)
        _require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "from 0 to 1", self.min_p)
        if self.seed is not None:
            _require_whole("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How much text is made, and how the windows hop.

    Raises:
        ConfigError: a field is out of its range, or no end is asked of several samples.
    """

    max_new_tokens: int | None = 256
    """Characters to write; None for no end."""
    hop: int | None = None
    """Characters from one window's beginning to the next one's, at most a window; None leaves a sixteenth to be read again."""
    num_samples: int = 1
    """Texts that are made side by side."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample, and are no part of it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            _require_whole("max_new_tokens", self.max_new_tokens, 0)
        if self.hop is not None:
            _require_whole("hop", self.hop, 1)
        _require_whole("num_samples", self.num_samples, 1)
        _require(
            self.num_samples == 1 or self.max_new_tokens is not None, "max_new_tokens", "a number for several samples", "inf"
        )
        _require(all(self.stop), "stop", "a text of at least one character", "")

    def hop_for(self, context_len: int) -> int:
        """The hop for windows of `context_len` characters.

        Raises:
            ConfigError: the hop asked for is longer than a window.
        """
        if self.hop is None:
            return context_len - context_len // 16
        _require(self.hop <= context_len, "hop", f"from 1 to {context_len}, the model's window", self.hop)
        return self.hop


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How much text is scored, and how.

    Raises:
        ConfigError: a field is out of its range.
    """

    chars: int = 200_000
    """Characters to score at most, in whole rolls spread evenly over the text; at least two rolls are."""
    windows: int = 10
    """Windows in a roll, as many as training rolls over by default; the roll shows in the second one first."""

    def __post_init__(self) -> None:
        _require_whole("chars", self.chars, 1)
        _require_whole("windows", self.windows, 2)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a model's texts become ids, and which ids it was trained on. Stored in the model's file."""

    fold: bool
    """Whether characters outside ASCII are folded (`picogpt.folding`)."""
    ids: tuple[int, ...]
    """Ids that the training text holds, in order; of a stream, which is not read beforehand, those that it can hold."""


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """Which text is asked for; nothing asked for means the stored run's, or `auto`."""

    paths: tuple[str, ...] = ()
    """Files and folders, as absolute paths; `-` is standard input."""
    dataset: str | None = None
    """A corpus, a stream of the hub, or a folder laid out like one."""
    column: str | None = None
    """Column of a stream that holds the text."""
    fold: bool | None = None
    """Whether characters outside ASCII are folded; None leaves that to the run."""

    @property
    def is_named(self) -> bool:
        """Whether a text is asked for."""
        return bool(self.paths) or self.dataset is not None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text a run learns from, exactly."""

    dataset: str | None = None
    """Name of the data set, or None where files were given."""
    text: tuple[str, ...] = ()
    """Files and folders, as absolute paths; `-` is standard input."""
    name: str
    """Short name of the text."""
    characters: int | None
    """Length of the whole text; None for a stream."""
    sha256: str
    """SHA-256, in hexadecimal, of its token ids or of a stream's list of files."""
    commit: str | None = None
    """The hub's commit that a stream keeps to."""
    text_column: str | None = None
    """The stream's column that was asked for."""
    files: tuple[str, ...] = ()
    """Addresses of a stream's files at that commit, so that going on needs no list of them."""
    format: str | None = None
    """How a stream's files are read: parquet, json, ..."""
    fold: bool = False
    """Whether characters outside ASCII are folded; runs that were begun before there was folding do not."""


_BEFORE: Mapping[str, Any] = MappingProxyType({"muon_interval": 1})
"""Settings of runs that were begun before there were these."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All that made a run: the content of its `config.json`."""

    model: GPTConfig
    train: TrainConfig
    budget: Budget
    schedule: Schedule
    data: DataConfig
    dtype: str
    """Type of the matrix products, float32 or bfloat16."""
    threads: int
    """Threads that each rank computes with; another number gives other roundings."""
    ranks: int = 1
    """Processes that train together; another number gives other roundings."""
    device: str = "cpu"
    """Where they compute: cpu, cuda or mps."""
    compile: bool = False
    """Whether the blocks are compiled by torch, which rounds otherwise."""
    kernels: str = "torch"
    """What computes the blocks, c or torch; they round otherwise."""
    attention: str | None = None
    """Form of attention where torch computes it, one of `ATTENTIONS`; None in C, and where a run is older than the forms."""
    origin: str | None = None
    """Absolute path of the model that the run began from, or of the original's log; None where it began from nothing."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RunSettings:
        """The inverse of `dataclasses.asdict`; what else is in `content` is passed over.

        Raises:
            ConfigError: a part is missing or not valid.
        """
        try:
            data: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content["data"].items()}
            return cls(
                model=GPTConfig(**content["model"]),
                train=TrainConfig(**{**_BEFORE, **content["train"]}),
                budget=Budget(**content["budget"]),
                schedule=Schedule(**content["schedule"]),
                data=DataConfig(**data),
                dtype=str(content["dtype"]),
                threads=int(content["threads"]),
                ranks=int(content.get("ranks", 1)),
                device=str(content.get("device", "cpu")),
                compile=bool(content.get("compile", False)),
                kernels=str(check_kernels(content.get("kernels", "torch"))),
                attention=check_attention(content.get("attention")),
                origin=content.get("origin"),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the run's config is not valid ({type(error).__name__}: {error})") from error
