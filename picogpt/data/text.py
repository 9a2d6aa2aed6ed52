"""Text files into one array of ids, a block at a time: files, folders of .txt, or stdin."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import mmap
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from picogpt.errors import DataError
from picogpt.files import unnamed_file
from picogpt.tokenizer import CharTokenizer

__all__ = ["STDIN", "Corpus", "read_texts"]

Ids = npt.NDArray[np.uint8]

STDIN = "-"
"""The path that means standard input."""

IN_MEMORY = 1 << 26
"""Characters of the longest text that is held in memory; a longer one lies in a file beside the runs, as ids."""

_BLOCK_CHARS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text, encoded, and what is worth saying of it."""

    name: str
    """Short name; the default name of a run on it."""
    ids: npt.NDArray[np.uint8]
    """Token ids of the whole text, shape (characters,)."""
    unknown: Counter[str]
    """How often each character occurs that the tokenizer does not know."""
    mapped: mmap.mmap | None = None
    """The file that `ids` lie in, of a text too long for the memory."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the ids, in hexadecimal: equal for the same text, so that a resumed run notices another one."""
        digest = hashlib.sha256()
        for start in range(0, len(self.ids), _BLOCK_CHARS):
            digest.update(self.ids[start : start + _BLOCK_CHARS].data)
            self.forget()
        return digest.hexdigest()

    def forget(self) -> None:
        """Give back the memory of what was read from a file, which would grow to the size of the file."""
        if self.mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)

    def describe_unknown(self, most: int = 5) -> str:
        """How many characters have no id, the commonest first."""
        total = self.unknown.total()
        if not total:
            return "every character known"
        commonest = ", ".join(f"{c!r} {n:,}" for c, n in self.unknown.most_common(most))
        return f"{total:,} characters unknown to the tokenizer ({total / len(self.ids):.2%}; commonest: {commonest})"


def read_texts(paths: Sequence[str], *, name: str, scratch: Path = Path()) -> Corpus:
    """Read text files, folders of `.txt` files (searched to the bottom, in the order of their names) and stdin (`-`).

    UTF-8; a byte order mark is dropped, line ends become newlines, bytes that are not UTF-8 become U+FFFD, which the
    tokenizer does not know and so counts. Texts are joined by a newline.

    Args:
        paths: what to read.
        name: the corpus's name.
        scratch: folder for the ids of a text longer than `IN_MEMORY`.

    Raises:
        DataError: a path is missing or unreadable, a folder holds no text, a file is not text, all of it is empty, or
            there is no room for the ids of a long text.
    """
    unknown: Counter[str] = Counter()
    blocks = _encoded(paths, unknown)
    parts: list[Ids] = []
    while sum(map(len, parts)) <= IN_MEMORY:
        ids = next(blocks, None)
        if ids is None:
            break
        parts.append(ids)
    else:
        mapped = _map(itertools.chain(parts, blocks), scratch)
        return Corpus(name=name, ids=np.frombuffer(mapped, np.uint8), unknown=unknown, mapped=mapped)
    if not parts:
        raise DataError(f"{' '.join(paths)}: no text in it; give a file with at least a few thousand characters")
    return Corpus(name=name, ids=np.concatenate(parts), unknown=unknown)


def _encoded(paths: Sequence[str], unknown: Counter[str]) -> Iterator[Ids]:
    """The ids of all texts, a block at a time; counts what the tokenizer does not know."""
    tokenizer = CharTokenizer()
    for i, path in enumerate(_expand(paths)):
        for block in _blocks(path) if i == 0 else _after_newline(_blocks(path)):
            ids = tokenizer.encode(block)
            if not ids.all():
                unknown.update(tokenizer.unknown_characters(block))
            yield ids


def _map(blocks: Iterable[Ids], scratch: Path) -> mmap.mmap:
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


def _expand(paths: Sequence[str]) -> Iterator[str]:
    """The files that `paths` stand for, in order."""
    for path in paths:
        if path == STDIN or not Path(path).is_dir():
            yield path
            continue
        found = sorted(str(file) for file in Path(path).rglob("*.txt") if file.is_file())
        if not found:
            raise DataError(f"{path}: the folder holds no .txt file; give a folder of .txt files, or the files themselves")
        yield from found


def _blocks(path: str) -> Iterator[str]:
    """The text of one file, in blocks of a few million characters."""
    try:
        with _open(path) as stream:
            while block := stream.read(_BLOCK_CHARS):
                if "\0" in block:
                    raise DataError(f"{path}: not a text in UTF-8 (it has zero bytes); convert it, or leave it out")
                yield block
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path of --text") from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[TextIO]:
    if path != STDIN:
        with Path(path).open(encoding="utf-8-sig", errors="replace") as stream:
            yield stream
        return
    if sys.stdin is None:
        raise DataError("--text -: standard input is closed; pipe a text in, or name a file")
    wrapper = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", errors="replace")
    try:
        yield wrapper
    finally:
        wrapper.detach()
