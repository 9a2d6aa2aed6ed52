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

Writes are atomic: a file is either complete or absent. Reading never runs code from a file. Tensors are numpy arrays here, so
reading a model does not import torch.
"""

from __future__ import annotations

import contextlib
import csv
import enum
import errno
import hashlib
import io
import json
import math
import os
import pickle
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as tensors_of
from safetensors.numpy import save as serialize

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.config import GPTConfig, TextConfig, alphabet_of
from picogpt.errors import ConfigError, RunError
from picogpt.files import atomic_write, can_flush, remove_leftovers, replace
from picogpt.ids import Ids
from picogpt.runs.settings import RunSettings

__all__ = [
    "LOG_FILE",
    "MODEL_FILE",
    "Checkpoint",
    "LossLog",
    "RunFolder",
    "load_alphabet",
    "load_model",
    "load_text_config",
    "model_metadata",
    "open_model",
    "pack",
    "read_log",
    "serialize_tensors",
    "unpack",
]

FORMAT_VERSION = 1
"""Version of the format, stored in every file; readers reject a newer one."""

Tensors = dict[str, npt.NDArray[Any]]

MODEL_FILE = "model.safetensors"
_CHECKPOINT = "checkpoint.safetensors"
_PREVIOUS = "checkpoint.previous.safetensors"  # fallback if the newest is damaged
_DAMAGED = "checkpoint.damaged.safetensors"  # kept for inspection, never read
_VALIDATION = "validation.safetensors"
_CONFIG = "config.json"
LOG_FILE = "log.pkl"
CSV_FILE = "log.csv"
_BFLOAT16 = "BF16"  # name of the dtype in a safetensors header
# errno values of a file system without flock, such as some network mounts.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
# NFS emulates flock by byte-range locks, which may report a held lock as EACCES.
_LOCK_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})


@dataclass(kw_only=True)
class LossLog:
    """The loss log. Each list has one entry per epoch."""

    train: list[float] = field(default_factory=list)
    """Mean training loss of each epoch, in nats per character."""
    val: list[float] = field(default_factory=list)
    """Validation loss after each epoch, in nats per character."""
    chars: list[int] = field(default_factory=list)
    """Characters trained on by the end of each epoch."""
    seconds: list[float] = field(default_factory=list)
    """Seconds spent training by the end of each epoch."""
    steps: list[int | None] = field(default_factory=list)
    """Optimizer steps by the end of each epoch; None in logs that are older than this list."""
    rates: list[float | None] = field(default_factory=list)
    """Learning rate of the last step of each epoch; None in logs that are older than this list."""
    best_loss: float | None = None
    """Lowest validation loss so far: the loss of the weights in `model.safetensors`."""
    iter_num: int = 0
    """Optimizer steps so far."""

    def __post_init__(self) -> None:
        # Older logs have fewer lists: their epochs get an entry in the new ones, so that the next epoch is appended in its place.
        for newer in (self.steps, self.rates):
            newer[:0] = [None] * (len(self.val) - len(newer))

    def to_dict(self) -> dict[str, Any]:
        """Return the log as plain values under the original project's keys, plus `chars`, `seconds`, `steps` and `rates`."""
        # Lists are copied, so a later epoch does not change a log that is being written.
        return {
            "losses": {"train": list(self.train), "val": list(self.val)},
            "best_loss": self.best_loss,
            "iter_num": self.iter_num,
            "chars": list(self.chars),
            "seconds": list(self.seconds),
            "steps": list(self.steps),
            "rates": list(self.rates),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LossLog:
        """Return the log that `to_dict` turned into `content`.

        Raises:
            KeyError, TypeError, ValueError: `content` has another form.
        """
        best = content["best_loss"]
        log = cls(
            train=[float(x) for x in content["losses"]["train"]],
            val=[float(x) for x in content["losses"]["val"]],
            chars=[int(x) for x in content["chars"]],
            seconds=[float(x) for x in content["seconds"]],
            steps=[None if x is None else int(x) for x in content.get("steps", [])],
            rates=[None if x is None else float(x) for x in content.get("rates", [])],
            best_loss=None if best is None else float(best),
            iter_num=int(content["iter_num"]),
        )
        # Plots and reports zip the lists, so all must have an entry for each epoch.
        if len({len(x) for x in (log.train, log.val, log.chars, log.seconds, log.steps, log.rates)}) != 1:
            raise ValueError("its lists have different lengths")
        return log

    def to_csv(self) -> str:
        """Return the log as a table for spreadsheets and pandas: a header and one row per epoch.

        Columns: epoch, step, chars, seconds, train_loss, val_loss and best in nats per character, lr, chars_per_second.
        Unknown values are empty.
        """
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["epoch", "step", "chars", "seconds", "train_loss", "val_loss", "best", "lr", "chars_per_second"])
        columns = (self.steps, self.chars, self.seconds, self.train, self.val, self.rates)
        best, before = math.inf, (0, 0.0)
        for epoch, (step, chars, seconds, train, val, rate) in enumerate(zip(*columns, strict=True), start=1):
            best = min(best, val)
            # An imported log has no times.
            spent = seconds - before[1]
            speed = round((chars - before[0]) / spent, 1) if spent > 0 else None
            before = (chars, seconds)
            rows.writerow([epoch, step, chars, round(seconds, 3), train, val, best, rate, speed])
        return table.getvalue()


@dataclass(kw_only=True)
class Checkpoint:
    """Everything needed to resume a run."""

    tensors: Tensors
    """Weights and optimizer tensors, by name."""
    state: dict[str, Any]
    """Plain values: step counts, running sums, the loss log."""


def pack(checkpoint: Checkpoint) -> bytes:
    """Serialize a checkpoint to send it to another process: length of the state (8 bytes), state as JSON, tensors."""
    state = json.dumps(checkpoint.state).encode()
    return len(state).to_bytes(8, "little") + state + serialize(checkpoint.tensors)


def unpack(content: bytes) -> Checkpoint:
    """Return the checkpoint that `pack` serialized."""
    start = 8 + int.from_bytes(content[:8], "little")
    return Checkpoint(tensors=tensors_of(content[start:]), state=json.loads(content[8:start]))


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
        return self.path / "log.jpg"

    @property
    def page_path(self) -> Path:
        """Path of the run's live page."""
        return self.path / "log.html"

    # State of the folder: commands choose between a new run, a resumed run and an error by it.

    def has_config(self) -> bool:
        """Whether a run has started here; its first checkpoint may be missing."""
        return (self.path / _CONFIG).exists()

    def has_validation(self) -> bool:
        """Whether a stream's validation text is stored here."""
        return (self.path / _VALIDATION).exists()

    def has_model(self) -> bool:
        """Whether there is a trained model."""
        return (self.path / MODEL_FILE).exists()

    def is_weights_only(self) -> bool:
        """Whether there is a trained model without a checkpoint, as in the bundled runs."""
        return self.has_model() and not self.has_checkpoint()

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, intact or damaged."""
        # A crash between the two renames of `save_checkpoint` leaves only the previous one.
        return any((self.path / name).exists() for name in (_CHECKPOINT, _PREVIOUS))

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
                locked = _try_lock(stream)
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
        atomic_write(self.path / _CONFIG, text.encode())

    def read_config(self) -> dict[str, Any]:
        """Read `config.json`.

        Raises:
            RunError: the file is missing, is not a JSON object, or has a newer format.
        """
        path = self.path / _CONFIG
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:  # deeply nested JSON recurses
            raise RunError(f"{path}: cannot be read ({error}); start over with --fresh, the folder is kept") from error
        if not isinstance(content, dict):
            raise RunError(f"{path}: not a run's config; start over with --fresh, the folder is kept")
        _check_version(path, content.get("format"))
        return content

    def read_settings(self) -> RunSettings | None:
        """Return the settings of the run to resume, or None if no run has started here.

        Raises:
            RunError: config.json is damaged, the model has another alphabet, or there is a trained model that cannot be resumed.
        """
        # A config without a checkpoint and without a model: the run was killed before its first checkpoint, and starts again.
        if self.has_checkpoint() or (self.has_config() and not self.has_model()):
            content = self.read_config()
            try:
                settings = RunSettings.from_dict(content)
            except ConfigError as error:
                raise RunError(f"{self.path / _CONFIG}: {error}; start over with --fresh, the folder is kept") from error
            self._check_alphabet(settings.data.alphabet)
            return settings
        if self.has_model():
            raise RunError(
                f"{self.path}: a trained model without a checkpoint to resume from; choose another --run, "
                "or --fresh to start over"
            )
        return None

    def _check_alphabet(self, alphabet: Alphabet) -> None:
        """Check that the model in the folder is the run's own."""
        if not self.has_model():
            return
        path = self.path / MODEL_FILE
        try:
            found = load_alphabet(path)
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
        # Metadata values are strings in safetensors. The digest covers tensors and state, so damage to either is detected.
        metadata = {
            "format": str(FORMAT_VERSION),
            "state": json.dumps(checkpoint.state),
            "sha256": _digest(checkpoint.tensors, json.dumps(checkpoint.state)),
        }
        # Written and flushed under a third name first: at every moment one complete checkpoint is on the disk.
        staged = self.path / f".{_CHECKPOINT}.staged.part"
        atomic_write(staged, serialize_tensors(checkpoint.tensors, metadata))
        current = self.path / _CHECKPOINT
        if current.exists():
            replace(current, self.path / _PREVIOUS)
        replace(staged, current)

    def load_checkpoint(self, *, rename: bool = True) -> tuple[Checkpoint, str | None]:
        """Return the newest intact checkpoint, and a message if a newer one is damaged.

        With `rename` the damaged file is renamed: the next save would otherwise move it over the intact one.

        Raises:
            RunError: there is no checkpoint, or all are damaged; the folder is unchanged.
        """
        faults: list[str] = []  # messages about damaged checkpoints, newest first
        for name in (_CHECKPOINT, _PREVIOUS):
            path = self.path / name
            if not path.exists():
                continue
            try:
                checkpoint = _read_checkpoint(path)
            except RunError as error:
                faults.append(str(error))
                continue
            if not faults:
                return checkpoint, None
            # The newest one is damaged and its predecessor intact: the run loses the steps between the two.
            if rename:
                replace(self.path / _CHECKPOINT, self.path / _DAMAGED)
            return checkpoint, f"{faults[0]}; it is kept as {_DAMAGED}, resuming from the previous checkpoint"
        if faults:
            raise RunError(f"{'; '.join(faults)}; nothing to resume: start over with --fresh, the folder is kept")
        raise RunError(f"{self.path}: no checkpoint to resume; start over with --fresh, the folder is kept")

    def save_validation(self, ids: Ids) -> None:
        """Write `validation.safetensors`: a stream's validation text, ids (characters,), drawn once."""
        # Stored, so a resumed run is validated on the same text without reading the stream from its beginning.
        metadata = {"format": str(FORMAT_VERSION), "sha256": _digest({"ids": ids}, "")}
        atomic_write(self.path / _VALIDATION, serialize_tensors({"ids": ids}, metadata))

    def load_validation(self) -> Ids:
        """Read `validation.safetensors`.

        Raises:
            RunError: the file is missing or damaged.
        """
        path = self.path / _VALIDATION
        with _open_tensors(path) as stored:
            metadata, tensors = stored.metadata, dict(stored)
        if metadata.get("sha256") != _digest(tensors, ""):
            raise RunError(f"{path}: damaged (its SHA-256 does not match); start over with --fresh, the folder is kept")
        return tensors["ids"]

    def write_log(self, log: LossLog) -> None:
        """Write `log.pkl`, a pickle of plain values that the original project's tools can read, and the same as `log.csv`."""
        atomic_write(self.path / LOG_FILE, pickle.dumps(log.to_dict(), protocol=4))
        atomic_write(self.path / CSV_FILE, log.to_csv().encode())

    def read_log(self) -> LossLog:
        """Read `log.pkl`; see `read_log`."""
        return read_log(self.path / LOG_FILE)


def model_metadata(config: GPTConfig, text: TextConfig | None = None) -> dict[str, str]:
    """Return the metadata of `model.safetensors`: the model's shape, and the properties of its training text if known."""
    metadata = {"format": str(FORMAT_VERSION), "config": json.dumps(asdict(config))}
    if text is None:
        return metadata
    content: dict[str, Any] = {"fold": text.fold, "ids": text.ids}
    if text.alphabet != PICOGPT:
        content["alphabet"] = text.alphabet.to_json()
    return {**metadata, "text": json.dumps(content)}


def load_text_config(path: Path) -> TextConfig | None:
    """Return the properties of the training text from a model file; None if the file has none, as older files do.

    Raises:
        RunError: the file is missing or damaged.
    """
    with _open_tensors(path) as tensors:
        return _parse_text_config(path, tensors.metadata)


def load_alphabet(path: Path) -> Alphabet:
    """Return the alphabet of a model file; that of the original project if the file names none, as older files do.

    Raises:
        RunError: the file is missing or damaged.
    """
    return alphabet_of(load_text_config(path))


def _parse_text_config(path: Path, metadata: Mapping[str, str]) -> TextConfig | None:
    if "text" not in metadata:
        return None
    try:
        content = json.loads(metadata["text"])
        return TextConfig(
            fold=content["fold"],
            alphabet=Alphabet.from_json(content.get("alphabet")),
            ids=tuple(int(i) for i in content["ids"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
        raise RunError(f"{path}: damaged (the text in its metadata is not valid)") from error


@contextlib.contextmanager
def open_model(path: Path) -> Iterator[tuple[GPTConfig, Mapping[str, npt.NDArray[Any]]]]:
    """Open a `.safetensors` model file; yield its config and its weights, each read on access, in float32.

    Raises:
        RunError: the file is missing, damaged or not a picogpt model, or its alphabet is that of another model.
    """
    with _open_tensors(path) as tensors:
        try:
            config = GPTConfig(**json.loads(tensors.metadata["config"]))
        except (KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
            # A safetensors file of another project: readable, but without our config.
            raise RunError(
                f"{path}: no picogpt model (its metadata has no valid config); train one with picogpt-train"
            ) from error
        alphabet = alphabet_of(_parse_text_config(path, tensors.metadata))
        # With another vocabulary, ids would be read and written as the wrong characters.
        if config.vocab_size != alphabet.vocab_size:
            raise RunError(
                f"{path}: the weights are of another model: a vocabulary of {config.vocab_size:,}, expected "
                f"{alphabet.vocab_size:,} for the alphabet {alphabet.describe()}"
            )
        yield config, tensors


def load_model(path: Path) -> tuple[GPTConfig, Tensors]:
    """Read config and weights of a model file; weights stored in bfloat16 are returned in float32.

    Raises:
        RunError: see `open_model`.
    """
    with open_model(path) as (config, tensors):
        return config, dict(tensors)


def read_log(path: Path) -> LossLog:
    """Read a loss log; reject a pickle that imports anything.

    Raises:
        RunError: the file is missing, damaged or contains more than plain values.
    """
    try:
        with path.open("rb") as stream:
            content = _PlainUnpickler(stream).load()
        return LossLog.from_dict(content)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle can raise almost any exception
        raise RunError(f"{path}: no loss log of picogpt ({type(error).__name__}: {error})") from error


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of numbers, strings, lists and dicts. Every import, through which a pickle runs code, raises."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it imports {module}.{name}, which a log may not do")


def _read_checkpoint(path: Path) -> Checkpoint:
    with _open_tensors(path) as stored:
        metadata, tensors = stored.metadata, dict(stored)
    state = metadata.get("state", "")
    if metadata.get("sha256") != _digest(tensors, state):
        raise RunError(f"{path}: damaged (its SHA-256 does not match)")
    # The checksum matched, so this is the JSON that we wrote: no check of its form is needed.
    return Checkpoint(tensors=tensors, state=json.loads(state))


class _StoredTensors(Mapping[str, npt.NDArray[Any]]):
    """Tensors of a safetensors file by name. Each is read on access, so one tensor of a large file costs little memory.

    Args:
        path: the file.
        stream: the file, opened and validated by the safetensors library.
    """

    def __init__(self, path: Path, stream: safe_open) -> None:
        self.metadata: dict[str, str] = stream.metadata() or {}  # type: ignore[no-untyped-call]
        self._path, self._stream, self._names = path, stream, list(stream.keys())  # type: ignore[no-untyped-call]
        # Offset of the first tensor, and the header; read only for a file with bfloat16 tensors.
        self._layout: tuple[int, dict[str, Any]] | None = None

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        with _reading(self._path):
            if self._stream.get_slice(name).get_dtype() == _BFLOAT16:  # type: ignore[no-untyped-call]
                return self._widened(name)
            tensor: npt.NDArray[Any] = self._stream.get_tensor(name)  # type: ignore[no-untyped-call]
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _widened(self, name: str) -> npt.NDArray[np.float32]:
        """Return a bfloat16 tensor as float32. numpy has no bfloat16, so its bytes are read from the file directly."""
        with self._path.open("rb") as stream:
            if self._layout is None:
                # Layout of the file: length of the header (8 bytes), header in JSON, tensors.
                (length,) = struct.unpack("<Q", stream.read(8))
                self._layout = 8 + length, json.loads(stream.read(length))
            tensors_at, entry = self._layout[0], self._layout[1][name]
            first, end = entry["data_offsets"]
            stream.seek(tensors_at + first)
            halves = np.frombuffer(stream.read(end - first), "<u2").astype(np.uint32)
        # A bfloat16 is the upper half of a float32.
        halves <<= 16
        floats: npt.NDArray[np.float32] = halves.view(np.float32).reshape(entry["shape"])
        return floats


@contextlib.contextmanager
def _open_tensors(path: Path) -> Iterator[_StoredTensors]:
    """Open a safetensors file and check its format version; yield its tensors.

    Raises:
        RunError: the file cannot be read, is damaged or has a newer format.
    """
    with contextlib.ExitStack() as stack:
        with _reading(path):
            tensors = _StoredTensors(path, stack.enter_context(safe_open(path, framework="numpy")))
        version = tensors.metadata.get("format", "0")  # 0 fails the check: the file is not ours
        _check_version(path, int(version) if version.isdigit() else None)
        yield tensors


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into `RunError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such file; train a model with picogpt-train, or name one with --model") from error
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise RunError(f"{path}: cannot be read as safetensors ({error})") from error


def serialize_tensors(tensors: Tensors, metadata: Mapping[str, str], *, bfloat16: bool = False) -> bytes:
    """Serialize tensors and metadata as safetensors, deterministically: equal content gives equal bytes.

    With `bfloat16`, uint16 tensors hold bfloat16 weights, and are marked as such. The library writes metadata in an order that
    differs between processes. Layout: length of the header (8 bytes), header in JSON padded with spaces to a multiple of 8,
    tensors.
    """
    content = serialize(tensors, dict(metadata))
    # Rewrite the header with sorted metadata; offsets of tensors count from its end, so they stay valid.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    if bfloat16:  # numpy lacks the type
        for entry in header.values():
            entry["dtype"] = _BFLOAT16 if entry["dtype"] == "U16" else entry["dtype"]
    text = json.dumps(ordered, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # The memoryview avoids a copy of the tensors.
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[start:]))


def _check_version(path: Path, found: object) -> None:
    # Older formats would be converted here; so far there is one.
    if not isinstance(found, int) or not 0 < found <= FORMAT_VERSION:
        raise RunError(
            f"{path}: format {found} is not supported (at most {FORMAT_VERSION}); use the version of picogpt that wrote it"
        )


def _digest(tensors: Mapping[str, npt.NDArray[Any]], state: str) -> str:
    """Return the SHA-256 of the state and of each tensor's name, dtype, shape and bytes, sorted by name."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)  # a view as bytes, without a copy
    return digest.hexdigest()


class Lock(enum.Enum):
    """Result of an attempt to lock a file."""

    OWN = enum.auto()
    HELD = enum.auto()
    """Another process holds the lock."""
    UNSUPPORTED = enum.auto()
    """The file system has no locks."""


if sys.platform == "win32":
    import msvcrt

    def _try_lock(stream: BinaryIO) -> Lock:
        # Windows locks ranges and blocks reads of them: lock a byte beyond the pid, which stays readable.
        stream.seek(1024)
        try:
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return Lock.HELD
        stream.seek(0)
        return Lock.OWN

else:
    import fcntl

    def _try_lock(stream: BinaryIO) -> Lock:
        try:
            # flock belongs to the open file, so closing another descriptor of the file does not release it, unlike lockf.
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return Lock.UNSUPPORTED
            if error.errno in _LOCK_HELD:
                return Lock.HELD
            raise
        return Lock.OWN
