"""Settings of the model, of training and of sampling, each with its unit, its range and its reason.

Every default but those of a run's length (`schedule.py`) and of the backend (`backend.py`) is defined here, once. Each config
validates its fields when it is created, so an invalid value raises before any work begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.checks import require, require_between, require_whole
from picogpt.errors import ConfigError
from picogpt.wording import plural

__all__ = [
    "LOGS_DIR",
    "RECIPES",
    "DataConfig",
    "Decay",
    "EngineDType",
    "EvalConfig",
    "Fold",
    "GPTConfig",
    "GenerateConfig",
    "SampleConfig",
    "TextConfig",
    "TextRequest",
    "TrainConfig",
    "alphabet_of",
]

LOGS_DIR = Path("logs")
"""Default folder of all runs, relative to the working directory."""

Decay = Literal["linear", "cosine"]
OptimizerName = Literal["muon", "adamw"]
EngineDType = Literal["auto", "float32", "bfloat16", "int8"]
Fold = bool | Literal["latin"]
"""Replacement of characters outside ASCII (`picogpt.folding`): none, folding, or folding and transliteration to Latin letters."""

MAX_MUON_INTERVAL = 100
# 33 and 50 times the defaults. A larger value is a mistake, such as a fraction of the peak instead of a rate.
MAX_LR, MAX_MUON_LR = 0.1, 1.0


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of the model. The defaults are PicoGPT's, with 6,374,144 parameters.

    Raises:
        ConfigError: a field is out of its range.
    """

    n_layer: int = 8
    """Number of blocks."""
    n_head: int = 8
    """Attention heads per block; divides `n_embd`."""
    n_embd: int = 256  # heads of 32, a multiple of the SIMD width
    """Width of the embeddings and of the residual stream."""
    context_len: int = 128  # short and cheap; the context vector carries what lies before
    """Characters in a window; there is one more position embedding, for the context vector in front."""
    vocab_size: int = PICOGPT.vocab_size
    """Token ids; they follow from the alphabet. The original's: 82 in use, 6 spare."""
    dropout: float = 0.0  # most texts are longer than a run, so there is nothing to overfit
    """Probability of dropping an activation in training, in [0, 1)."""
    bias: bool = True
    """Whether linear layers and LayerNorms have biases."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "context_len", "vocab_size"):
            require_whole(name, getattr(self, name), 1)
        # Heads are equal slices of the width.
        require(self.n_embd % self.n_head == 0, "n_embd", f"a multiple of n_head ({self.n_head})", self.n_embd)
        require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)

    def describe(self) -> str:
        """Return the shape as a phrase for messages."""
        sizes = f"{plural(self.n_layer, 'layer')}, {plural(self.n_head, 'head')}, width {self.n_embd}"
        return f"{sizes}, windows of {self.context_len}"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training settings: contents of an optimizer step, and learning rate over the steps.

    The field defaults are recipe `fast`; see `RECIPES` and `from_recipe`.

    Raises:
        ConfigError: a field is out of its range.
    """

    recipe: str = "fast"
    """Recipe that the other settings started from."""
    # A step of 1,280 characters: more and smaller steps learn more from the same characters, and two articles have a less noisy
    # gradient than one twice as long.
    batch_size: int = 2
    """Sequences in a step; `picogpt-train` takes at least one per rank by default."""
    windows: int = 5
    """Windows in a sequence, through which the gradient flows: 640 characters."""
    # docs/training.md has the trials. Warm-up is not tuned, and `suitable_settings` in schedule.py adapts two of these to a run.
    optimizer: OptimizerName = "muon"
    """Muon for the matrices of the blocks (Jordan et al., 2024) with AdamW for the rest, or AdamW for everything."""
    lr: float = 3e-3
    """Peak learning rate of AdamW, reached at the end of the warm-up."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon; it follows the same schedule as `lr`. `picogpt-train` lowers it for more than 800 steps."""
    muon_interval: int = 4  # quarters Muon's cost
    """Steps between Muon's updates of the same block, with the step size multiplied by it; the blocks take turns."""
    momentum: float = 0.95
    """Decay of Muon's running mean of the gradient, in [0, 1)."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay, at most `lr`."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero; at most a tenth of a run whose decay ends with it."""
    decay: Decay = "linear"  # linear to zero: Bergsma et al., 2025
    """Shape of the decay from `lr` to `min_lr`."""
    decay_steps: int | None = None
    """Step at which the decay ends; None ends it with the run, whose last step is then the last above `min_lr`."""
    beta1: float = 0.9
    """AdamW's decay of the running mean of the gradient, in [0, 1)."""
    beta2: float = 0.95
    """AdamW's decay of the running mean of the squared gradient, in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices and embeddings, times the learning rate; biases and norms have none."""
    grad_clip: float = 1.0
    """Maximum norm of the gradient over all parameters; 0 turns clipping off."""
    sync_every: int = 0
    """Local steps of each rank between outer steps (DiLoCo); 0 averages the gradients in every step instead."""
    seed: int = 1337
    """Seed of the initial weights, the order of the text and dropout; at least 0, below 2**63."""

    def __post_init__(self) -> None:
        # Names first, then numbers: each message has the field, the valid values and the value.
        require(self.recipe in RECIPES, "recipe", f"one of {', '.join(RECIPES)}", self.recipe)
        require(self.optimizer in get_args(OptimizerName), "optimizer", " or ".join(get_args(OptimizerName)), self.optimizer)
        require(self.decay in get_args(Decay), "decay", f"one of {', '.join(get_args(Decay))}", self.decay)
        require_whole("batch_size", self.batch_size, 1)
        require_whole("windows", self.windows, 1)
        require_whole("warmup_steps", self.warmup_steps, 0)
        require_whole("sync_every", self.sync_every, 0)
        if self.decay_steps is not None:
            require_whole("decay_steps", self.decay_steps, 1)
        # A rate of 0 would train nothing, silently.
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
        # torch takes seeds as signed 64-bit integers.
        require(self.seed < 2**63, "seed", "below 2**63", self.seed)

    @classmethod
    def from_recipe(cls, recipe: str, overrides: Mapping[str, Any]) -> TrainConfig:
        """Return the settings of `recipe`, updated by the values of `overrides` that are not None.

        Raises:
            ConfigError: there is no such recipe, or a value is out of its range.
        """
        # None is a flag that was not given.
        given = {name: value for name, value in overrides.items() if value is not None}
        base = RECIPES.get(recipe, {})  # an unknown name is rejected with the other fields
        settings = {**base, **given, "recipe": recipe}
        if "lr" in given and "min_lr" in base and "min_lr" not in given:
            # The floor keeps its ratio to the peak.
            settings["min_lr"] = base["min_lr"] / base["lr"] * given["lr"]
        return cls(**settings)

    def describe_rates(self) -> str:
        """Return the peak learning rates, and weight decay if there is any, as a phrase for messages."""
        muon = f" ({self.muon_lr:g} for Muon)" if self.optimizer == "muon" else ""
        decay = f", weight decay {self.weight_decay:g}" if self.weight_decay else ""
        return f"learning rate {self.lr:g}{muon}{decay}"


RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": MappingProxyType({}),
        # The settings of the original project, for comparison with it.
        "seed": MappingProxyType(
            {
                "optimizer": "adamw",
                "batch_size": 8,
                "windows": 10,
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
"""Settings of each recipe that differ from the field defaults of `TrainConfig`."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Settings for sampling the next character from the model's logits.

    Raises:
        ConfigError: a field is out of its range.
    """

    temperature: float = 0.5
    """Divides the logits: below 1 sharpens the distribution, above 1 flattens it; 0 is greedy (the likeliest character)."""
    top_k: int = 0
    """Sample from the k likeliest characters only; 0 from all."""
    top_p: float = 1.0
    """Sample from the smallest set of likeliest characters with at least this probability, in (0, 1]."""
    min_p: float = 0.0
    """Sample from characters with at least this fraction of the likeliest one's probability, in [0, 1]."""
    seed: int | None = None
    """Seed of the samples; None takes a new one each time."""

    def __post_init__(self) -> None:
        require_between("temperature", self.temperature, 0.0, 1e6, "a number from 0 to 1,000,000")
        require_whole("top_k", self.top_k, 0)
        require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        require(0 <= self.min_p <= 1, "min_p", "from 0 to 1", self.min_p)
        if self.seed is not None:
            require_whole("seed", self.seed, 0)  # seeds are taken modulo 2**64, so -1 would be another name of a large one


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Settings for the length of generated text, its end, and the stride of its windows.

    Raises:
        ConfigError: a field is out of its range, or several samples have no end.
    """

    max_new_tokens: int | None = 256
    """Characters to generate; None for no end."""
    hop: int | None = None
    """Stride from one window's start to the next, at most a window; None rereads a sixteenth of a window."""
    num_samples: int = 1
    """Texts to generate as one batch."""
    stop: tuple[str, ...] = ()
    """Stop sequences: each ends a text, and is not part of it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            require_whole("max_new_tokens", self.max_new_tokens, 0)
        if self.hop is not None:
            require_whole("hop", self.hop, 1)
        require_whole("num_samples", self.num_samples, 1)
        # A batch is printed text after text, so each needs an end.
        require(self.num_samples == 1 or self.max_new_tokens is not None, "max_new_tokens", "a number for several samples", "inf")
        # An empty text would stop before the first character.
        require(all(self.stop), "stop", "a text of at least one character", "")

    def hop_for(self, context_len: int) -> int:
        """Return the hop for windows of `context_len` characters.

        Raises:
            ConfigError: the requested hop is longer than a window.
        """
        if self.hop is None:
            # Rereading a sixteenth of a window gives its first characters some context at little cost: docs/generation.md.
            return context_len - context_len // 16
        require(self.hop <= context_len, "hop", f"from 1 to {context_len}, the model's window", self.hop)
        return self.hop


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings for the size and form of an evaluation.

    Raises:
        ConfigError: a field is out of its range.
    """

    chars: int = 200_000
    """Maximum number of characters to score, in evenly spaced whole sequences; at least two sequences are scored."""
    windows: int = 10  # a training sequence of the original project
    """Windows in a sequence, at least 2: the context roll has no effect on the first."""

    def __post_init__(self) -> None:
        require_whole("chars", self.chars, 1)
        require_whole("windows", self.windows, 2)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Encoding of a model's texts, and the ids that it was trained on. Stored in the model file.

    Raises:
        ConfigError: `fold` has no such value.
    """

    # Needed for generation: the prompt is encoded like the training text, and only characters that occur in it are sampled.
    fold: Fold
    """Replacement of characters outside the alphabet."""
    alphabet: Alphabet = PICOGPT
    """Characters of the model."""
    ids: tuple[int, ...]
    """Ids that occur in the training text, sorted; for a stream, which is not read beforehand, all that can occur."""

    def __post_init__(self) -> None:
        _require_fold(self.fold)


def alphabet_of(text: TextConfig | None) -> Alphabet:
    """Return the alphabet of a model, given what its file says of its texts; older files say nothing and are the original's."""
    return PICOGPT if text is None else text.alphabet


def fold_of(text: TextConfig | None) -> Fold:
    """Return how texts for a model are folded, given what its file says of its texts."""
    # A model that is older than folding has seen <?> for accented letters, but it knows the plain letters.
    return True if text is None else text.fold


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """A request for a text; an empty one takes the stored run's text, or `auto`."""

    paths: tuple[str, ...] = ()
    """Files and folders, as absolute paths; `-` is standard input."""
    dataset: str | None = None
    """A corpus, a stream from the hub, a folder with a hub data set's layout, or a single data file."""
    column: str | None = None
    """Column of a stream that contains the text."""
    fold: Fold | None = None
    """Replacement of characters outside the alphabet; None takes the run's setting."""
    alphabet: Alphabet | Literal["text"] | None = None
    """Characters to know; `text` stands for the text's own, and None takes the run's."""

    @property
    def is_named(self) -> bool:
        """Whether a text is requested."""
        return bool(self.paths) or self.dataset is not None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Exact identity of a run's training text; stored with the run, so that a resumed run can find and verify it.

    Raises:
        ConfigError: `fold` has no such value.
    """

    dataset: str | None = None
    """Name of the data set, or None for files."""
    text: tuple[str, ...] = ()
    """Files and folders, as absolute paths; `-` is standard input."""
    name: str
    """Short name of the text."""
    characters: int | None
    """Length of the whole text; None for a stream."""
    sha256: str
    """SHA-256, in hexadecimal, of the token ids, or of a stream's list of files."""
    commit: str | None = None
    """The hub's commit to which a stream is pinned."""
    text_column: str | None = None
    """The stream's column that was requested."""
    files: tuple[str, ...] = ()  # stored, so that resuming does not ask the hub for a list
    """URLs of a stream's files at that commit."""
    format: str | None = None
    """Format of a stream's files: parquet, json, ..."""
    fold: Fold = False  # the value of runs that are older than folding
    """Replacement of characters outside the alphabet."""
    alphabet: Alphabet = PICOGPT
    """Characters of the run."""

    def __post_init__(self) -> None:
        _require_fold(self.fold)


def _require_fold(value: Fold) -> None:
    # A file of a newer version could have another one, which must not be read as True.
    if value not in {False, True, "latin"}:
        raise ConfigError(f"fold must be false, true or latin, got {value!r}")
