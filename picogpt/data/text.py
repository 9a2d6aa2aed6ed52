"""Texts into one array of ids, a block at a time: files, folders of texts, or stdin."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import mmap
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from picogpt.data.paths import STDIN, find_files
from picogpt.encodings import decode_stream
from picogpt.errors import DataError
from picogpt.files import unnamed_file
from picogpt.tokenizer import Tally, TextEncoder, list_commonest
from picogpt.wording import Notify, say_nothing

__all__ = ["Corpus", "check_unknown", "read_texts"]

Ids = npt.NDArray[np.uint8]

MAX_CHARS_IN_MEMORY = 1 << 26
"""Characters of the longest text that is held in memory; a longer one lies in a file beside the runs, as ids."""

_BLOCK_BYTES = 1 << 22
"""Bytes that are read, and ids that are hashed, at once."""

MAX_UNKNOWN_SHARE = 0.5
"""Share of unknown characters above which a text is rejected."""
WARN_UNKNOWN_SHARE = 0.01
"""Share of unknown characters above which a text is warned of."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text, encoded, and what is worth saying of it."""

    name: str
    """Short name; the default name of a run on it."""
    ids: npt.NDArray[np.uint8]
    """Token ids of the whole text, shape (characters,)."""
    tally: Tally = field(default_factory=Tally)
    """What encoding changed in the text."""
    fold: bool = True
    """Whether it was folded."""
    mapped: mmap.mmap | None = None
    """The file that `ids` lie in, of a text too long for the memory."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the ids, in hexadecimal: equal for the same text, so that a resumed run notices another one."""
        digest = hashlib.sha256()
        for start in range(0, len(self.ids), _BLOCK_BYTES):
            digest.update(self.ids[start : start + _BLOCK_BYTES].data)
            self.release_pages()
        return digest.hexdigest()

    def release_pages(self) -> None:
        """Give back the memory of what was read from a file, which would grow to the size of the file."""
        if self.mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)


def check_unknown(name: str, tally: Tally, notify: Notify, *, reject: bool = True) -> None:
    """Reject a text that is mostly unknown characters, and warn of one with many of them.

    Args:
        name: what the text is called.
        tally: the counts of the text, or of its beginning.
        notify: told the warning.
        reject: whether to reject; where not, there is a warning only.

    Raises:
        DataError: more than half of the text is unknown.
    """
    share = tally.unknown_share
    if reject and share > MAX_UNKNOWN_SHARE:
        raise DataError(
            f"{name}: {share:.0%} of its characters are unknown ({list_commonest(tally.unknown)}), so there is hardly anything "
            "to learn; the model knows ASCII, and folds to it what is near (docs/texts.md)"
        )
    if share > WARN_UNKNOWN_SHARE:
        notify(
            f"warning: {name}: {share:.1%} of its characters are unknown and read as <?>, which is easy to predict, so that the "
            "loss comes out too low, and never drawn, so that generated texts go astray where it would stand"
        )


def read_texts(
    paths: Sequence[str], *, name: str, scratch: Path = Path(), fold: bool = True, notify: Notify = say_nothing
) -> Corpus:
    """Read text files, folders of texts (`picogpt.data.paths`) and stdin (`-`), in whatever encoding (`picogpt.encodings`).

    A byte order mark is dropped and line ends become newlines. Texts are joined by a newline.

    Args:
        paths: what to read.
        name: the corpus's name.
        scratch: folder for the ids of a text longer than `MAX_CHARS_IN_MEMORY`.
        fold: whether characters outside ASCII are folded (`picogpt.folding`).
        notify: told in a line what was found, passed over, or read in another encoding than UTF-8.

    Raises:
        DataError: a path is missing or unreadable, a folder holds no text, a file is not text, all of it is empty, or
            there is no room for the ids of a long text.
    """
    encoder = TextEncoder(fold=fold)
    blocks = _encoded(find_files(paths, notify), encoder, notify)
    parts: list[Ids] = []
    while sum(map(len, parts)) <= MAX_CHARS_IN_MEMORY:
        ids = next(blocks, None)
        if ids is None:
            break
        parts.append(ids)
    else:
        mapped = _memory_map(itertools.chain(parts, blocks), scratch)
        return Corpus(name=name, ids=np.frombuffer(mapped, np.uint8), tally=encoder.tally, fold=fold, mapped=mapped)
    if not parts:
        raise DataError(f"{' '.join(paths)}: no text in it; give a file with at least a few thousand characters")
    return Corpus(name=name, ids=np.concatenate(parts), tally=encoder.tally, fold=fold)


def _encoded(files: Sequence[str], encoder: TextEncoder, notify: Notify) -> Iterator[Ids]:
    """The ids of all texts, a block at a time."""
    for i, path in enumerate(files):
        blocks = _blocks(path, notify)
        yield from map(encoder.encode, blocks if i == 0 else _after_newline(blocks))


def _memory_map(blocks: Iterable[Ids], scratch: Path) -> mmap.mmap:
    """Ids in a file of `scratch` that has no name, mapped into memory."""
    try:
        with unnamed_file(scratch, (ids.tobytes() for ids in blocks)) as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(
            f"{scratch.absolute()}: no room for the ids of a long text, a byte a character ({error.strerror or error}); free "
            "some, or choose another --logs-dir"
        ) from error


def _after_newline(blocks: Iterator[str]) -> Iterator[str]:
    for i, block in enumerate(blocks):
        yield "\n" + block if i == 0 else block


def _blocks(path: str, notify: Notify) -> Iterator[str]:
    """The text of one file, in blocks of a few million bytes."""
    try:
        with _open(path) as stream:
            yield from decode_stream(stream, name=path, notify=notify, block_bytes=_BLOCK_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path of --text") from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    if path != STDIN:
        with Path(path).open("rb") as stream:
            yield stream
        return
    if sys.stdin is None:
        raise DataError("--text -: standard input is closed; pipe a text in, or name a file")
    yield sys.stdin.buffer
