"""What is asked of a training run, and the settings that this comes to for a new run or a resumed one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from picogpt.config import LOGS_DIR, DataConfig, GPTConfig, TextRequest, TrainConfig
from picogpt.errors import RunError
from picogpt.runs.settings import RunSettings
from picogpt.schedule import Budget
from picogpt.wording import Notify, plural

__all__ = ["LENGTHS", "TrainRequest"]

LENGTHS = ("epochs", "minutes", "chars")
"""Fields of `Budget` that give a length; the others say how it is divided."""
_CHANGEABLE = frozenset({"lr", "min_lr", "muon_lr", "weight_decay", "grad_clip", "warmup_steps"})
"""Training settings that a resumed run may change; with any other the steps before would not be those of its settings."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What is asked for; None, or no entry in a mapping, leaves a setting to the run, or to its default.

    Raises:
        ConfigError: a value is out of its range.
    """

    run: str | None = None
    """Name of the run."""
    logs_dir: Path = LOGS_DIR
    """Folder of all runs."""
    fresh: bool = False
    """Whether to start over; the old folder is kept under a new name."""
    recipe: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `GPTConfig`."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig`."""
    length: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Budget`."""
    text: TextRequest = field(default_factory=TextRequest)
    """What to learn from."""
    threads: int | None = None
    device: str | None = None
    dtype: str | None = None
    kernels: str | None = None
    compile: bool | None = None
    gradient_checkpointing: bool = False
    init_from: str | None = None
    """The run whose weights a new run starts from."""
    import_original: Path | None = None
    """The original project's log whose weights a new run starts from."""

    def __post_init__(self) -> None:
        self.model_config(None), self.train_config(None)
        if not self.imports_only:
            self.budget(None)

    @property
    def imports_only(self) -> bool:
        """Whether a run of the original project is to be imported and not trained."""
        return self.import_original is not None and self.length.get("epochs") == 0

    @property
    def names_a_text(self) -> bool:
        """Whether it says what a new run learns from, or starts from."""
        return self.text.is_named or self.init_from is not None or self.import_original is not None

    @property
    def gives_a_length(self) -> bool:
        """Whether a length is asked for."""
        return any(name in self.length for name in LENGTHS)

    def for_restart(self) -> TrainRequest:
        """The same after a restart by torchrun: a run that was started over is not started over again."""
        return replace(self, fresh=False)

    def model_config(self, stored: RunSettings | None, origin: GPTConfig | None = None) -> GPTConfig:
        """The model's shape: that of the run, or of the model it starts from, or the default; with what is asked for.

        Raises:
            RunError: what is asked for contradicts the model that the run starts from.
        """
        base = stored.model if stored else origin
        config = GPTConfig(**{**(asdict(base) if base else {}), **self.model})
        if stored is None and origin is not None:
            changes = _differences(asdict(origin), {**asdict(config), "dropout": origin.dropout})
            if changes:
                listed = "; ".join(f"{name} is {now} and was {before}" for name, before, now in changes)
                raise RunError(f"the model to start from has another shape: {listed}; leave these flags out")
        return config

    def train_config(self, stored: RunSettings | None) -> TrainConfig:
        """The training settings: those of the run, or of the recipe, with what is asked for."""
        overrides = dict(self.train)
        if stored is not None:
            if "lr" in overrides:
                # The floor is a share of the peak, and stays one.
                overrides["min_lr"] = stored.train.min_lr / stored.train.lr * overrides["lr"]
            return TrainConfig(**{**asdict(stored.train), **overrides})
        return TrainConfig.from_recipe(self.recipe or "fast", overrides)

    def budget(self, stored: RunSettings | None) -> Budget:
        """How long to train: as the run was to, unless another length is asked for."""
        if stored is None:
            return Budget.from_recipe(self.recipe or "fast", self.length)
        fields = asdict(stored.budget)
        if self.gives_a_length:
            fields = {name: value for name, value in fields.items() if name not in LENGTHS}
        return Budget(**{**fields, **self.length})

    def check_origin(self, stored: RunSettings, asked: Path | None) -> None:
        """Check that a run which has begun is not asked to begin from something else.

        Args:
            stored: the run's settings.
            asked: the model or log that is asked for, as an absolute path.

        Raises:
            RunError: the run began from another one, or from nothing.
        """
        if asked is not None and str(asked) != stored.origin:
            began = stored.origin or "nothing"
            raise RunError(f"the run began from {began}, not {asked}; choose another --run, or --fresh to start over")

    def check_length(self, total_steps: int, steps_done: int) -> None:
        """Check that a length is not shorter than what the run has done.

        Raises:
            RunError: it is.
        """
        if self.gives_a_length and total_steps < steps_done:
            raise RunError(f"the run has done {plural(steps_done, 'step')} and this length is {total_steps:,}; give a larger one")

    def check_changes(self, stored: RunSettings | None, data: DataConfig, run: str, notify: Notify) -> None:
        """Reject settings that contradict those of the run that is resumed, and name the others that change.

        Args:
            stored: the run's settings; None for a new run.
            data: the text that was found.
            run: name of the run.
            notify: given a line for each change that is accepted.

        Raises:
            RunError: shape, text, recipe or what a step reads are not the run's own.
        """
        if stored is None:
            return
        now = {**asdict(self.train_config(stored)), "recipe": self.recipe or stored.train.recipe}
        changes = [
            *_differences(asdict(stored.model), asdict(self.model_config(stored))),
            *_differences(asdict(stored.train), now),
        ]
        if self.text.fold not in {None, stored.data.fold}:
            changes.append(("folding", _on_off(stored.data.fold), _on_off(self.text.fold)))
        if data.sha256 != stored.data.sha256:
            changes.append(("text", _describe(stored.data), _describe(data)))
        rejected = [f"{name} is {now} and was {before}" for name, before, now in changes if name not in _CHANGEABLE]
        if rejected:
            raise RunError(f"run {run}: {'; '.join(rejected)}; choose another --run, or --fresh to start over")
        for name, before, value in changes:
            notify(f"{name} is {value} from here on and was {before}")


def _on_off(value: bool | None) -> str:
    return "on" if value else "off"


def _describe(data: DataConfig) -> str:
    """A text, as far as two of them can differ."""
    if data.characters is not None:
        return f"{data.name} of {plural(data.characters, 'character')}"
    column = f", column {data.text_column}" if data.text_column else ""
    return f"{data.dataset} at {data.commit or 'other files'}{column}"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, before[name], now[name]) for name in before if before[name] != now[name]]
