"""The corpora that have a name: Tiny Shakespeare, and the play that comes with the project."""

from __future__ import annotations

import hashlib
import http.client
import queue
import threading
import urllib.request
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from picogpt.data.text import Corpus, read_texts
from picogpt.errors import ConfigError, DataError
from picogpt.files import atomic_write
from picogpt.wording import Notify

__all__ = ["DATASETS", "DATASET_FOLDER", "load_dataset"]

DATASETS = ("auto", "sample", "tinyshakespeare")
"""The names that `load_dataset` knows."""
DATASET_FOLDER = Path("dataset")
"""Where corpora lie, under the folder that the command is started in."""

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TINY_SHAKESPEARE_BYTES = 1_115_394

PATIENCE = 30.0
"""Seconds without an answer after which a download that was asked for gives up."""
AUTO_TIMEOUT = 8.0
"""Seconds that `auto` gives the whole download."""

Progress = Callable[[int, int], None]


def load_dataset(name: str, *, notify: Notify, progress: Progress) -> Corpus:
    """Load one of `DATASETS`.

    Args:
        name: its name; `auto` is Tiny Shakespeare if it is there or can be had within seconds, else the sample.
        notify: told in a line what was chosen or fetched, and why.
        progress: told, during a download that was asked for, the bytes that have come and all that there are.

    Raises:
        ConfigError: there is no such name.
        DataError: the text cannot be had.
    """
    if name == "sample":
        return _sample()
    if name == "tinyshakespeare":
        return _tiny_shakespeare(notify, lambda: _download(PATIENCE, progress))
    if name == "auto":
        try:
            return _tiny_shakespeare(notify, lambda: _download_within(AUTO_TIMEOUT))
        except DataError as error:
            notify(f"{error}; using the sample play instead")
            return _sample()
    raise ConfigError(f"dataset must be one of {', '.join(DATASETS)} (--text takes your own files), got {name!r}", "dataset")


def _sample() -> Corpus:
    packaged = Path(str(files("picogpt.data"))) / "sample.txt"
    in_clone = Path(__file__).parents[2] / "dataset" / "sample.txt"
    return read_texts([str(packaged if packaged.is_file() else in_clone)], name="sample")


def _tiny_shakespeare(notify: Notify, download: Callable[[], bytes]) -> Corpus:
    path = DATASET_FOLDER / "tinyshakespeare.txt"
    if not path.exists():
        content = download()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, content)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
        notify(f"fetched Tiny Shakespeare to {path}")
    _check(path)
    return read_texts([str(path)], name="tinyshakespeare")


def _check(path: Path) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if hashlib.sha256(content).hexdigest() != TINY_SHAKESPEARE_SHA256:
        raise DataError(
            f"{path}: not Tiny Shakespeare (its SHA-256 differs); delete the file to have it fetched anew, or train on it "
            f"as it is with --text {path}"
        )


def _download(timeout: float, progress: Progress) -> bytes:
    """Fetch Tiny Shakespeare and check it."""
    chunks: list[bytes] = []
    received = 0
    try:
        with urllib.request.urlopen(TINY_SHAKESPEARE_URL, timeout=timeout) as response:
            while received <= _TINY_SHAKESPEARE_BYTES and (chunk := response.read(1 << 16)):
                chunks.append(chunk)
                received += len(chunk)
                progress(received, _TINY_SHAKESPEARE_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _not_available(getattr(error, "reason", error)) from error
    content = b"".join(chunks)
    if hashlib.sha256(content).hexdigest() != TINY_SHAKESPEARE_SHA256:
        raise _not_available("what came is another file")
    return content


def _download_within(seconds: float) -> bytes:
    """Fetch Tiny Shakespeare in so many seconds, looking up the address included, which no socket timeout covers."""
    answers: queue.SimpleQueue[bytes | DataError] = queue.SimpleQueue()

    def fetch() -> None:
        try:
            answers.put(_download(seconds, lambda *_: None))
        except DataError as error:
            answers.put(error)

    threading.Thread(target=fetch, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise _not_available(f"no answer within {seconds:g} s") from None
    if isinstance(answer, DataError):
        raise answer
    return answer


def _not_available(reason: object) -> DataError:
    path = DATASET_FOLDER / "tinyshakespeare.txt"
    return DataError(
        f"Tiny Shakespeare cannot be fetched from {TINY_SHAKESPEARE_URL} ({reason}); put the file at {path}, "
        "or use --dataset sample"
    )
