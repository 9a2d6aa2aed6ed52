"""The run folder: what a training run leaves on the disk, and how it is read back.

| file                              | content                                                                  |
|-----------------------------------|--------------------------------------------------------------------------|
| `config.json`                     | what made this run: model, training, schedule, data, seed, versions       |
| `model.safetensors`               | the best weights so far, the model's shape in the metadata                |
| `checkpoint.safetensors`          | all that is needed to go on, with a SHA-256 of it                         |
| `checkpoint.previous.safetensors` | the one before it                                                        |
| `validation.safetensors`          | of a run on a stream: its validation text, drawn once                     |
| `log.pkl`                         | the loss log, plain values only                                          |
| `log.jpg`                         | its picture                                                              |
| `log.html`                        | the page to watch: curve, samples, an excerpt shaded by probability      |
| `epochs.json`                     | the page's samples and probabilities, an entry an epoch                  |
| `eval.jpg`                        | the picture of an evaluation, where there was one                        |

Every file is written whole or not at all. Nothing that is read can run code. Tensors are numpy arrays here, so that
reading a model needs no torch.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import hashlib
import json
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

from picogpt.config import GPTConfig, TextConfig
from picogpt.errors import ConfigError, RunError
from picogpt.files import atomic_write, can_flush, remove_leftovers, replace

__all__ = [
    "LOG_FILE",
    "MODEL_FILE",
    "Checkpoint",
    "LossLog",
    "RunFolder",
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
"""Written into every file; a reader refuses a newer one."""

Tensors = dict[str, npt.NDArray[Any]]

MODEL_FILE = "model.safetensors"
_CHECKPOINT = "checkpoint.safetensors"
_PREVIOUS = "checkpoint.previous.safetensors"
_DAMAGED = "checkpoint.damaged.safetensors"
_VALIDATION = "validation.safetensors"
_CONFIG = "config.json"
LOG_FILE = "log.pkl"
_BFLOAT16 = "BF16"
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_LOCK_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
"""NFS locks a range of bytes instead, of which a holder may be told by EACCES."""


@dataclass(kw_only=True)
class LossLog:
    """The loss log: one entry an epoch in each list."""

    train: list[float] = field(default_factory=list)
    """Mean training loss of each epoch, in nats per character."""
    val: list[float] = field(default_factory=list)
    """Validation loss after each epoch, in nats per character."""
    chars: list[int] = field(default_factory=list)
    """Characters trained on by the end of each epoch."""
    seconds: list[float] = field(default_factory=list)
    """Seconds spent training by the end of each epoch."""
    best_loss: float | None = None
    """The lowest validation loss so far; that of `model.safetensors`."""
    iter_num: int = 0
    """Optimizer steps so far."""

    def to_dict(self) -> dict[str, Any]:
        """The log with the keys of the original project, and `chars` and `seconds` beside them."""
        return {
            "losses": {"train": list(self.train), "val": list(self.val)},
            "best_loss": self.best_loss,
            "iter_num": self.iter_num,
            "chars": list(self.chars),
            "seconds": list(self.seconds),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LossLog:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: `content` is not of that form.
        """
        best = content["best_loss"]
        log = cls(
            train=[float(x) for x in content["losses"]["train"]],
            val=[float(x) for x in content["losses"]["val"]],
            chars=[int(x) for x in content["chars"]],
            seconds=[float(x) for x in content["seconds"]],
            best_loss=None if best is None else float(best),
            iter_num=int(content["iter_num"]),
        )
        if len({len(log.train), len(log.val), len(log.chars), len(log.seconds)}) != 1:
            raise ValueError("its lists have different lengths")
        return log


@dataclass(kw_only=True)
class Checkpoint:
    """All that is needed to go on with a run."""

    tensors: Tensors
    """Weights and the optimizer's tensors, by name."""
    state: dict[str, Any]
    """Plain values: steps, sums, the loss log."""


def pack(checkpoint: Checkpoint) -> bytes:
    """`checkpoint` as bytes, to be sent to another process: the length of its state, the state, the tensors."""
    state = json.dumps(checkpoint.state).encode()
    return len(state).to_bytes(8, "little") + state + serialize(checkpoint.tensors)


def unpack(content: bytes) -> Checkpoint:
    """The inverse of `pack`."""
    start = 8 + int.from_bytes(content[:8], "little")
    return Checkpoint(tensors=tensors_of(content[start:]), state=json.loads(content[8:start]))


class RunFolder:
    """One run's folder. Making the object touches nothing; `create` makes the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.path.name

    @property
    def plot_path(self) -> Path:
        """Where the picture of the loss log belongs."""
        return self.path / "log.jpg"

    @property
    def page_path(self) -> Path:
        """The path of the run's page."""
        return self.path / "log.html"

    def has_config(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / _CONFIG).exists()

    def has_validation(self) -> bool:
        """Whether the validation text of a run on a stream is kept here."""
        return (self.path / _VALIDATION).exists()

    def has_model(self) -> bool:
        """Whether there is a trained model."""
        return (self.path / MODEL_FILE).exists()

    def is_weights_only(self) -> bool:
        """Whether there is a trained model without a checkpoint, as in the bundled runs."""
        return self.has_model() and not self.has_checkpoint()

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, intact or damaged."""
        return any((self.path / name).exists() for name in (_CHECKPOINT, _PREVIOUS))

    def create(self) -> None:
        """Make the folder."""
        self.path.mkdir(parents=True, exist_ok=True)

    def next_backup_name(self) -> Path:
        """The first of `NAME.old-1`, `NAME.old-2`, ... that is free."""
        number = 1
        while (target := self.path.with_name(f"{self.name}.old-{number}")).exists():
            number += 1
        return target

    def archive(self) -> Path:
        """Rename the folder to `next_backup_name` and return that."""
        target = self.next_backup_name()
        replace(self.path, target)
        return target

    @contextlib.contextmanager
    def lock(self) -> Iterator[list[str]]:
        """Hold the folder against a second trainer, and remove what a killed one left half-written in it.

        The system frees the lock however the process ends. Yields a sentence for each promise that the folder's file system
        weakens, as it lacks what the promise rests on.

        Raises:
            OSError: the disk is broken.
            RunError: another process trains in this folder, or something else lies in the lock's place.
        """
        path = self.path / ".lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise RunError(f"{path}: cannot be opened ({error.strerror}); remove it, or choose another --run") from error
        with os.fdopen(descriptor, "r+b") as stream:
            try:
                locked = _try_lock(stream)
            except OSError as error:
                error.filename = os.fspath(path)
                raise
            if locked is Lock.HELD:
                holder = stream.read(32).decode("ascii", "replace").strip() or "unknown"
                raise RunError(
                    f"{self.path}: another process (pid {holder}) trains in this run; wait for it or choose another --run"
                )
            stream.truncate(0)
            stream.write(str(os.getpid()).encode())
            stream.flush()
            # Safe under the lock: no other trainer is writing here.
            remove_leftovers(self.path)
            yield list(self._weaknesses(locked))

    def _weaknesses(self, locked: Lock) -> Iterator[str]:
        if locked is Lock.UNSUPPORTED:
            yield (
                f"{self.path}: this file system has no locks, so a second picogpt-train in this run cannot be detected; "
                "start only one at a time"
            )
        if not can_flush(self.path):
            yield f"{self.path}: this file system cannot flush to the disk, so a power failure may lose the latest checkpoints"

    def write_config(self, content: Mapping[str, Any]) -> None:
        """Write `config.json`."""
        text = json.dumps({"format": FORMAT_VERSION, **content}, indent=2) + "\n"
        atomic_write(self.path / _CONFIG, text.encode())

    def read_config(self) -> dict[str, Any]:
        """Read `config.json`.

        Raises:
            RunError: it is missing, no JSON object, or of a newer format.
        """
        path = self.path / _CONFIG
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path}: cannot be read ({error}); start over with --fresh, the folder is kept") from error
        if not isinstance(content, dict):
            raise RunError(f"{path}: not a run's config; start over with --fresh, the folder is kept")
        _check_version(path, content.get("format"))
        return content

    def save_model(self, tensors: Mapping[str, npt.NDArray[Any]], config: GPTConfig, text: TextConfig | None = None) -> None:
        """Write `model.safetensors`: state dict, shape and text of the best model so far."""
        atomic_write(self.path / MODEL_FILE, serialize_tensors(dict(tensors), model_metadata(config, text)))

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write `checkpoint.safetensors`, keeping the one before it.

        Raises:
            OSError: the disk is full, read-only or broken; the checkpoints on it are as they were.
        """
        metadata = {
            "format": str(FORMAT_VERSION),
            "state": json.dumps(checkpoint.state),
            "sha256": _digest(checkpoint.tensors, json.dumps(checkpoint.state)),
        }
        staged = self.path / f".{_CHECKPOINT}.staged.part"
        atomic_write(staged, serialize_tensors(checkpoint.tensors, metadata))
        current = self.path / _CHECKPOINT
        if current.exists():
            replace(current, self.path / _PREVIOUS)
        replace(staged, current)

    def load_checkpoint(self, *, rename: bool = True) -> tuple[Checkpoint, str | None]:
        """The newest good checkpoint, and a line about a newer damaged one that was passed over.

        With `rename` a damaged one is renamed, so that saving does not put it in the place of a good one.

        Raises:
            RunError: there is none, or all of them are damaged; nothing is changed then.
        """
        faults: list[str] = []
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
            if rename:
                replace(self.path / _CHECKPOINT, self.path / _DAMAGED)
            return checkpoint, f"{faults[0]}; it is kept as {_DAMAGED}, resuming from the previous checkpoint"
        if faults:
            raise RunError(f"{'; '.join(faults)}; nothing to resume: start over with --fresh, the folder is kept")
        raise RunError(f"{self.path}: no checkpoint to resume; start over with --fresh, the folder is kept")

    def save_validation(self, ids: npt.NDArray[np.uint8]) -> None:
        """Write `validation.safetensors`: the validation text (characters,) of a run on a stream, drawn once."""
        metadata = {"format": str(FORMAT_VERSION), "sha256": _digest({"ids": ids}, "")}
        atomic_write(self.path / _VALIDATION, serialize_tensors({"ids": ids}, metadata))

    def load_validation(self) -> npt.NDArray[np.uint8]:
        """Read `validation.safetensors`.

        Raises:
            RunError: it is missing or damaged.
        """
        path = self.path / _VALIDATION
        with _open_tensors(path) as stored:
            metadata, tensors = stored.metadata, dict(stored)
        if metadata.get("sha256") != _digest(tensors, ""):
            raise RunError(f"{path}: damaged (its SHA-256 does not match); start over with --fresh, the folder is kept")
        return tensors["ids"]

    def write_log(self, log: LossLog) -> None:
        """Write `log.pkl`: a pickle of plain values, readable by anything that reads the original's losses."""
        atomic_write(self.path / LOG_FILE, pickle.dumps(log.to_dict(), protocol=4))

    def read_log(self) -> LossLog:
        """Read `log.pkl`; see `read_log`."""
        return read_log(self.path / LOG_FILE)


def model_metadata(config: GPTConfig, text: TextConfig | None = None) -> dict[str, str]:
    """Metadata of `model.safetensors`: the model's shape, and the text that it was trained on where that is known."""
    metadata = {"format": str(FORMAT_VERSION), "config": json.dumps(asdict(config))}
    return metadata if text is None else {**metadata, "text": json.dumps(asdict(text))}


def load_text_config(path: Path) -> TextConfig | None:
    """The text that the model of a `.safetensors` file was trained on; None where the file does not name it, as older ones.

    Raises:
        RunError: the file is missing or damaged.
    """
    with _open_tensors(path) as tensors:
        stored = tensors.metadata.get("text")
    if stored is None:
        return None
    try:
        content = json.loads(stored)
        return TextConfig(fold=bool(content["fold"]), ids=tuple(int(i) for i in content["ids"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: damaged (the text in its metadata is not valid)") from error


@contextlib.contextmanager
def open_model(path: Path) -> Iterator[tuple[GPTConfig, Mapping[str, npt.NDArray[Any]]]]:
    """Shape and weights of a `.safetensors` file of picogpt; each weight is read, in float32, when it is asked for.

    Raises:
        RunError: there is no model, or it is damaged or of another kind.
    """
    with _open_tensors(path) as tensors:
        try:
            config = GPTConfig(**json.loads(tensors.metadata["config"]))
        except (KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
            raise RunError(
                f"{path}: no picogpt model (its metadata has no valid config); train one with picogpt-train"
            ) from error
        yield config, tensors


def load_model(path: Path) -> tuple[GPTConfig, Tensors]:
    """Shape and weights, in float32, from a `.safetensors` file of picogpt; it may hold them in bfloat16.

    Raises:
        RunError: see `open_model`.
    """
    with open_model(path) as (config, tensors):
        return config, dict(tensors)


def read_log(path: Path) -> LossLog:
    """Read a loss log, refusing a pickle that names anything to import.

    Raises:
        RunError: the file is missing, damaged or holds more than plain values.
    """
    try:
        with path.open("rb") as stream:
            content = _PlainUnpickler(stream).load()
        return LossLog.from_dict(content)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise RunError(f"{path}: no loss log of picogpt ({type(error).__name__}: {error})") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts; imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it imports {module}.{name}, which a log may not do")


def _read_checkpoint(path: Path) -> Checkpoint:
    with _open_tensors(path) as stored:
        metadata, tensors = stored.metadata, dict(stored)
    state = metadata.get("state", "")
    if metadata.get("sha256") != _digest(tensors, state):
        raise RunError(f"{path}: damaged (its SHA-256 does not match)")
    # What carries our own checksum is what we wrote.
    return Checkpoint(tensors=tensors, state=json.loads(state))


class _StoredTensors(Mapping[str, npt.NDArray[Any]]):
    """Tensors of a safetensors file, which can hold nothing else; each is read when it is asked for.

    Args:
        path: the file.
        stream: the same, opened and checked by the library.
    """

    def __init__(self, path: Path, stream: safe_open) -> None:
        self.metadata: dict[str, str] = stream.metadata() or {}  # type: ignore[no-untyped-call]
        self._path, self._stream, self._names = path, stream, list(stream.keys())  # type: ignore[no-untyped-call]
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
        """The float32 numbers of a tensor of bfloat16, a type that numpy lacks: they are the upper halves of float32."""
        with self._path.open("rb") as stream:
            if self._layout is None:
                # The length of the header, the header, and then the tensors.
                (length,) = struct.unpack("<Q", stream.read(8))
                self._layout = 8 + length, json.loads(stream.read(length))
            tensors_at, entry = self._layout[0], self._layout[1][name]
            first, end = entry["data_offsets"]
            stream.seek(tensors_at + first)
            halves = np.frombuffer(stream.read(end - first), "<u2").astype(np.uint32)
        halves <<= 16
        floats: npt.NDArray[np.float32] = halves.view(np.float32).reshape(entry["shape"])
        return floats


@contextlib.contextmanager
def _open_tensors(path: Path) -> Iterator[_StoredTensors]:
    """The tensors of a safetensors file of this version.

    Raises:
        RunError: it cannot be read, is damaged or of a later version.
    """
    with contextlib.ExitStack() as stack:
        with _reading(path):
            tensors = _StoredTensors(path, stack.enter_context(safe_open(path, framework="numpy")))
        version = tensors.metadata.get("format", "0")
        _check_version(path, int(version) if version.isdigit() else None)
        yield tensors


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Report whatever is wrong with a file as a `RunError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such file; train a model with picogpt-train, or name one with --model") from error
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise RunError(f"{path}: cannot be read as safetensors ({error})") from error


def serialize_tensors(tensors: Tensors, metadata: Mapping[str, str]) -> bytes:
    """Tensors and metadata in the format of safetensors, the same bytes for the same content; uint16 holds bfloat16.

    The library writes metadata in an order that differs from process to process. Layout: the header's length in 8 bytes, the
    header in JSON, padded with spaces to a multiple of 8, the numbers.
    """
    content = serialize(tensors, dict(metadata))
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    for entry in header.values():
        if entry["dtype"] == "U16":  # numpy lacks bfloat16
            entry["dtype"] = _BFLOAT16
    text = json.dumps(ordered, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[start:]))


def _check_version(path: Path, found: object) -> None:
    if not isinstance(found, int) or not 0 < found <= FORMAT_VERSION:
        raise RunError(
            f"{path}: format {found} is not supported (at most {FORMAT_VERSION}); use the version of picogpt that wrote it"
        )


def _digest(tensors: Mapping[str, npt.NDArray[Any]], state: str) -> str:
    """SHA-256 over the state and every tensor's name, type, shape and bytes, in the order of their names."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class Lock(enum.Enum):
    """What came of an attempt to lock a file."""

    OWN = enum.auto()
    HELD = enum.auto()
    """Another process has it."""
    UNSUPPORTED = enum.auto()
    """The file system has no locks."""


if sys.platform == "win32":
    import msvcrt

    def _try_lock(stream: BinaryIO) -> Lock:
        stream.seek(1024)  # a byte past the holder's number, which stays readable
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
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return Lock.UNSUPPORTED
            if error.errno in _LOCK_HELD:
                return Lock.HELD
            raise
        return Lock.OWN
