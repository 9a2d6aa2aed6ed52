"""Settings of the model, of training and of sampling: each with its unit, its range and its reason.

Every default of the project stands here once. A value out of range is refused where it enters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from picogpt.checks import require, require_between, require_whole
from picogpt.wording import plural

__all__ = [
    "LOGS_DIR",
    "RECIPES",
    "DataConfig",
    "Decay",
    "EngineDType",
    "EvalConfig",
    "GPTConfig",
    "GenerateConfig",
    "SampleConfig",
    "TextConfig",
    "TextRequest",
    "TrainConfig",
]

LOGS_DIR = Path("logs")
"""Where runs are kept, below the folder that a command is started in."""

Decay = Literal["linear", "cosine"]
OptimizerName = Literal["muon", "adamw"]
EngineDType = Literal["auto", "float32", "bfloat16", "int8"]

MAX_MUON_INTERVAL = 100
MAX_LR, MAX_MUON_LR = 0.1, 1.0
"""Thirty and fifty times the defaults: what is above them is a slip, a share of the rate for instance, and no rate."""


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
            require_whole(name, getattr(self, name), 1)
        require(self.n_embd % self.n_head == 0, "n_embd", f"a multiple of n_head ({self.n_head})", self.n_embd)
        require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)

    def describe(self) -> str:
        """Describe the shape in a few words."""
        sizes = f"{plural(self.n_layer, 'layer')}, {plural(self.n_head, 'head')}, width {self.n_embd}"
        return f"{sizes}, windows of {self.context_len}"


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
        require(self.recipe in RECIPES, "recipe", f"one of {', '.join(RECIPES)}", self.recipe)
        require(self.optimizer in get_args(OptimizerName), "optimizer", " or ".join(get_args(OptimizerName)), self.optimizer)
        require(self.decay in get_args(Decay), "decay", f"one of {', '.join(get_args(Decay))}", self.decay)
        require_whole("batch_size", self.batch_size, 1)
        require_whole("windows", self.windows, 1)
        require_whole("warmup_steps", self.warmup_steps, 0)
        require_whole("sync_every", self.sync_every, 0)
        if self.decay_steps is not None:
            require_whole("decay_steps", self.decay_steps, 1)
        require_between("lr", self.lr, 1e-9, MAX_LR, f"a rate from 1e-9 to {MAX_LR:g}")
        require_between("min_lr", self.min_lr, 0.0, self.lr, f"from 0 to lr ({self.lr:g})")
        require_between("muon_lr", self.muon_lr, 1e-9, MAX_MUON_LR, f"a rate from 1e-9 to {MAX_MUON_LR:g}")
        require_whole("muon_interval", self.muon_interval, 1)
        require(self.muon_interval <= MAX_MUON_INTERVAL, "muon_interval", f"at most {MAX_MUON_INTERVAL}", self.muon_interval)
        for name in ("beta1", "beta2", "momentum"):
            require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        for name in ("weight_decay", "grad_clip"):
            require_between(name, getattr(self, name), 0.0, 1e6, "a number of at least 0")
        require_whole("seed", self.seed, 0)
        require(self.seed < 2**63, "seed", "below 2**63", self.seed)

    @classmethod
    def from_recipe(cls, recipe: str, overrides: Mapping[str, Any]) -> TrainConfig:
        """Settings of `recipe`, with those of `overrides` instead where they are not None.

        Raises:
            ConfigError: there is no such recipe, or a value is out of its range.
        """
        require(recipe in RECIPES, "recipe", f"one of {', '.join(RECIPES)}", recipe)
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
        require_between("temperature", self.temperature, 0.0, 1e6, "a number from 0 to 1,000,000")
        require_whole("top_k", self.top_k, 0)
        require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        require(0 <= self.min_p <= 1, "min_p", "from 0 to 1", self.min_p)
        if self.seed is not None:
            require_whole("seed", self.seed, 0)


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
            require_whole("max_new_tokens", self.max_new_tokens, 0)
        if self.hop is not None:
            require_whole("hop", self.hop, 1)
        require_whole("num_samples", self.num_samples, 1)
        require(self.num_samples == 1 or self.max_new_tokens is not None, "max_new_tokens", "a number for several samples", "inf")
        require(all(self.stop), "stop", "a text of at least one character", "")

    def hop_for(self, context_len: int) -> int:
        """The hop for windows of `context_len` characters.

        Raises:
            ConfigError: the hop asked for is longer than a window.
        """
        if self.hop is None:
            return context_len - context_len // 16
        require(self.hop <= context_len, "hop", f"from 1 to {context_len}, the model's window", self.hop)
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
        require_whole("chars", self.chars, 1)
        require_whole("windows", self.windows, 2)


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
    """URLs of a stream's files at that commit, so that resuming needs no file list."""
    format: str | None = None
    """How a stream's files are read: parquet, json, ..."""
    fold: bool = False
    """Whether characters outside ASCII are folded; runs that were begun before there was folding do not."""
