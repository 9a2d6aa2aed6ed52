"""Reading of texts (files, folders, stdin) into one array of token ids, block by block.

One character is one id, of one byte or two. A text that is too long for memory is written to an unnamed file and memory-mapped.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import mmap
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.config import Fold
from picogpt.data.alphabets import Counts, TextCharacters, count_characters
from picogpt.data.paths import STDIN, find_files
from picogpt.encodings import decode_stream
from picogpt.errors import DataError
from picogpt.files import unnamed_file
from picogpt.folding import N_CODE_POINTS, to_code_points
from picogpt.ids import Ids, id_dtype
from picogpt.tokenizer import Tally, TextEncoder, list_commonest
from picogpt.wording import Notify, plural, say_nothing

__all__ = ["Corpus", "check_unknown", "read_texts", "require_piped_text"]

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
    ids: Ids
    """Token ids of the whole text, shape (characters,)."""
    tally: Tally = field(default_factory=Tally)
    """Counts of the characters that encoding changed."""
    fold: Fold = True
    """Replacement of characters outside the alphabet."""
    alphabet: Alphabet = PICOGPT
    """The characters that `ids` stand for."""
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


def check_unknown(name: str, tally: Tally, notify: Notify, *, alphabet: Alphabet = PICOGPT, reject: bool = True) -> None:
    """Reject a text of mostly unknown characters, and warn about one with many of them.

    Args:
        name: name of the text, for messages.
        tally: counts of the text, or of its beginning.
        notify: receives the warning.
        alphabet: the model's alphabet.
        reject: whether to reject; False only warns.

    Raises:
        DataError: more than half of the characters are unknown.
    """
    # Two thresholds: above the higher one training is pointless, above the lower one the loss misleads.
    share = tally.unknown_share
    if reject and share > MAX_UNKNOWN_SHARE:
        known = "ASCII and the characters that fold to it" if alphabet == PICOGPT else f"the alphabet {alphabet.describe()}"
        raise DataError(
            f"{name}: {share:.0%} of its characters are unknown ({list_commonest(tally.unknown)}), so there is hardly anything "
            f"to learn; the model knows {known}. Use --alphabet text for the text's own characters, or --transliterate to write "
            "other scripts in Latin letters (docs/texts.md)"
        )
    if share > WARN_UNKNOWN_SHARE:
        notify(
            f"warning: {name}: {share:.1%} of its characters are unknown and read as <?>; the loss comes out too low, as <?> is "
            "easy to predict, and generated text goes astray where <?> would come next, as it is never sampled"
        )


def read_texts(
    paths: Sequence[str],
    *,
    name: str,
    scratch: Path = Path(),
    fold: Fold = True,
    alphabet: Alphabet | None = PICOGPT,
    notify: Notify = say_nothing,
) -> Corpus:
    """Read text files, folders of texts (`picogpt.data.paths`) and stdin (`-`), in whatever encoding (`picogpt.encodings`).

    Byte order marks are dropped, line ends become newlines, and texts are joined by a newline.

    Args:
        paths: files, folders, or `-` for stdin.
        name: name of the corpus.
        scratch: folder for the ids of a text longer than `MAX_CHARS_IN_MEMORY`.
        fold: replacement of characters outside the alphabet.
        alphabet: the characters to know; None takes the text's own (`TextCharacters`), for which it is read twice.
        notify: receives lines about the files found or skipped, about encodings other than UTF-8, and the text's own alphabet.

    Raises:
        DataError: a path is missing or unreadable, a folder contains no text, a file is not text, all text is empty, or the
            disk has no space for the ids of a long text.
    """
    files = find_files(paths, notify)
    with contextlib.ExitStack() as stack:
        copies: dict[str, BinaryIO] = {}
        if alphabet is None:
            # What is no regular file, such as standard input or a named pipe, can be read only once.
            copies = {path: stack.enter_context(_copy(path)) for path in files if not _is_rereadable(path)}
            chosen = TextCharacters.of(_count(files, copies))
            alphabet = chosen.alphabet
            notify(f"{name}: {chosen.describe()}")
        # Encoding is lazy: a block is read, decoded and encoded when it is asked for.
        encoder = TextEncoder(fold=fold, alphabet=alphabet)
        ids, mapped = _collect(_encoded(files, encoder, notify, copies), id_dtype(alphabet.vocab_size), scratch)
    # Empty files produce no blocks at all.
    if not len(ids):
        raise DataError(f"{' '.join(paths)}: no text in it; give a file with at least a few thousand characters")
    return Corpus(name=name, ids=ids, tally=encoder.tally, fold=fold, alphabet=alphabet, mapped=mapped)


def _is_rereadable(path: str) -> bool:
    # A missing file is reported by its reader.
    return path != STDIN and (Path(path).is_file() or not Path(path).exists())


@contextlib.contextmanager
def _copy(path: str) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as copy, _open(path) as stream:
        shutil.copyfileobj(stream, copy)
        yield copy


def _count(files: Sequence[str], copies: Mapping[str, BinaryIO]) -> Counts:
    """Count the characters of all files."""
    counts = np.zeros(N_CODE_POINTS, np.int64)
    for path in files:
        for block in _blocks(path, say_nothing, copies):  # notices come when the file is read again
            counts += count_characters(to_code_points(block))
    return counts


def _collect(blocks: Iterator[Ids], dtype: np.dtype[Any], scratch: Path) -> tuple[Ids, mmap.mmap | None]:
    """Join blocks of ids, in memory or in a file, whose mapping is returned too."""
    parts: list[Ids] = []
    # Collect blocks in memory; a text that outgrows the limit continues in a file (the else branch).
    while sum(map(len, parts)) <= MAX_CHARS_IN_MEMORY:
        ids = next(blocks, None)
        if ids is None:
            break
        parts.append(ids)
    else:
        # The blocks so far go first, then the rest of the stream.
        mapped = _memory_map(itertools.chain(parts, blocks), plural(dtype.itemsize, "byte"), scratch)
        return np.frombuffer(mapped, dtype), mapped
    return np.concatenate([np.zeros(0, dtype), *parts]), None


def _encoded(files: Sequence[str], encoder: TextEncoder, notify: Notify, copies: Mapping[str, BinaryIO]) -> Iterator[Ids]:
    """Yield the ids of all texts, block by block."""
    for i, path in enumerate(files):
        # Every file but the first starts with a newline, so that words do not run together.
        blocks = _blocks(path, notify, copies)
        yield from map(encoder.encode, blocks if i == 0 else _after_newline(blocks))


def _memory_map(blocks: Iterable[Ids], size: str, scratch: Path) -> mmap.mmap:
    """Write ids of `size` each to an unnamed file in `scratch`, and map it into memory."""
    try:
        # The file has no name, so it vanishes with the process, even after a kill; the mapping outlives `stream`.
        with unnamed_file(scratch, (ids.tobytes() for ids in blocks)) as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(
            f"{scratch.absolute()}: no space for the ids of a long text, {size} each ({error.strerror or error}); free "
            "some, or choose another --logs-dir"
        ) from error


def _after_newline(blocks: Iterator[str]) -> Iterator[str]:
    """Prefix a newline to a text that is not empty."""
    for i, block in enumerate(blocks):
        yield "\n" + block if i == 0 else block


def _blocks(path: str, notify: Notify, copies: Mapping[str, BinaryIO]) -> Iterator[str]:
    """Yield the text of one file in blocks, from its copy if it has one."""
    try:
        with _open(path, copies.get(path)) as stream:
            # The encoding is detected per file.
            yield from decode_stream(stream, name=path, notify=notify, block_bytes=_BLOCK_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path of --text") from error


def require_piped_text(paths: Sequence[str]) -> None:
    """Check that a run whose text came from standard input gets it again.

    Raises:
        DataError: `paths` has standard input, which is a terminal.
    """
    # Reading would wait for the keyboard without a word.
    if STDIN in paths and sys.stdin is not None and sys.stdin.isatty():
        raise DataError("the run's text came from standard input: pipe the same text in again, with --text -")


@contextlib.contextmanager
def _open(path: str, copy: BinaryIO | None = None) -> Iterator[BinaryIO]:
    """Open a file or stdin as bytes, or rewind its copy; stdin and the copy stay open afterwards."""
    if copy is not None:
        copy.seek(0)
        yield copy
        return
    if path != STDIN:
        with Path(path).open("rb") as stream:
            yield stream
        return
    # Python sets sys.stdin to None if the descriptor was closed at the start.
    if sys.stdin is None:
        raise DataError("--text -: standard input is closed; pipe a text in, or name a file")
    # The bytes below the text layer, so that stdin is decoded like any file.
    yield sys.stdin.buffer
