"""Expansion of paths into text files: folders are searched, hidden files skipped, and duplicates dropped."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from picogpt.errors import DataError

__all__ = ["STDIN", "SUFFIXES", "find_files"]

STDIN = "-"
"""The path that means standard input."""
SUFFIXES = (".txt", ".md")
"""Suffixes of the files read in a folder, case-insensitive."""

_BLOCK_BYTES = 1 << 20
_MAX_LISTED = 3


def find_files(paths: Sequence[str], notify: Callable[[str], None]) -> list[str]:
    """List the files of `paths` in order, folders expanded recursively and sorted by name, each content once.

    Inside a folder, hidden files and folders (name starts with a dot), links to folders and files with other suffixes than
    `SUFFIXES` are skipped. Files with equal content are read once: a duplicate would leak validation text into training.

    Args:
        paths: files, folders and `-` for standard input. A missing path is reported later, by its reader.
        notify: receives lines about the number of files, skipped files and duplicates.

    Raises:
        DataError: a path is empty, or a folder cannot be read or contains no text.
    """
    if "" in paths:  # as from a variable that is not set; pathlib takes it for the current folder
        raise DataError("the path of a text is empty; name a file or a folder, or . for this one")
    skipped: Counter[str] = Counter()
    found: list[str] = []
    for path in paths:
        if path == STDIN or not Path(path).is_dir():
            found.append(path)
            continue
        # Remember the counts, so that an error lists only the files skipped in this folder.
        before = skipped.copy()
        # Sorted, as the order in which os.walk lists files depends on the file system.
        texts = sorted(_walk(path, skipped))
        if not texts:
            kinds = " or ".join(SUFFIXES)
            ignored = _list_counts(skipped - before)
            raise DataError(f"{path}: the folder has no {kinds} file{ignored}; name another folder, or the files themselves")
        found += texts
    # Across all paths, as a file can be named twice or lie in two folders.
    files, repeated = _drop_duplicates(found)
    # A single file needs no announcement.
    if skipped or len(files) > 1:
        notify(f"files to read: {len(files):,}{_list_counts(skipped)}")
    if repeated:
        listed = ", ".join(f"{again} (same as {first})" for again, first in repeated[:_MAX_LISTED])
        more = f" and {len(repeated) - _MAX_LISTED:,} more" if len(repeated) > _MAX_LISTED else ""
        notify(f"duplicates, read once: {listed}{more}")
    return files


def _walk(folder: str, skipped: Counter[str]) -> Iterator[str]:
    """Yield the text files in `folder` and below, and count everything else in `skipped` by kind."""
    # os.walk does not follow links to folders by default, which could form endless loops.
    for where, folders, files in os.walk(folder, onerror=_raise_unreadable):
        skipped["hidden"] += sum(name.startswith(".") for name in folders)
        # Assigning to the slice keeps os.walk out of hidden folders.
        folders[:] = [name for name in folders if not name.startswith(".")]
        skipped["linked"] += sum((Path(where) / name).is_symlink() for name in folders)
        for name in files:
            path = Path(where) / name
            if name.startswith("."):
                skipped["hidden"] += 1
            elif path.suffix.lower() not in SUFFIXES:
                skipped[path.suffix.lower() or "without a suffix"] += 1
            elif not path.is_file():
                skipped["not a regular file"] += 1  # a broken link, a socket, a pipe
            else:
                yield str(path)


def _raise_unreadable(error: OSError) -> None:
    """Raise errors of os.walk, which ignores them by default."""
    raise DataError(f"{error.filename}: cannot be read ({error.strerror or error}); check the path of --text") from error


def _list_counts(counts: Counter[str]) -> str:
    """Format counts as ` (skipped: 2 .pdf, 1 hidden)`, or as nothing if all are zero."""
    # Unary plus drops the kinds whose count is zero.
    kinds = [f"{count:,} {kind}" for kind, count in (+counts).most_common()]
    return f" (skipped: {', '.join(kinds)})" if kinds else ""


def _drop_duplicates(paths: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Drop files whose content equals that of an earlier one; also return each dropped file with that earlier one."""
    sizes = [_size(path) for path in paths]
    often = Counter(sizes)
    kept: list[str] = []
    repeated: list[tuple[str, str]] = []
    first_with: dict[str, str] = {}
    for path, size in zip(paths, sizes, strict=True):
        # Hash only files that share their size with another one. Pipes can be read only once, so they are compared by name.
        key = path if size is None or often[size] == 1 else _digest(path)
        if key in first_with:
            repeated.append((path, first_with[key]))
        else:
            first_with[key] = path
            kept.append(path)
    return kept, repeated


def _size(path: str) -> int | None:
    """Return the size of a regular, non-empty file; None for anything else."""
    if path == STDIN:
        return None
    try:
        status = Path(path).stat()
    except OSError:
        return None  # reported by its reader
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_size else None


def _digest(path: str) -> str:
    """Return the SHA-256 of a file's content, or its path if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError:
        return path  # reported by its reader
    return digest.hexdigest()
