"""The plan of a training run: everything that is settled before the first step, made once and handed down."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from picogpt.backend import Backend, BackendChoice
from picogpt.config import DataConfig, GPTConfig, TrainConfig
from picogpt.data import Source
from picogpt.data.resolve import Console, FoundText, find_text
from picogpt.errors import ConfigError, RunError, TrainingError
from picogpt.runs.find import find_model, resumable_runs
from picogpt.runs.folder import LossLog, RunFolder, load_model
from picogpt.runs.import_original import read_original
from picogpt.runs.settings import RunSettings
from picogpt.schedule import Budget
from picogpt.training.distributed import Ranks
from picogpt.training.request import TrainRequest
from picogpt.wording import Notify

__all__ = ["InitFrom", "Plan"]


@dataclass(frozen=True)
class InitFrom:
    """The model that a run starts from."""

    path: Path
    config: GPTConfig
    weights: Mapping[str, npt.NDArray[np.generic]]
    log: LossLog | None
    """The loss log that a run of the original project brings with it."""

    @classmethod
    def find(cls, request: TrainRequest) -> InitFrom | None:
        """Read the model or log that is asked for.

        Raises:
            RunError: it is missing, damaged or of another kind.
        """
        if request.init_from is not None:
            path, _ = find_model(request.init_from, request.logs_dir)
            return cls(path.absolute(), *load_model(path), None)
        if request.import_original is not None:
            original = read_original(request.import_original, request.model.get("n_head", GPTConfig().n_head))
            return cls(request.import_original.absolute(), original.config, original.weights, original.log)
        return None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, settled: a dry run describes it, a `picogpt.training.run.TrainingRun` trains it."""

    request: TrainRequest
    folder: RunFolder
    stored: RunSettings | None
    """Settings of the run that is resumed; None for a new run."""
    data: DataConfig
    """The text, as config.json names it."""
    source: Source
    """Batches of the text; not begun."""
    model: GPTConfig
    train: TrainConfig
    budget: Budget
    backend: Backend
    origin: InitFrom | None
    """The model that a new run starts from."""
    ranks: Ranks

    @classmethod
    def of(cls, request: TrainRequest, ranks: Ranks, console: Console) -> Plan:
        """Settle what is asked for, with the run's own settings where it is resumed.

        Nothing is written. The text is read, or the first articles of a stream.

        Args:
            request: what is asked for.
            ranks: the processes that train together.
            console: given a line about each choice, and the progress of a download.

        Raises:
            PicoGPTError: something asked for is not there, or contradicts the run.
        """
        folder, stored, text = _locate(request, console)
        data = text.describe()
        request.check_changes(stored, data, folder.name, console.notify)
        origin = _find_origin(request, folder, stored)
        model = request.model_config(stored, origin.config if origin else None)
        train = request.train_config(stored)
        budget = request.budget(stored)
        _check_patience(budget, train, ranks)
        # First, as a text that is too short for the model's shape is found here, and not by timing attention over that shape.
        source = text.source(model, train, folder.load_validation() if stored and folder.has_validation() else None)
        return cls(
            request=request,
            folder=folder,
            stored=stored,
            data=data,
            source=source,
            model=model,
            train=train,
            budget=budget,
            backend=_select_backend(_choose_backend(request, stored), model, train.batch_size, ranks, console.notify),
            origin=origin,
            ranks=ranks,
        )

    @property
    def origin_path(self) -> str | None:
        """Where the run started from, as config.json has it."""
        if self.stored is not None:
            return self.stored.origin
        return None if self.origin is None else str(self.origin.path)

    def backend_changes(self) -> list[tuple[str, object, object]]:
        """Parts of the backend that differ from the run's last start, which round otherwise: name, before, now."""
        stored, now = self.stored, self.backend.names
        assert stored is not None
        before_and_now = (
            ("threads", stored.threads, now.threads),
            ("ranks", stored.ranks, self.ranks.count),
            ("device", stored.device, now.device),
            ("dtype", stored.dtype, now.dtype),
            ("compile", stored.compile, now.compile),
            ("kernels", stored.kernels, now.kernels),
        )
        changes: list[tuple[str, object, object]] = [
            (name, before, value) for name, before, value in before_and_now if before != value
        ]
        attention = stored.attention or ("an older form" if now.attention else None)
        if stored.kernels == now.kernels and attention != now.attention:
            changes.append(("attention", attention, now.attention))
        return changes


def _locate(request: TrainRequest, console: Console) -> tuple[RunFolder, RunSettings | None, FoundText]:
    """The run's folder, its stored settings, and the text: the name of either can follow from the other."""

    def find(stored: RunSettings | None) -> FoundText:
        return find_text(request.text, stored.data if stored else None, scratch=request.logs_dir, console=console)

    if request.run is not None:
        folder = RunFolder(request.logs_dir / request.run)
        stored = _read_stored(folder, request)
        if stored is None and not request.names_a_text and not folder.path.exists():
            _check_new_name(folder, console.notify)
        return folder, stored, find(stored)
    text = find(None)
    folder = _default_run(request.logs_dir / text.name, console.notify)
    stored = _read_stored(folder, request)
    # A stream keeps to the commit of its run, and a text is folded as its run has it, which is known only now; nothing was
    # asked of the hub and no file was read yet.
    return folder, stored, find(stored) if stored else text


def _check_new_name(folder: RunFolder, notify: Notify) -> None:
    """Take an unknown name that stands alone for a new run only where there is no run that could be meant.

    Raises:
        ConfigError: there are runs; the name is probably a mistyped one of them.
    """
    others = resumable_runs(folder.path.parent)
    if not others:
        notify(
            f"{folder.path}: a new run, as there is none to resume; neither --dataset nor --text is given, so the text is auto"
        )
        return
    nearest = difflib.get_close_matches(folder.name, others, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"the runs there are {', '.join(others)}."
    raise ConfigError(
        f"run {folder.name}: no such run under {folder.path.parent}; {hint} A new one needs --dataset or --text beside its name",
        "run",
    )


def _default_run(path: Path, notify: Notify) -> RunFolder:
    """The run called `path`, or `path`-2, -3, ... where trained models that cannot be resumed have these names."""
    folder, number = RunFolder(path), 1
    while folder.is_weights_only():
        number += 1
        folder = RunFolder(path.with_name(f"{path.name}-{number}"))
    if number > 1:
        notify(f"{path}: a trained model without a checkpoint to resume from; this run is called {folder.name}")
    return folder


def _read_stored(folder: RunFolder, request: TrainRequest) -> RunSettings | None:
    """The settings of the run that is resumed, or None for a new run."""
    if request.fresh:
        return None
    if folder.has_checkpoint() or (folder.has_config() and not folder.has_model()):
        try:
            return RunSettings.from_dict(folder.read_config())
        except ConfigError as error:
            raise RunError(f"{folder.path / 'config.json'}: {error}; start over with --fresh, the folder is kept") from error
    if folder.has_model():
        raise RunError(
            f"{folder.path}: a trained model without a checkpoint to resume from; choose another --run, or --fresh to start over"
        )
    return None


def _find_origin(request: TrainRequest, folder: RunFolder, stored: RunSettings | None) -> InitFrom | None:
    """The model that the run starts from, if it has not started."""
    asked = InitFrom.find(request)
    if stored is None:
        return asked
    request.check_origin(stored, asked.path if asked else None)
    if folder.has_checkpoint():
        return None
    if stored.origin is not None and asked is None:
        raise RunError(f"{folder.path}: the run is to start from {stored.origin} and has not begun; give that flag again")
    return asked


def _check_patience(budget: Budget, train: TrainConfig, ranks: Ranks) -> None:
    """Check that a run with patience can cool down.

    Raises:
        ConfigError: it cannot.
    """
    if budget.patience is None:
        return
    if train.decay_steps is not None:
        raise ConfigError(
            f"patience needs a learning rate that comes down with the end of the run, and that of recipe {train.recipe} comes "
            f"down within {train.decay_steps:,} steps; leave --patience out, or use recipe fast",
            "patience",
        )
    if ranks.count > 1:
        raise ConfigError(f"patience needs a single process, and here are {ranks.count} ranks; leave --patience out", "patience")


def _choose_backend(request: TrainRequest, stored: RunSettings | None) -> BackendChoice:
    """The backend that is asked for, else the run's own, else the machine's choice."""
    return BackendChoice(
        device=request.device or (stored.device if stored else "auto"),
        dtype=request.dtype or (stored.dtype if stored else "auto"),
        kernels=request.kernels or (stored.kernels if stored else "auto"),
        kernels_required=request.kernels is not None,
        attention=stored.attention if stored else None,
        threads=request.threads or (stored.threads if stored else None),
        compile=stored.compile if stored and request.compile is None else bool(request.compile),
        gradient_checkpointing=request.gradient_checkpointing,
    )


def _select_backend(choice: BackendChoice, model: GPTConfig, batch_size: int, ranks: Ranks, notify: Notify) -> Backend:
    """Select this rank's backend.

    Raises:
        ConfigError: a step cannot be divided among the ranks, or flags exclude each other.
        TrainingError: there is no such device, or no compiler.
    """
    if batch_size % ranks.count:
        raise ConfigError(
            f"batch_size must be a multiple of the {ranks.count} ranks that share a step, got {batch_size}", "batch_size"
        )
    sequences = batch_size // ranks.count
    backend = Backend.select(model, choice, sequences=sequences, local_rank=ranks.local_rank, notify=notify)
    if backend.device.type == "mps" and ranks.count > 1:
        raise TrainingError("--device mps: torch cannot connect ranks on such a GPU; use --device cpu, or one process")
    return backend
