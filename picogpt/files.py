"""The one place that writes files: whole or not at all.

A file is written beside its target under a name of its own, flushed to the disk and renamed over the target, and the
folder is flushed too. Whoever reads the target, at whatever instant the power goes, finds the old content or the new.

Some network and FUSE file systems cannot flush, above all not a folder. Files are written there without it, which weakens the
promise; `can_flush` tells, so that a run can say so once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

__all__ = [
    "TEMPORARY_SUFFIX",
    "atomic_folder",
    "atomic_write",
    "can_flush",
    "existing_folder",
    "remove_leftovers",
    "replace",
    "sync_folder",
    "unnamed_file",
]

TEMPORARY_SUFFIX = ".part"

_CANNOT_FLUSH = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""Errors of `fsync` that say that the file system has no such thing; a full or broken disk gives others."""


def atomic_write(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Put `content`, bytes or chunks of bytes, at `path`: entirely, or not at all.

    Raises:
        OSError: the disk is full, read-only or broken; `path`, which the error names, is as it was and nothing is left beside it.
    """
    chunks = (content,) if isinstance(content, bytes) else content
    with _telling_need(content), _temporary_file(path) as (descriptor, temporary):
        for chunk in chunks:
            _write_all(descriptor, chunk, path)
        _flush(descriptor, path)
        replace(temporary, path)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `path` at the end; where the body fails, nothing is left of it.

    Args:
        path: a free name, or an empty folder.

    Raises:
        OSError: the disk is full, read-only or broken, or `path` is a file or a folder that holds something.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
    with _naming(path):
        os.mkdir(temporary)
    try:
        yield temporary
        sync_folder(temporary)
        replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _telling_need(content: bytes | Iterable[bytes]) -> Iterator[None]:
    """Add to the error of a full disk how much space the file needs."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT} and isinstance(content, bytes):
            error.strerror = f"{error.strerror}, the file needs {len(content) / 1e6:,.1f} MB"
        raise


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[int, Path]]:
    """Open a new file in the folder of `path`; close it, and remove it unless it has been renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
    # O_EXCL makes a new file and follows no link that somebody has put there.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        yield descriptor, temporary
    finally:
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _write_all(descriptor: int, chunk: bytes, path: Path) -> None:
    view = memoryview(chunk)
    while view:
        with _naming(path):
            written = os.write(descriptor, view)
        view = view[written:]


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add to an error of a call that knows only a descriptor which file it is about."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _flush(descriptor: int, path: Path) -> bool:
    """Flush a file or folder to the disk; False where the file system cannot."""
    try:
        with _naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
        return False
    return True


def unnamed_file(folder: Path, chunks: Iterable[bytes]) -> IO[bytes]:
    """A file in `folder` that holds `chunks` and has no name: it goes with the process, however that ends.

    Raises:
        OSError: the disk is full, read-only or broken; nothing is left on it. Likewise what `chunks` raises.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        for chunk in chunks:
            stream.write(chunk)
        stream.flush()
        stack.pop_all()
    return stream


def existing_folder(path: Path) -> Path:
    """`path`, or as much of it as is there, as an absolute path to a folder."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def replace(source: Path, target: Path) -> None:
    """Rename `source` over `target` and flush their folder, so that the new name survives a power loss."""
    os.replace(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> bool:
    """Flush the folder's list of names to the disk; False where the file system cannot.

    Windows cannot open a folder; its file systems keep a journal of names themselves.
    """
    if os.name == "nt":
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return _flush(descriptor, folder)
    finally:
        os.close(descriptor)


def can_flush(folder: Path) -> bool:
    """Whether the file system of `folder` can flush files and folders, so that a power failure loses nothing that was saved."""
    with tempfile.TemporaryFile(dir=folder) as stream:
        return _flush(stream.fileno(), folder) and sync_folder(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left in `folder`."""
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
