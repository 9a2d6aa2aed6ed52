"""The plan of a training run: all decisions before the first step. Nothing is written into the run's folder."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from picogpt.alphabet import PICOGPT, TEXT
from picogpt.backend import Backend, BackendChoice
from picogpt.config import DataConfig, GPTConfig, TextRequest, TrainConfig
from picogpt.data import Source
from picogpt.data.resolve import Console, FoundText, find_text
from picogpt.data.text import require_piped_text
from picogpt.errors import ConfigError, RunError, TrainingError
from picogpt.runs.folder import RunFolder, default_run, named_run
from picogpt.runs.names import CONFIG_FILE
from picogpt.runs.settings import RunSettings
from picogpt.schedule import Budget
from picogpt.training.distributed import Ranks
from picogpt.training.origin import InitFrom
from picogpt.training.request import TrainRequest
from picogpt.wording import Notify

__all__ = ["Plan"]


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
        """Resolve a request; a resumed run takes its stored settings, except for the requested changes.

        Nothing is written into the run's folder. The text, or a stream's first articles, are read, a text may be downloaded, and
        kernels may be compiled.

        Args:
            request: the requested settings.
            ranks: the group of ranks that train together.
            console: receives a line about each choice, and the progress of a download.

        Raises:
            PicoGPTError: something requested does not exist, or contradicts the run.
        """
        # In order of cost: what contradicts the stored run is rejected before attention is timed and kernels are compiled.
        origin, folder, stored, text = _locate(request, console)
        data = text.describe()
        if stored is not None:
            request.check_origin(stored, origin.path if origin else None, has_begun=folder.has_checkpoint())
            request.check_changes(stored, data, folder.name, console.notify)
        model = request.model_config(stored, origin.config if origin else None, data.alphabet.vocab_size)
        train, budget = request.training(stored, ranks.count)
        _check_patience(budget, ranks)
        # Before the backend: a text too short for the model's shape is rejected here, before attention is timed on that shape.
        source = text.source(model, train, folder.load_validation() if stored and folder.has_validation() else None)
        if stored is None and train.recipe == "fast":
            chars_per_step = train.batch_size * train.windows * model.context_len
            suitable = budget.suitable_settings(chars_per_step=chars_per_step, train_chars=source.train_chars)
            train = replace(train, **{name: value for name, value in suitable.items() if name not in request.train})
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
            # With a checkpoint, the initial weights are no longer needed.
            origin=None if stored and folder.has_checkpoint() else origin,
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


def _locate(request: TrainRequest, console: Console) -> tuple[InitFrom | None, RunFolder, RunSettings | None, FoundText]:
    """Find the model to start from, the run's folder and settings, and the text, whose name is the default for the run."""
    origin, asked = InitFrom.find(request), request.text
    if request.fresh and request.run is not None and not asked.is_named:
        asked = _text_of_run(RunFolder(request.logs_dir / request.run), asked, console.notify)
    # A new run with no alphabet requested has that of the model it starts from.
    find = functools.partial(
        find_text, asked, scratch=request.logs_dir, console=console, inherited=origin.alphabet if origin else PICOGPT
    )
    if request.run is None:
        # The text is found first, as the run is named after it. Files are not read yet, and a stream sends no request.
        text = find(None)
        folder = default_run(request.logs_dir / text.name, console.notify)
    else:
        text = None
        folder = named_run(request.logs_dir / request.run, may_be_new=request.names_a_text, notify=console.notify)
    stored = None if request.fresh else folder.settings_to_resume()
    if text is None or stored is not None:
        # A resumed run keeps its folding, and a stream its commit, which are known only now.
        text = find(stored.data if stored else None)
    return origin, folder, stored, text


def _text_of_run(folder: RunFolder, asked: TextRequest, notify: Notify) -> TextRequest:
    """Return the request for the text of a run that starts over; `asked`, which names none, if there is no such run.

    Raises:
        ConfigError: the run's settings are damaged, so that its text is not known.
    """
    if not folder.has_config():
        return asked
    try:
        data = folder.read_settings().data
    except RunError as error:
        raise ConfigError(
            f"{folder.path / CONFIG_FILE}: damaged, so that the run's text is not known; to start over, name it with --text or "
            "--dataset"
        ) from error
    require_piped_text(data.text)
    notify(f"{folder.path}: starting over with its text, {data.name}")
    # The text's own characters may be others by now.
    alphabet = asked.alphabet or (TEXT if data.alphabet.name == TEXT else data.alphabet)
    # Another alphabet has its own rule of folding.
    fold = data.fold if asked.fold is None and asked.alphabet is None else asked.fold
    column = asked.column or data.text_column
    return replace(asked, paths=data.text, dataset=data.dataset, column=column, fold=fold, alphabet=alphabet)


def _check_patience(budget: Budget, ranks: Ranks) -> None:
    """Check that a run with patience can end early.

    Raises:
        ConfigError: there are several ranks.
    """
    if budget.patience is not None and ranks.count > 1:
        raise ConfigError(f"patience needs a single process, got {ranks.count} ranks; leave --patience out", "patience")


def _choose_backend(request: TrainRequest, stored: RunSettings | None) -> BackendChoice:
    """Return the requested backend, else the run's stored one, else auto."""
    parts = ("device", "dtype", "kernels", "threads")
    return BackendChoice(
        device=request.device or (stored.device if stored else "auto"),
        dtype=request.dtype or (stored.dtype if stored else "auto"),
        kernels=request.kernels or (stored.kernels if stored else "auto"),
        kernels_required=request.kernels is not None,  # a stored choice may fall back to torch
        attention=stored.attention if stored else None,
        threads=request.threads or (stored.threads if stored else None),
        compile=stored.compile if stored and request.compile is None else bool(request.compile),
        gradient_checkpointing=request.gradient_checkpointing,
        kept=tuple(part for part in parts if stored is not None and getattr(request, part) is None),
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
