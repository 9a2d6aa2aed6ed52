"""The run folder: the files that a training run writes, and how they are read back.

| file                              | content                                                                  |
|-----------------------------------|--------------------------------------------------------------------------|
| `config.json`                     | settings of the run: model, training, schedule, data, seed, versions      |
| `model.safetensors`               | the best weights so far, with the model's shape in the metadata           |
| `checkpoint.safetensors`          | everything needed to resume, with a SHA-256                               |
| `checkpoint.previous.safetensors` | the checkpoint before that                                               |
| `validation.safetensors`          | a stream's validation text, drawn once                                   |
| `log.pkl`                         | the loss log, plain values only                                          |
| `log.csv`                         | the same as a table, one row per epoch                                   |
| `log.jpg`                         | plot of the loss log                                                     |
| `log.html`                        | live page: curve, samples, an excerpt shaded by probability              |
| `epochs.json`                     | samples and probabilities of the page, one entry per epoch               |
| `eval.jpg`                        | plot of the last evaluation, if any                                      |

Writes are atomic: a file is either complete or absent. Reading never runs code from a file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from picogpt.alphabet import Alphabet
from picogpt.config import GPTConfig, TextConfig, alphabet_of
from picogpt.errors import ConfigError, RunError
from picogpt.files import atomic_write, can_flush, remove_leftovers, replace
from picogpt.ids import Ids
from picogpt.runs.checkpoint import Checkpoint, checkpoint_file, read_checkpoint
from picogpt.runs.lock import Lock, try_lock
from picogpt.runs.loss_log import LossLog, read_log
from picogpt.runs.model_file import load_text_config, model_metadata
from picogpt.runs.names import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    CSV_FILE,
    DAMAGED_FILE,
    LOG_FILE,
    MODEL_FILE,
    PAGE_FILE,
    PLOT_FILE,
    PREVIOUS_FILE,
    VALIDATION_FILE,
    has_checkpoint,
)
from picogpt.runs.settings import RunSettings
from picogpt.runs.tensor_file import FORMAT_VERSION, check_version, digest, open_tensors, serialize_tensors
from picogpt.wording import Notify, did_you_mean

__all__ = ["RunFolder", "default_run", "named_run", "resumable_runs"]

START_OVER = "start over with --fresh, the folder is kept"
"""What to do about a run whose files are damaged, when training."""


class RunFolder:
    """The folder of one run. The constructor does not touch the disk; `create` makes the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The run's name: the name of its folder."""
        return self.path.name

    # Paths of files that other modules write.

    @property
    def plot_path(self) -> Path:
        """Path of the loss plot."""
        return self.path / PLOT_FILE

    @property
    def page_path(self) -> Path:
        """Path of the run's live page."""
        return self.path / PAGE_FILE

    # State of the folder: commands choose between a new run, a resumed run and an error by it.

    def has_config(self) -> bool:
        """Whether a run has started here; its first checkpoint may be missing."""
        return (self.path / CONFIG_FILE).exists()

    def has_validation(self) -> bool:
        """Whether a stream's validation text is stored here."""
        return (self.path / VALIDATION_FILE).exists()

    def has_model(self) -> bool:
        """Whether there is a trained model."""
        return (self.path / MODEL_FILE).exists()

    def is_weights_only(self) -> bool:
        """Whether there is a trained model without a checkpoint, as in the bundled runs."""
        return self.has_model() and not self.has_checkpoint()

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, intact or damaged."""
        return has_checkpoint(self.path)

    def create(self) -> None:
        """Create the folder and its parents."""
        self.path.mkdir(parents=True, exist_ok=True)

    def next_backup_name(self) -> Path:
        """Return the first path of `NAME.old-1`, `NAME.old-2`, ... that does not exist."""
        # Old runs are never deleted, so a third --fresh needs a third name.
        number = 1
        while (target := self.path.with_name(f"{self.name}.old-{number}")).exists():
            number += 1
        return target

    def archive(self) -> Path:
        """Rename the folder to `next_backup_name`; return the new path."""
        target = self.next_backup_name()
        replace(self.path, target)
        return target

    @contextlib.contextmanager
    def lock(self) -> Iterator[list[str]]:
        """Lock the folder against a second trainer, and remove temporary files that a killed process left in it.

        The operating system releases the lock however the process ends. Yields a warning for each guarantee that the
        file system cannot give: exclusive locks, and flushes that survive a power failure.

        Raises:
            OSError: the disk is broken.
            RunError: another process trains in this folder, or the lock file cannot be opened.
        """
        path = self.path / ".lock"
        # O_NOFOLLOW: in a shared folder a symbolic link could make us truncate a foreign file.
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise RunError(f"{path}: cannot be opened ({error.strerror}); remove it, or choose another --run") from error
        with os.fdopen(descriptor, "r+b") as stream:
            try:
                locked = try_lock(stream)
            except OSError as error:
                error.filename = os.fspath(path)  # flock gets a descriptor, so its error names no file
                raise
            if locked is Lock.HELD:
                # The holder has written its pid; it is only a hint for the message.
                holder = stream.read(32).decode("ascii", "replace").strip() or "unknown"
                raise RunError(
                    f"{self.path}: another process (pid {holder}) trains in this run; wait for it or choose another --run"
                )
            # Ours: leave our pid for the message of a second trainer.
            stream.truncate(0)
            stream.write(str(os.getpid()).encode())
            stream.flush()
            # Safe under the lock: no other trainer is writing here.
            remove_leftovers(self.path)
            yield list(self._weaknesses(locked))

    def _weaknesses(self, locked: Lock) -> Iterator[str]:
        # Training goes ahead with a warning: on such a file system there is no better guarantee to be had.
        if locked is Lock.UNSUPPORTED:
            yield (
                f"{self.path}: this file system has no locks, so a second picogpt-train in this run cannot be detected; "
                "start only one at a time"
            )
        if not can_flush(self.path):
            yield f"{self.path}: this file system cannot flush to the disk, so a power failure may lose the latest checkpoints"

    def write_config(self, content: Mapping[str, Any]) -> None:
        """Write `config.json`."""
        # Indented, as users read this file.
        text = json.dumps({"format": FORMAT_VERSION, **content}, indent=2) + "\n"
        atomic_write(self.path / CONFIG_FILE, text.encode())

    def read_config(self, remedy: str = START_OVER) -> dict[str, Any]:
        """Read `config.json`.

        Args:
            remedy: what to do if it is damaged, for the message.

        Raises:
            RunError: the file is missing, is not a JSON object, or has a newer format.
        """
        path = self.path / CONFIG_FILE
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:  # deeply nested JSON recurses
            raise RunError(f"{path}: cannot be read ({error}); {remedy}") from error
        if not isinstance(content, dict):
            raise RunError(f"{path}: not a run's config; {remedy}")
        check_version(path, content.get("format"))
        return content

    def read_settings(self, remedy: str = START_OVER) -> RunSettings:
        """Return the settings in `config.json`.

        Args:
            remedy: what to do if they are damaged, for the message.

        Raises:
            RunError: the file is missing or damaged, or has a newer format.
        """
        content = self.read_config(remedy)
        try:
            return RunSettings.from_dict(content)
        except ConfigError as error:
            raise RunError(f"{self.path / CONFIG_FILE}: {error}; {remedy}") from error

    def settings_to_resume(self) -> RunSettings | None:
        """Return the settings of the run to resume, or None if no run has started here.

        Raises:
            RunError: config.json is damaged, or there is a trained model that cannot be resumed.
        """
        # A config without a checkpoint and without a model: the run was killed before its first checkpoint, and starts again.
        if self.has_checkpoint() or (self.has_config() and not self.has_model()):
            return self.read_settings()
        if self.has_model():
            raise RunError(
                f"{self.path}: a trained model without a checkpoint to resume from; choose another --run, "
                f"with --init-from {self.name} to start from its weights"
            )
        return None

    def check_model(self, alphabet: Alphabet) -> None:
        """Check that the model in the folder, if there is one, can be of a run with this alphabet.

        Raises:
            RunError: the model has another alphabet.
        """
        if not self.has_model():
            return
        path = self.path / MODEL_FILE
        try:
            found = alphabet_of(load_text_config(path))
        except RunError:  # a damaged model is no error here: the run resumes from its checkpoint, and writes the model again
            return
        if found != alphabet:
            raise RunError(
                f"{path}: a model with the alphabet {found.describe()}, and the run has {alphabet.describe()}; "
                "move it away, or start over with --fresh"
            )

    def save_model(self, tensors: Mapping[str, npt.NDArray[Any]], config: GPTConfig, text: TextConfig | None = None) -> None:
        """Write `model.safetensors`: the best state dict so far, its model's shape and the properties of its text."""
        atomic_write(self.path / MODEL_FILE, serialize_tensors(dict(tensors), model_metadata(config, text)))

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write `checkpoint.safetensors`, and keep its predecessor.

        Raises:
            OSError: the disk is full, read-only or broken; the existing checkpoints are unchanged.
        """
        # Written and flushed under a third name first: at every moment one complete checkpoint is on the disk.
        staged = self.path / f".{CHECKPOINT_FILE}.staged.part"
        atomic_write(staged, checkpoint_file(checkpoint))
        current = self.path / CHECKPOINT_FILE
        if current.exists():
            replace(current, self.path / PREVIOUS_FILE)
        replace(staged, current)

    def load_checkpoint(self, *, rename: bool = True) -> tuple[Checkpoint, str | None]:
        """Return the newest intact checkpoint, and a message if a newer one is damaged.

        With `rename` the damaged file is renamed: the next save would otherwise move it over the intact one.

        Raises:
            RunError: there is no checkpoint, or all are damaged; the folder is unchanged.
        """
        faults: list[str] = []  # messages about damaged checkpoints, newest first
        for name in (CHECKPOINT_FILE, PREVIOUS_FILE):
            path = self.path / name
            if not path.exists():
                continue
            try:
                checkpoint = read_checkpoint(path)
            except RunError as error:
                faults.append(str(error))
                continue
            if not faults:
                return checkpoint, None
            # The newest one is damaged and its predecessor intact: the run loses the steps between the two.
            if rename:
                replace(self.path / CHECKPOINT_FILE, self.path / DAMAGED_FILE)
            return checkpoint, f"{faults[0]}; it is kept as {DAMAGED_FILE}, resuming from the previous checkpoint"
        if faults:
            raise RunError(f"{'; '.join(faults)}; nothing to resume: {START_OVER}")
        raise RunError(f"{self.path}: no checkpoint to resume; {START_OVER}")

    def save_validation(self, ids: Ids) -> None:
        """Write `validation.safetensors`: a stream's validation text, ids (characters,), drawn once."""
        # Stored, so a resumed run is validated on the same text without reading the stream from its beginning.
        metadata = {"format": str(FORMAT_VERSION), "sha256": digest({"ids": ids}, "")}
        atomic_write(self.path / VALIDATION_FILE, serialize_tensors({"ids": ids}, metadata))

    def load_validation(self, remedy: str = START_OVER) -> Ids:
        """Read `validation.safetensors`.

        Args:
            remedy: what to do if it is damaged, for the message.

        Raises:
            RunError: the file is missing or damaged.
        """
        path = self.path / VALIDATION_FILE
        with open_tensors(path) as stored:
            metadata, tensors = stored.metadata, dict(stored)
        if metadata.get("sha256") != digest(tensors, ""):
            raise RunError(f"{path}: damaged (its SHA-256 does not match); {remedy}")
        return tensors["ids"]

    def write_log(self, log: LossLog) -> None:
        """Write `log.pkl`, and the same as `log.csv`."""
        atomic_write(self.path / LOG_FILE, log.to_pickle())
        atomic_write(self.path / CSV_FILE, log.to_csv().encode())

    def read_log(self) -> LossLog:
        """Read `log.pkl`; see `read_log`."""
        return read_log(self.path / LOG_FILE)


def default_run(path: Path, notify: Notify) -> RunFolder:
    """Return the run `path`, or `path`-2, -3, ... where a finished model that cannot be resumed has that name."""
    # The bundled models have the names of texts: training on `wikipedia` must not replace the bundled `wikipedia`.
    folder, number = RunFolder(path), 1
    while folder.is_weights_only():
        number += 1
        folder = RunFolder(path.with_name(f"{path.name}-{number}"))
    if number > 1:
        notify(f"{path}: a trained model without a checkpoint to resume from; this run is called {folder.name}")
    return folder


def named_run(path: Path, *, may_be_new: bool, notify: Notify) -> RunFolder:
    """Return the run `path`, to be resumed or begun.

    Args:
        path: folder of the run.
        may_be_new: whether the user named a text too, and so may mean a new run.
        notify: receives a line if the run is begun with no text named, now or by its settings.

    Raises:
        ConfigError: there is no such run but there are others, and no text was named: the name is probably mistyped.
    """
    folder = RunFolder(path)
    if may_be_new:
        return folder
    if path.exists():
        if not folder.has_config():
            notify(f"{path}: no config.json names its text, and neither --dataset nor --text is given: the text is auto")
        return folder
    # A new run named like a mistyped old one would train for hours before anyone notices.
    others = resumable_runs(path.parent)
    if not others:
        notify(f"{path}: a new run, as there is none to resume; neither --dataset nor --text is given, so the text is auto")
        return folder
    hint = did_you_mean(folder.name, others) or f"the runs there are {', '.join(others)}."
    raise ConfigError(
        f"run {folder.name}: no such run under {path.parent}; {hint} For a new run, give --dataset or --text too",
        "run",
    )


def resumable_runs(logs_dir: Path) -> list[str]:
    """Return the names of the runs under `logs_dir` that training can resume, sorted."""
    # A config without a model: the run was killed before its first checkpoint, and starts again from its settings.
    runs = [RunFolder(path) for path in sorted(logs_dir.glob("*")) if path.is_dir() and path.name[0] != "."]
    return [run.name for run in runs if run.has_checkpoint() or (run.has_config() and not run.has_model())]
