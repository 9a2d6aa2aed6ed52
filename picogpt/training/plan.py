"""The plan of a training run: all decisions before the first step. Making a plan writes nothing."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.backend import Backend, BackendChoice
from picogpt.config import DataConfig, GPTConfig, TrainConfig
from picogpt.data import Source
from picogpt.data.resolve import Console, FoundText, find_text
from picogpt.errors import ConfigError, RunError, TrainingError
from picogpt.runs.find import find_model, resumable_runs
from picogpt.runs.folder import MODEL_FILE, LossLog, RunFolder, load_alphabet, load_model
from picogpt.runs.import_original import read_original
from picogpt.runs.settings import RunSettings
from picogpt.schedule import Budget
from picogpt.training.distributed import Ranks
from picogpt.training.request import TrainRequest
from picogpt.wording import Notify

__all__ = ["InitFrom", "Plan"]


@dataclass(frozen=True)
class InitFrom:
    """The model whose weights a new run starts from."""

    path: Path
    config: GPTConfig
    weights: Mapping[str, npt.NDArray[np.generic]]
    log: LossLog | None
    """The loss log of an imported run of the original project; None for a model of ours."""
    alphabet: Alphabet = PICOGPT

    @classmethod
    def find(cls, request: TrainRequest) -> InitFrom | None:
        """Read the requested model or log, or return None.

        Raises:
            RunError: the model or log is missing, damaged or of another kind.
        """
        if request.init_from is not None:
            path, _ = find_model(request.init_from, request.logs_dir)  # by name, like --model of the other commands
            return cls(path.absolute(), *load_model(path), None, load_alphabet(path))
        if request.import_original is not None:
            # Heads share one matrix, so their number cannot be read from the weights.
            original = read_original(request.import_original, request.model.get("n_head", GPTConfig().n_head))
            return cls(request.import_original.absolute(), original.config, original.weights, original.log)
        return None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run with all settings resolved: a dry run prints it, a `picogpt.training.run.TrainingRun` trains it."""

    request: TrainRequest
    folder: RunFolder
    stored: RunSettings | None
    """Stored settings of the run to resume; None for a new run."""
    data: DataConfig
    """The text, as config.json names it."""
    source: Source
    """Source of batches; no batch has been read."""
    model: GPTConfig
    train: TrainConfig
    budget: Budget
    backend: Backend
    origin: InitFrom | None
    """The model that a new run starts from."""
    ranks: Ranks

    @classmethod
    def of(cls, request: TrainRequest, ranks: Ranks, console: Console) -> Plan:
        """Resolve a request; a resumed run keeps its stored settings.

        Nothing is written. The text, or a stream's first articles, are read.

        Args:
            request: the requested settings.
            ranks: the group of ranks that train together.
            console: receives a line about each choice, and the progress of a download.

        Raises:
            PicoGPTError: something requested does not exist, or contradicts the run.
        """
        # In order of cost: what contradicts the stored run is rejected before a text is read or a backend is timed.
        folder, stored, text = _locate(request, console)
        data = text.describe()
        request.check_changes(stored, data, folder.name, console.notify)
        if stored is not None:
            _check_alphabet(folder, data.alphabet)
        origin = _find_origin(request, folder, stored)
        model = request.model_config(stored, origin.config if origin else None, data.alphabet.vocab_size)
        train = request.train_config(stored)
        budget = request.budget(stored)
        _check_patience(budget, train, ranks)
        # Before the backend: a text too short for the model's shape is rejected here, before attention is timed on that shape.
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
        """Path of the model that the run started from, as in config.json."""
        # A resumed run does not read its initial model again; the path stays in its config.
        if self.stored is not None:
            return self.stored.origin
        return None if self.origin is None else str(self.origin.path)

    def backend_changes(self) -> list[tuple[str, object, object]]:
        """Return the parts of the backend that differ from the run's last start, and so round differently: name, before, now."""
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
        # Runs that are older than the two implementations of attention have no entry for it.
        attention = stored.attention or ("an older form" if now.attention else None)
        if stored.kernels == now.kernels and attention != now.attention:
            changes.append(("attention", attention, now.attention))
        return changes


def _locate(request: TrainRequest, console: Console) -> tuple[RunFolder, RunSettings | None, FoundText]:
    """Find the run's folder, its stored settings, and the text; the run's default name is the text's name."""
    inherited = _inherited_alphabet(request)

    def find(stored: RunSettings | None) -> FoundText:
        data = stored.data if stored else None
        return find_text(request.text, data, scratch=request.logs_dir, console=console, inherited=inherited)

    if request.run is not None:
        folder = RunFolder(request.logs_dir / request.run)
        stored = _read_stored(folder, request)
        if stored is None and not request.names_a_text and not folder.path.exists():
            _check_new_name(folder, console.notify)
        return folder, stored, find(stored)
    # No name was given: the run is named after its text, so the text is found first.
    text = find(None)
    folder = _default_run(request.logs_dir / text.name, console.notify)
    stored = _read_stored(folder, request)
    # A stream keeps its run's commit, and a text its run's folding, which are known only now. So the text is found again;
    # so far no request was sent and no file was read.
    return folder, stored, find(stored) if stored else text


def _inherited_alphabet(request: TrainRequest) -> Alphabet:
    """Return the alphabet of a new run that is requested to have none: that of the model it starts from."""
    if request.init_from is None:
        return PICOGPT
    path, _ = find_model(request.init_from, request.logs_dir)
    return load_alphabet(path)


def _check_alphabet(folder: RunFolder, alphabet: Alphabet) -> None:
    """Check that the model in the folder of a resumed run is the run's own.

    Raises:
        RunError: it has another alphabet.
    """
    if not folder.has_model():
        return
    try:
        found = load_alphabet(folder.path / MODEL_FILE)
    except RunError:  # a damaged model is no error here: the run resumes from its checkpoint, and writes the model again
        return
    if found != alphabet:
        raise RunError(
            f"{folder.path / MODEL_FILE}: a model with the alphabet {found.describe()}, and the run has {alphabet.describe()}; "
            "move it away, or start over with --fresh"
        )


def _check_new_name(folder: RunFolder, notify: Notify) -> None:
    """Reject an unknown run name given without a text, unless there is no run that could be meant.

    Raises:
        ConfigError: other runs exist; the name is probably mistyped.
    """
    # A new run named like a mistyped old one would train for hours before anyone notices.
    others = resumable_runs(folder.path.parent)
    if not others:
        notify(
            f"{folder.path}: a new run, as there is none to resume; neither --dataset nor --text is given, so the text is auto"
        )
        return
    nearest = difflib.get_close_matches(folder.name, others, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"the runs there are {', '.join(others)}."
    raise ConfigError(
        f"run {folder.name}: no such run under {folder.path.parent}; {hint} For a new run, give --dataset or --text too",
        "run",
    )


def _default_run(path: Path, notify: Notify) -> RunFolder:
    """Return the run `path`, or `path`-2, -3, ... where a finished model that cannot be resumed has that name."""
    # The bundled models have the names of texts: training on `wikipedia` must not replace the bundled `wikipedia`.
    folder, number = RunFolder(path), 1
    while folder.is_weights_only():
        number += 1
        folder = RunFolder(path.with_name(f"{path.name}-{number}"))
    if number > 1:
        notify(f"{path}: a trained model without a checkpoint to resume from; this run is called {folder.name}")
    return folder


def _read_stored(folder: RunFolder, request: TrainRequest) -> RunSettings | None:
    """Return the stored settings of the run to resume, or None for a new run."""
    if request.fresh:
        return None
    # A config without a checkpoint and without a model: the run was killed before its first checkpoint, and starts again.
    if folder.has_checkpoint() or (folder.has_config() and not folder.has_model()):
        try:
            return RunSettings.from_dict(folder.read_config())
        except ConfigError as error:
            raise RunError(f"{folder.path / 'config.json'}: {error}; start over with --fresh, the folder is kept") from error
    # Only reached with a name given by the user: a default name skips finished models.
    if folder.has_model():
        raise RunError(
            f"{folder.path}: a trained model without a checkpoint to resume from; choose another --run, or --fresh to start over"
        )
    return None


def _find_origin(request: TrainRequest, folder: RunFolder, stored: RunSettings | None) -> InitFrom | None:
    """Return the model that the run starts from, or None once the run has a checkpoint."""
    asked = InitFrom.find(request)
    if stored is None:
        return asked
    request.check_origin(stored, asked.path if asked else None)
    # With a checkpoint, the initial weights are no longer needed, and the flag is accepted again.
    if folder.has_checkpoint():
        return None
    if stored.origin is not None and asked is None:
        raise RunError(f"{folder.path}: the run is to start from {stored.origin} and has not begun; give that flag again")
    return asked


def _check_patience(budget: Budget, train: TrainConfig, ranks: Ranks) -> None:
    """Check that a run with patience can cool down.

    Raises:
        ConfigError: the decay has a fixed end, or there are several ranks.
    """
    if budget.patience is None:
        return
    if train.decay_steps is not None:
        raise ConfigError(
            f"patience needs a learning rate that decays to the end of the run, and in recipe {train.recipe} it decays within "
            f"{train.decay_steps:,} steps; leave --patience out, or use recipe fast",
            "patience",
        )
    if ranks.count > 1:
        raise ConfigError(f"patience needs a single process, got {ranks.count} ranks; leave --patience out", "patience")


def _choose_backend(request: TrainRequest, stored: RunSettings | None) -> BackendChoice:
    """Return the requested backend, else the run's stored one, else auto."""
    return BackendChoice(
        device=request.device or (stored.device if stored else "auto"),
        dtype=request.dtype or (stored.dtype if stored else "auto"),
        kernels=request.kernels or (stored.kernels if stored else "auto"),
        kernels_required=request.kernels is not None,  # a stored choice may fall back to torch
        attention=stored.attention if stored else None,
        threads=request.threads or (stored.threads if stored else None),
        compile=stored.compile if stored and request.compile is None else bool(request.compile),
        gradient_checkpointing=request.gradient_checkpointing,
    )


def _select_backend(choice: BackendChoice, model: GPTConfig, batch_size: int, ranks: Ranks, notify: Notify) -> Backend:
    """Select the backend of this rank.

    Raises:
        ConfigError: the batch cannot be divided among the ranks, or flags exclude each other.
        TrainingError: the device or a compiler is missing.
    """
    # Each rank takes an equal part of a step, so that mean losses and gradients need no weights.
    if batch_size % ranks.count:
        raise ConfigError(
            f"batch_size must be a multiple of the {ranks.count} ranks that share a step, got {batch_size}", "batch_size"
        )
    sequences = batch_size // ranks.count
    backend = Backend.select(model, choice, sequences=sequences, local_rank=ranks.local_rank, notify=notify)
    # Neither gloo nor nccl supports tensors on mps.
    if backend.device.type == "mps" and ranks.count > 1:
        raise TrainingError("--device mps: torch cannot connect ranks on such a GPU; use --device cpu, or one process")
    return backend
