"""Reading of texts (files, folders, stdin) into one array of token ids, block by block.

One character is one id is one byte. A text that is too long for memory is written to an unnamed file and memory-mapped.
"""

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

from picogpt.config import Fold
from picogpt.data.paths import STDIN, find_files
from picogpt.encodings import decode_stream
from picogpt.errors import DataError
from picogpt.files import unnamed_file
from picogpt.tokenizer import Tally, TextEncoder, list_commonest
from picogpt.wording import Notify, say_nothing

__all__ = ["Corpus", "check_unknown", "read_texts"]

Ids = npt.NDArray[np.uint8]

MAX_CHARS_IN_MEMORY = 1 << 26
"""Longest text held in memory; the ids of a longer one are mapped from a file in the logs folder."""

_BLOCK_BYTES = 1 << 22
"""Bytes read, or ids hashed, at a time."""

MAX_UNKNOWN_SHARE = 0.5
"""Share of unknown characters above which a text is rejected."""
WARN_UNKNOWN_SHARE = 0.01
"""Share of unknown characters above which the user is warned."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """An encoded text with its statistics."""

    name: str
    """Short name; the default name of a run on it."""
    ids: npt.NDArray[np.uint8]
    """Token ids of the whole text, shape (characters,)."""
    tally: Tally = field(default_factory=Tally)
    """Counts of the characters that encoding changed."""
    fold: Fold = True
    """Replacement of characters outside ASCII."""
    mapped: mmap.mmap | None = None
    """Mapping that `ids` points into, for a text that is too long for memory; else None."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the ids in hexadecimal; a resumed run compares it to notice a changed text."""
        digest = hashlib.sha256()
        for start in range(0, len(self.ids), _BLOCK_BYTES):
            digest.update(self.ids[start : start + _BLOCK_BYTES].data)
            # Keep the memory of a mapped text at one block.
            self.release_pages()
        return digest.hexdigest()

    def release_pages(self) -> None:
        """Release the memory of a mapped text's pages, which would otherwise grow to the size of the file."""
        # The pages are clean, so the kernel just drops them and reads them again from the file when needed.
        # Platforms without MADV_DONTNEED leave this to the kernel.
        if self.mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)


def check_unknown(name: str, tally: Tally, notify: Notify, *, reject: bool = True) -> None:
    """Reject a text of mostly unknown characters, and warn about one with many of them.

    Args:
        name: name of the text, for messages.
        tally: counts of the text, or of its beginning.
        notify: receives the warning.
        reject: whether to reject; False only warns.

    Raises:
        DataError: more than half of the characters are unknown.
    """
    # Two thresholds: above the higher one training is pointless, above the lower one the loss misleads.
    share = tally.unknown_share
    if reject and share > MAX_UNKNOWN_SHARE:
        raise DataError(
            f"{name}: {share:.0%} of its characters are unknown ({list_commonest(tally.unknown)}), so there is hardly anything "
            "to learn; the model knows ASCII and the characters that fold to it, and --transliterate writes other scripts in "
            "Latin letters (docs/texts.md)"
        )
    if share > WARN_UNKNOWN_SHARE:
        notify(
            f"warning: {name}: {share:.1%} of its characters are unknown and read as <?>; the loss comes out too low, as <?> is "
            "easy to predict, and generated text goes astray where <?> would come next, as it is never sampled"
        )


def read_texts(
    paths: Sequence[str], *, name: str, scratch: Path = Path(), fold: Fold = True, notify: Notify = say_nothing
) -> Corpus:
    """Read text files, folders of texts (`picogpt.data.paths`) and stdin (`-`), in whatever encoding (`picogpt.encodings`).

    Byte order marks are dropped, line ends become newlines, and texts are joined by a newline.

    Args:
        paths: files, folders, or `-` for stdin.
        name: name of the corpus.
        scratch: folder for the ids of a text longer than `MAX_CHARS_IN_MEMORY`.
        fold: replacement of characters outside ASCII.
        notify: receives lines about the files found or skipped, and about encodings other than UTF-8.

    Raises:
        DataError: a path is missing or unreadable, a folder contains no text, a file is not text, all text is empty, or the
            disk has no space for the ids of a long text.
    """
    # Encoding is lazy: a block is read, decoded and encoded when the loop below asks for it.
    encoder = TextEncoder(fold=fold)
    blocks = _encoded(find_files(paths, notify), encoder, notify)
    parts: list[Ids] = []
    # Collect blocks in memory; a text that outgrows the limit continues in a file (the else branch).
    while sum(map(len, parts)) <= MAX_CHARS_IN_MEMORY:
        ids = next(blocks, None)
        if ids is None:
            break
        parts.append(ids)
    else:
        # The blocks so far go first, then the rest of the stream.
        mapped = _memory_map(itertools.chain(parts, blocks), scratch)
        return Corpus(name=name, ids=np.frombuffer(mapped, np.uint8), tally=encoder.tally, fold=fold, mapped=mapped)
    # Empty files produce no blocks at all.
    if not parts:
        raise DataError(f"{' '.join(paths)}: no text in it; give a file with at least a few thousand characters")
    return Corpus(name=name, ids=np.concatenate(parts), tally=encoder.tally, fold=fold)


def _encoded(files: Sequence[str], encoder: TextEncoder, notify: Notify) -> Iterator[Ids]:
    """Yield the ids of all texts, block by block."""
    for i, path in enumerate(files):
        # Every file but the first starts with a newline, so that words do not run together.
        blocks = _blocks(path, notify)
        yield from map(encoder.encode, blocks if i == 0 else _after_newline(blocks))


def _memory_map(blocks: Iterable[Ids], scratch: Path) -> mmap.mmap:
    """Write ids to an unnamed file in `scratch`, and map it into memory."""
    try:
        # The file has no name, so it vanishes with the process, even after a kill; the mapping outlives `stream`.
        with unnamed_file(scratch, (ids.tobytes() for ids in blocks)) as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(
            f"{scratch.absolute()}: no space for the ids of a long text, 1 byte each ({error.strerror or error}); free "
            "some, or choose another --logs-dir"
        ) from error


def _after_newline(blocks: Iterator[str]) -> Iterator[str]:
    """Prefix a newline to a text that is not empty."""
    for i, block in enumerate(blocks):
        yield "\n" + block if i == 0 else block


def _blocks(path: str, notify: Notify) -> Iterator[str]:
    """Yield the text of one file in blocks."""
    try:
        with _open(path) as stream:
            # The encoding is detected per file.
            yield from decode_stream(stream, name=path, notify=notify, block_bytes=_BLOCK_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path of --text") from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """Open a file or stdin as bytes; stdin stays open afterwards."""
    if path != STDIN:
        with Path(path).open("rb") as stream:
            yield stream
        return
    # Python sets sys.stdin to None if the descriptor was closed at the start.
    if sys.stdin is None:
        raise DataError("--text -: standard input is closed; pipe a text in, or name a file")
    # The bytes below the text layer, so that stdin is decoded like any file.
    yield sys.stdin.buffer
