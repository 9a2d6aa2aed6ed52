"""Named corpora: Tiny Shakespeare, downloaded on demand, and the sample play that is included."""

from __future__ import annotations

import hashlib
import http.client
import queue
import threading
import urllib.request
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.data.text import Corpus, read_texts
from picogpt.errors import ConfigError, DataError
from picogpt.files import atomic_write
from picogpt.wording import Notify

__all__ = ["DATASETS", "DATASET_FOLDER", "load_dataset"]

DATASETS = ("auto", "sample", "tinyshakespeare")
"""Names that `load_dataset` accepts."""
DATASET_FOLDER = Path("dataset")
"""Folder of downloaded corpora, relative to the working directory."""

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
# Checksum and size of the published file.
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TINY_SHAKESPEARE_BYTES = 1_115_394

PATIENCE = 30.0
"""Seconds without a byte before an explicitly requested download gives up."""
AUTO_TIMEOUT = 8.0
"""Seconds that `auto` allows for the whole download."""

Progress = Callable[[int, int], None]


def load_dataset(name: str, *, alphabet: Alphabet | None = PICOGPT, notify: Notify, progress: Progress) -> Corpus:
    """Load one of `DATASETS`.

    Args:
        name: one of the names; `auto` is Tiny Shakespeare if it is on disk or downloads within seconds, else the sample.
        alphabet: the characters to know; None takes the text's own (`read_texts`).
        notify: receives one line about the choice or the download, and the reason.
        progress: called during an explicitly requested download with the bytes received and the total.

    Raises:
        ConfigError: unknown name.
        DataError: the text is not available.
    """
    if name == "sample":
        return _sample(alphabet, notify)
    if name == "tinyshakespeare":
        return _tiny_shakespeare(alphabet, notify, lambda: _download(PATIENCE, progress))
    # The default of picogpt-train.
    if name == "auto":
        try:
            # A first run must not hang or fail for want of a network: fall back to the included text.
            return _tiny_shakespeare(alphabet, notify, lambda: _download_within(AUTO_TIMEOUT))
        except DataError as error:
            notify(f"{error}; using the sample play instead")
            return _sample(alphabet, notify)
    raise ConfigError(f"dataset must be one of {', '.join(DATASETS)} (--text takes your own files), got {name!r}", "dataset")


def _sample(alphabet: Alphabet | None, notify: Notify) -> Corpus:
    """Read the included play, from the installed package or from a clone."""
    # The wheel carries the file inside the package; a clone has it in its `dataset` folder.
    packaged = Path(str(files("picogpt.data"))) / "sample.txt"
    in_clone = Path(__file__).parents[2] / "dataset" / "sample.txt"
    return read_texts([str(packaged if packaged.is_file() else in_clone)], name="sample", alphabet=alphabet, notify=notify)


def _tiny_shakespeare(alphabet: Alphabet | None, notify: Notify, download: Callable[[], bytes]) -> Corpus:
    """Read Tiny Shakespeare, downloading it first if it is not on disk."""
    # The file is kept, so that only the first run needs a network.
    path = DATASET_FOLDER / "tinyshakespeare.txt"
    if not path.exists():
        content = download()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Atomic: an interrupted download leaves no half file that a later run would take for the text.
            atomic_write(path, content)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
        notify(f"downloaded Tiny Shakespeare to {path}")
    _check(path)
    return read_texts([str(path)], name="tinyshakespeare", alphabet=alphabet, notify=notify)


def _check(path: Path) -> None:
    """Reject a file whose content is not the published one."""
    # The file may be the user's, or an old or edited copy: losses are only comparable on the same bytes.
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if hashlib.sha256(content).hexdigest() != TINY_SHAKESPEARE_SHA256:
        raise DataError(
            f"{path}: not Tiny Shakespeare (its SHA-256 differs); delete the file to download it again, or train "
            f"on it as it is with --text {path}"
        )


def _download(timeout: float, progress: Progress) -> bytes:
    """Download Tiny Shakespeare and verify its checksum."""
    chunks: list[bytes] = []
    received = 0
    try:
        with urllib.request.urlopen(TINY_SHAKESPEARE_URL, timeout=timeout) as response:
            # Stop beyond the known size: a captive portal or a wrong server can send without end.
            while received <= _TINY_SHAKESPEARE_BYTES and (chunk := response.read(1 << 16)):
                chunks.append(chunk)
                received += len(chunk)
                # The total is known beforehand; the server need not send it.
                progress(received, _TINY_SHAKESPEARE_BYTES)
    # URLError is an OSError, with the cause in `reason`; a broken HTTP answer and a malformed proxy variable are neither.
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _not_available(getattr(error, "reason", error)) from error
    content = b"".join(chunks)
    # A proxy may answer with a page of its own and status 200.
    if hashlib.sha256(content).hexdigest() != TINY_SHAKESPEARE_SHA256:
        raise _not_available("the download has a wrong SHA-256")
    return content


def _download_within(seconds: float) -> bytes:
    """Download Tiny Shakespeare within `seconds`, DNS lookup included, which no socket timeout covers."""
    # The result, or the error, comes through a queue with a timeout.
    answers: queue.SimpleQueue[bytes | DataError] = queue.SimpleQueue()

    def fetch() -> None:
        try:
            answers.put(_download(seconds, lambda *_: None))
        except DataError as error:
            answers.put(error)

    # A daemon thread, as a stuck lookup cannot be cancelled; it is abandoned after the timeout.
    threading.Thread(target=fetch, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise _not_available(f"no answer within {seconds:g} s") from None
    if isinstance(answer, DataError):
        raise answer
    return answer


def _not_available(reason: object) -> DataError:
    """Build the error of a failed download, with both ways out."""
    path = DATASET_FOLDER / "tinyshakespeare.txt"
    return DataError(
        f"Tiny Shakespeare cannot be downloaded from {TINY_SHAKESPEARE_URL} ({reason}); put the file at {path}, "
        "or use --dataset sample"
    )
