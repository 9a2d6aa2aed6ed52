"""The files that paths stand for: folders searched for texts, hidden files passed over, each file once."""

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
"""Endings of the files that are read in a folder, in capitals or small letters."""

_BLOCK_BYTES = 1 << 20
_MAX_LISTED = 3


def find_files(paths: Sequence[str], notify: Callable[[str], None]) -> list[str]:
    """The files of `paths` in order: those in folders, to the bottom, in the order of their names; each file once.

    In a folder, hidden files and folders (whose name begins with a dot), links to folders and files with another ending
    than `SUFFIXES` are passed over. A file with the same content as an earlier one would put text for validation into
    training, so it is read once, under whatever names it comes.

    Args:
        paths: files, folders and `-` for standard input. A path that does not exist is left for its reader to report.
        notify: told in a line how many files there are, if that is not plain, what was passed over and what came twice.

    Raises:
        DataError: a folder cannot be read, or holds no text.
    """
    skipped: Counter[str] = Counter()
    found: list[str] = []
    for path in paths:
        if path == STDIN or not Path(path).is_dir():
            found.append(path)
            continue
        before = skipped.copy()
        texts = sorted(_walk(path, skipped))
        if not texts:
            kinds = " or ".join(SUFFIXES)
            ignored = _list_counts(skipped - before)
            raise DataError(f"{path}: the folder holds no {kinds} file{ignored}; give one that does, or the files themselves")
        found += texts
    files, repeated = _drop_duplicates(found)
    if skipped or len(files) > 1:
        notify(f"files to read: {len(files):,}{_list_counts(skipped)}")
    if repeated:
        listed = ", ".join(f"{again} (as {first})" for again, first in repeated[:_MAX_LISTED])
        more = f" and {len(repeated) - _MAX_LISTED:,} more" if len(repeated) > _MAX_LISTED else ""
        notify(f"read once, as the content is the same: {listed}{more}")
    return files


def _walk(folder: str, skipped: Counter[str]) -> Iterator[str]:
    """The texts in `folder` and below it; counts what else there is by its kind."""
    # Links to folders are not followed, so that no loop of them is without end.
    for where, folders, files in os.walk(folder, onerror=_raise_unreadable):
        skipped["hidden"] += sum(name.startswith(".") for name in folders)
        folders[:] = [name for name in folders if not name.startswith(".")]
        skipped["linked"] += sum((Path(where) / name).is_symlink() for name in folders)
        for name in files:
            path = Path(where) / name
            if name.startswith("."):
                skipped["hidden"] += 1
            elif path.suffix.lower() not in SUFFIXES:
                skipped[path.suffix.lower() or "without an ending"] += 1
            elif not path.is_file():
                skipped["no plain file"] += 1
            else:
                yield str(path)


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror or error}); check the path of --text") from error


def _list_counts(counts: Counter[str]) -> str:
    kinds = [f"{count:,} {kind}" for kind, count in (+counts).most_common()]
    return f" (passed over: {', '.join(kinds)})" if kinds else ""


def _drop_duplicates(paths: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """`paths` without those that have the content of an earlier one; and each of these with that earlier one."""
    sizes = [_size(path) for path in paths]
    often = Counter(sizes)
    kept: list[str] = []
    repeated: list[tuple[str, str]] = []
    first_with: dict[str, str] = {}
    for path, size in zip(paths, sizes, strict=True):
        # Only files of one size can be the same. What is no plain file, a pipe, can be read once only, and is known by its name.
        key = path if size is None or often[size] == 1 else _digest(path)
        if key in first_with:
            repeated.append((path, first_with[key]))
        else:
            first_with[key] = path
            kept.append(path)
    return kept, repeated


def _size(path: str) -> int | None:
    """Bytes of a plain file that has some; None for anything else."""
    if path == STDIN:
        return None
    try:
        status = Path(path).stat()
    except OSError:
        return None  # its reader says what is wrong
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_size else None


def _digest(path: str) -> str:
    """SHA-256 of a file's content, or its path where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError:
        return path  # its reader says what is wrong
    return digest.hexdigest()
