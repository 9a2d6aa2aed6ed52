"""A request for a training run, and the settings that it resolves to for a new or a resumed run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from picogpt.alphabet import PICOGPT, TEXT, Alphabet
from picogpt.config import LOGS_DIR, DataConfig, Fold, GPTConfig, TextRequest, TrainConfig
from picogpt.errors import ConfigError, RunError
from picogpt.runs.settings import RunSettings
from picogpt.schedule import RECIPE_BUDGETS, Budget
from picogpt.wording import Notify, plural

__all__ = ["LENGTHS", "TrainRequest"]

LENGTHS = ("epochs", "minutes", "chars")
"""Fields of `Budget` that give a length; the others are its division into epochs and the patience."""
# Training settings that a resumed run may change; any other would contradict the steps already taken.
_CHANGEABLE = frozenset({"lr", "min_lr", "muon_lr", "weight_decay", "grad_clip", "warmup_steps"})


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Requested settings; None, or no entry in a mapping, takes the run's stored value or the default.

    Raises:
        ConfigError: a value is out of its range.
    """

    run: str | None = None
    """Name of the run; None takes the text's name."""
    logs_dir: Path = LOGS_DIR
    """Folder of all runs."""
    fresh: bool = False
    """Whether to start over; the old folder is kept under a new name."""
    recipe: str | None = None
    # Mappings and not configs: only requested fields have an entry, the others come from the stored run.
    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `GPTConfig`."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig`."""
    length: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Budget`."""
    text: TextRequest = field(default_factory=TextRequest)
    """Text to train on."""
    # The backend.
    threads: int | None = None
    device: str | None = None
    dtype: str | None = None
    kernels: str | None = None
    compile: bool | None = None
    gradient_checkpointing: bool = False
    # Initial weights of a new run, from one of the two.
    init_from: str | None = None
    """The run whose weights a new run starts from."""
    import_original: Path | None = None
    """Log of the original project whose weights a new run starts from."""

    def __post_init__(self) -> None:
        # Build the configs once, so that a value out of range raises here and not after the text was read.
        self._check_model()
        self.training(None)
        if self.import_original is not None and self.text.alphabet not in {None, PICOGPT}:
            raise ConfigError(
                f"alphabet must be {PICOGPT.name} with --import-original, as the original project has no other, "
                f"got {_describe_alphabet(self.text.alphabet)}",
                "alphabet",
            )

    def _check_model(self) -> None:
        """Check the shape as far as it is requested: a run or a model to start from may have the rest."""
        fields = dict(self.model)
        if self.run is not None or self.init_from is not None or self.import_original is not None:
            # The width must be a multiple of the heads. Where one of them alone is requested, the other is taken to fit.
            if "n_head" in fields:
                fields.setdefault("n_embd", fields["n_head"])
            elif "n_embd" in fields:
                fields["n_head"] = 1
        GPTConfig(**fields)

    @property
    def imports_only(self) -> bool:
        """Whether a run of the original project is imported without training."""
        return self.import_original is not None and self.length.get("epochs") == 0

    @property
    def names_a_text(self) -> bool:
        """Whether the request names a text or a model to start from."""
        # Either shows that a new run is meant, and not a mistyped name of an old one.
        return self.text.is_named or self.init_from is not None or self.import_original is not None

    @property
    def gives_a_length(self) -> bool:
        """Whether a length is requested."""
        return any(name in self.length for name in LENGTHS)

    def for_restart(self) -> TrainRequest:
        """Return the request after a restart by torchrun: `fresh` is dropped, so that the run is resumed."""
        return replace(self, fresh=False)

    def model_config(
        self, stored: RunSettings | None, origin: GPTConfig | None = None, vocab_size: int | None = None
    ) -> GPTConfig:
        """Return the model config: the run's, the initial model's or the default, with the requested fields.

        Args:
            stored: the run's settings; None for a new run.
            origin: the initial model's config, if there is one.
            vocab_size: number of ids of the run's alphabet; None takes that of the config.

        Raises:
            RunError: the request contradicts the model that the run starts from.
        """
        # Later entries win: the default, then the base, then the request.
        base = stored.model if stored else origin
        vocabulary = {} if vocab_size is None else {"vocab_size": vocab_size}
        config = GPTConfig(**{**(asdict(base) if base else {}), **self.model, **vocabulary})
        if stored is None and origin is not None:
            # Dropout is no part of the shape: any value fits the weights. Embeddings are moved to another alphabet.
            free = {"dropout": origin.dropout, "vocab_size": origin.vocab_size}
            changes = _differences(asdict(origin), {**asdict(config), **free})
            if changes:
                listed = "; ".join(f"{name} is {now} and was {before}" for name, before, now in changes)
                raise RunError(f"the model to start from has another shape: {listed}; leave these flags out")
        return config

    def training(self, stored: RunSettings | None, ranks: int = 1) -> tuple[TrainConfig, Budget]:
        """Return the training settings and the budget: the run's or the recipe's, with the requested fields."""
        if stored is not None:
            return self._resumed_train_config(stored), self._resumed_budget(stored.budget)
        recipe = self.recipe or "fast"
        # --epochs 0 is no valid budget; it is the way to say that nothing is trained.
        length = {} if self.imports_only else self.length
        # Any length replaces the recipe's: minutes together with its 300 epochs would contradict each other.
        budget = Budget(**{**({} if self.gives_a_length else RECIPE_BUDGETS.get(recipe, {})), **length})
        config = TrainConfig.from_recipe(recipe, self.train)
        if "batch_size" not in self.train and recipe == "fast":
            # Each rank needs a sequence, and all have the same number.
            config = replace(config, batch_size=-(-config.batch_size // ranks) * ranks)
        return config, budget

    def _resumed_train_config(self, stored: RunSettings) -> TrainConfig:
        overrides = dict(self.train)
        if "lr" in overrides and "min_lr" not in overrides:
            # The floor keeps its ratio to the peak.
            overrides["min_lr"] = stored.train.min_lr / stored.train.lr * overrides["lr"]
        return TrainConfig(**{**asdict(stored.train), **overrides})

    def _resumed_budget(self, stored: Budget) -> Budget:
        fields = asdict(stored)
        if self.gives_a_length:
            # A new length replaces the old one whatever its unit; the division into epochs stays.
            fields = {name: value for name, value in fields.items() if name not in LENGTHS}
        if "minutes" in self.length:
            fields["patience"] = None  # the run's own; `Budget` rejects patience together with minutes
        return Budget(**{**fields, **self.length})

    def check_origin(self, stored: RunSettings, asked: Path | None, *, has_begun: bool) -> None:
        """Check that a resumed run is requested to start from the model that it started from.

        Args:
            stored: the run's settings.
            asked: the requested model or log, as an absolute path; None if none is requested.
            has_begun: whether the run has a checkpoint; then the initial weights are no longer needed.

        Raises:
            RunError: the run started from another model, or from none, or it still needs the one it is to start from.
        """
        if asked is not None and str(asked) != stored.origin:
            began = stored.origin or "nothing"
            raise RunError(f"the run began from {began}, not {asked}; choose another --run, or --fresh to start over")
        if stored.origin is not None and asked is None and not has_begun:
            raise RunError(f"the run is to start from {stored.origin} and has not begun; give that flag again")

    def check_length(self, total_steps: int, steps_done: int) -> None:
        """Check that a requested length is not shorter than the run already is.

        Raises:
            RunError: the run has taken more steps than requested.
        """
        if self.gives_a_length and total_steps < steps_done:
            raise RunError(f"the run has done {plural(steps_done, 'step')} and this length is {total_steps:,}; give a larger one")

    def check_changes(self, stored: RunSettings, data: DataConfig, run: str, notify: Notify) -> None:
        """Reject settings that contradict the resumed run, and print the accepted changes.

        Args:
            stored: the run's settings.
            data: the text as found now.
            run: name of the run.
            notify: receives a line for each accepted change.

        Raises:
            RunError: shape, text, recipe or the contents of a step differ from the run's.
        """
        # Compared with the run's own settings, so that repeating a flag with the stored value is accepted.
        now = {**asdict(self._resumed_train_config(stored)), "recipe": self.recipe or stored.train.recipe}
        changes = [
            *_differences(asdict(stored.model), asdict(self.model_config(stored))),
            *_differences(asdict(stored.train), now),
        ]
        if self.text.fold not in {None, stored.data.fold}:
            changes.append(("folding", _describe_fold(stored.data.fold), _describe_fold(self.text.fold)))
        before, asked = stored.data.alphabet, self.text.alphabet
        # The text is the run's, and so are the text's own characters.
        if asked not in {None, before} and not (asked == TEXT and before.name == TEXT):
            changes.append(("alphabet", before.describe(), _describe_alphabet(asked)))
        # The hash decides: a moved or renamed file with the same characters is the same text.
        if data.sha256 != stored.data.sha256:
            changes.append(("text", _describe(stored.data), _describe(data)))
        rejected = [f"{name} is {now} and was {before}" for name, before, now in changes if name not in _CHANGEABLE]
        if rejected:
            raise RunError(f"run {run}: {'; '.join(rejected)}; choose another --run, or --fresh to start over")
        # The rest may change. Each change is printed, because earlier steps used the old value.
        for name, before, value in changes:
            notify(f"{name} is {value} from here on and was {before}")


def _describe_fold(fold: Fold | None) -> str:
    return "on with --transliterate" if fold == "latin" else "on" if fold else "off"


def _describe_alphabet(alphabet: Alphabet | Literal["text"]) -> str:
    return alphabet.describe() if isinstance(alphabet, Alphabet) else f"{alphabet} (the text's own characters)"


def _describe(data: DataConfig) -> str:
    """Describe a text by the properties in which two texts can differ."""
    if data.characters is not None:
        return f"{data.name} of {plural(data.characters, 'character')}"
    # A stream has no length; its commit and column decide which text it is.
    column = f", column {data.text_column}" if data.text_column else ""
    return f"{data.dataset} at {data.commit or 'other files'}{column}"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, before[name], now[name]) for name in before if before[name] != now[name]]
