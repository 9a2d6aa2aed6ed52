"""What the flags of `picogpt-train` ask for, and what that comes to for a run that begins or goes on."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from picogpt.cli.common import notice
from picogpt.config import (
    Budget,
    DataConfig,
    GPTConfig,
    RunSettings,
    TrainConfig,
    check_device,
    check_dtype,
    check_kernels,
    check_run_name,
    check_threads,
)
from picogpt.errors import RunError
from picogpt.wording import plural

__all__ = ["MODEL_FLAGS", "TRAIN_FLAGS", "Request"]

MODEL_FLAGS: Mapping[str, tuple[type, str]] = {
    "n_layer": (int, "blocks"),
    "n_head": (int, "attention heads a block"),
    "n_embd": (int, "width"),
    "context_len": (int, "characters in a window"),
    "dropout": (float, "dropout probability"),
}
"""Fields of `GPTConfig` that are flags: type and meaning."""
TRAIN_FLAGS: Mapping[str, tuple[type, str]] = {
    "batch_size": (int, "rolls in a step"),
    "windows": (int, "windows in a roll"),
    "optimizer": (str, "muon, with AdamW for all but the blocks' matrices, or adamw"),
    "lr": (float, "highest learning rate of AdamW"),
    "muon_lr": (float, "highest learning rate of Muon"),
    "muon_interval": (int, "steps from one of Muon's updates of a block to the next, each going as many times as far"),
    "weight_decay": (float, "weight decay of matrices"),
    "grad_clip": (float, "largest norm of the gradient, 0 for no limit"),
    "warmup_steps": (int, "steps until the highest learning rate; at most a tenth of a run of recipe fast"),
    "sync_every": (int, "steps that each rank takes by itself before an outer step (DiLoCo), for slow networks; 0 for none"),
    "seed": (int, "seed of weights, order of the text and dropout"),
}
"""Fields of `TrainConfig` that are flags: type and meaning."""

_CHANGEABLE = frozenset({"lr", "min_lr", "muon_lr", "weight_decay", "grad_clip", "warmup_steps"})
"""Training settings that may change while a run goes on; the others would make its past steps something else."""
_LENGTHS = ("epochs", "minutes", "chars")


def _pick(given: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The flags that were given, checked as far as they can be by themselves."""

    given: Mapping[str, Any]
    """Values of the flags that were given, by name."""
    logs_dir: Path
    fresh: bool
    dry_run: bool
    run: str | None
    dataset: str | None
    text_column: str | None
    text: tuple[str, ...]
    fold: bool | None
    """Whether characters outside ASCII are folded; None leaves that to the run."""
    threads: int | None
    device: str | None
    dtype: str | None
    kernels: str | None
    compile: bool | None
    gradient_checkpointing: bool
    init_from: str | None
    import_original: Path | None
    began: float
    """When the command was started, on the clock of `time.perf_counter`."""

    @classmethod
    def from_flags(cls, arguments: argparse.Namespace, began: float) -> Request:
        """Take the parsed flags, refusing what is wrong before anything is read or written.

        Raises:
            ConfigError: a value is out of its range.
        """
        given = {name: value for name, value in vars(arguments).items() if value is not None}
        request = cls(
            given=given,
            logs_dir=arguments.logs_dir,
            fresh=arguments.fresh,
            dry_run=arguments.dry_run,
            run=None if arguments.run is None else check_run_name(arguments.run),
            dataset=arguments.dataset,
            text_column=arguments.text_column,
            text=tuple(path if path == "-" else str(Path(path).absolute()) for path in arguments.text or ()),
            fold=arguments.fold,
            threads=check_threads(arguments.threads),
            device=check_device(arguments.device),
            dtype=check_dtype(arguments.dtype),
            kernels=check_kernels(arguments.kernels),
            compile=arguments.compile,
            gradient_checkpointing=arguments.gradient_checkpointing,
            init_from=arguments.init_from,
            import_original=arguments.import_original,
            began=began,
        )
        request.model(None), request.train(None)
        if not request.imports_only:
            request.budget(None)
        return request

    @property
    def imports_only(self) -> bool:
        """Whether a run of the original project is to be brought over and not trained."""
        return self.import_original is not None and self.given.get("epochs") == 0

    @property
    def names_a_text(self) -> bool:
        """Whether a flag says what a new run learns from, or begins from."""
        return bool(self.text) or any(given is not None for given in (self.dataset, self.init_from, self.import_original))

    def going_on(self) -> Request:
        """The same after a restart by torchrun: what was started over before is not started over again."""
        return replace(self, fresh=False)

    def text_name(self, text: Collection[str]) -> str:
        """The name of a text from the user's own files: that of the first one, as far as it can be a run's name."""
        first = next(iter(text))
        letters = (
            "stdin"
            if first == "-"
            else "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in Path(first).stem)
        )
        return letters.lstrip("._-")[:64] or "text"

    def model(self, stored: RunSettings | None, origin: GPTConfig | None = None) -> GPTConfig:
        """The model's shape: that of the run, or of the model it begins from, or the default; with what was given.

        Raises:
            RunError: what was given contradicts the model that the run begins from.
        """
        base = stored.model if stored else origin
        config = GPTConfig(**{**(asdict(base) if base else {}), **_pick(self.given, MODEL_FLAGS)})
        if stored is None and origin is not None:
            changes = _differences(asdict(origin), {**asdict(config), "dropout": origin.dropout})
            if changes:
                listed = "; ".join(f"{name} is {now} and was {before}" for name, before, now in changes)
                raise RunError(f"the model to begin from has another shape: {listed}; leave these flags out")
        return config

    def train(self, stored: RunSettings | None) -> TrainConfig:
        """The training settings: those of the run, or of the recipe, with what was given."""
        overrides = _pick(self.given, TRAIN_FLAGS)
        if stored is not None:
            if "lr" in overrides:
                # The floor is a share of the peak, and stays one.
                overrides["min_lr"] = stored.train.min_lr / stored.train.lr * overrides["lr"]
            return TrainConfig(**{**asdict(stored.train), **overrides})
        return TrainConfig.from_recipe(self.given.get("recipe", "fast"), overrides)

    def budget(self, stored: RunSettings | None) -> Budget:
        """How long to train: as the run was to, unless another length is given."""
        given = _pick(self.given, (*_LENGTHS, "steps_per_epoch", "val_steps"))
        if stored is None:
            return Budget.from_recipe(self.given.get("recipe", "fast"), given)
        fields = asdict(stored.budget)
        if any(name in self.given for name in _LENGTHS):
            fields = {name: value for name, value in fields.items() if name not in _LENGTHS}
        return Budget(**{**fields, **given})

    def refuse_other_origin(self, stored: RunSettings, asked: Path | None) -> None:
        """Refuse to begin a run that has begun already from something else.

        Args:
            stored: the run's settings.
            asked: the model or log that the flags name, as an absolute path.

        Raises:
            RunError: the run began from another one, or from nothing.
        """
        if asked is not None and str(asked) != stored.origin:
            began = stored.origin or "nothing"
            raise RunError(f"the run began from {began}, not {asked}; choose another --run, or --fresh to start over")

    def refuse_finished(self, total_steps: int, steps_done: int) -> None:
        """Refuse a length that the run has passed, before it takes the place of the one that was planned.

        Raises:
            RunError: another length is given, and it is not longer than what is done.
        """
        if any(name in self.given for name in _LENGTHS) and total_steps < steps_done:
            raise RunError(f"the run has done {plural(steps_done, 'step')} and this length is {total_steps:,}; give a larger one")

    def refuse_changes(self, stored: RunSettings | None, data: DataConfig, run: str) -> None:
        """Reject settings that contradict those of the run that is resumed, and print which others change.

        Args:
            stored: the run's settings; None for a run that begins.
            data: the text that was found.
            run: name of the run.

        Raises:
            RunError: shape, text, recipe or what a step reads are not the run's own.
        """
        if stored is None:
            return
        changes = [
            *_differences(asdict(stored.model), asdict(self.model(stored))),
            *_differences(
                asdict(stored.train), {**asdict(self.train(stored)), "recipe": self.given.get("recipe", stored.train.recipe)}
            ),
        ]
        if self.fold is not None and self.fold != stored.data.fold:
            changes.append(("folding", _yes(stored.data.fold), _yes(self.fold)))
        if data.sha256 != stored.data.sha256:
            changes.append(("text", _tell(stored.data), _tell(data)))
        refused = [f"{name} is {now} and was {before}" for name, before, now in changes if name not in _CHANGEABLE]
        if refused:
            raise RunError(f"run {run}: {'; '.join(refused)}; choose another --run, or --fresh to start over")
        for name, before, now in changes:
            notice(f"{name} is {now} from here on and was {before}")


def _yes(value: bool) -> str:
    return "on" if value else "off"


def _tell(data: DataConfig) -> str:
    """What text it is, as far as two of them can differ."""
    if data.characters is not None:
        return f"{data.name} of {plural(data.characters, 'character')}"
    column = f", column {data.text_column}" if data.text_column else ""
    return f"{data.dataset} at {data.commit or 'other files'}{column}"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, before[name], now[name]) for name in before if before[name] != now[name]]
