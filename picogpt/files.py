"""Atomic file writes, for all files that the package writes.

A file is written under a temporary name next to its target, flushed to the disk and renamed over the target; then the folder is
flushed. A reader finds the complete old content or the complete new content, even after a power failure at any moment.

Some network and FUSE file systems cannot flush, least of all folders. Files are written there without flushing, which a power
failure may undo; `can_flush` detects such a file system, so that a run can warn once.
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

TEMPORARY_SUFFIX = ".part"  # with a dot in front of the name, so that listings hide the file

# Errors of fsync on file systems that do not support it; a full or broken disk gives others.
_CANNOT_FLUSH = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


def atomic_write(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write `content`, bytes or chunks of bytes, to `path`: completely or not at all.

    Raises:
        OSError: the disk is full, read-only or broken. The error names `path`, which is unchanged; no temporary file is left.
    """
    chunks = (content,) if isinstance(content, bytes) else content
    with _telling_need(content), _temporary_file(path) as (descriptor, temporary):
        for chunk in chunks:
            _write_all(descriptor, chunk, path)
        # Before the rename: otherwise a power failure could leave the new name with old or empty content.
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
        temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _telling_need(content: bytes | Iterable[bytes]) -> Iterator[None]:
    """Add the size of the file to the error of a full disk."""
    try:
        yield
    except OSError as error:
        # Chunks are produced while they are written, so their size is unknown.
        if error.errno in {errno.ENOSPC, errno.EDQUOT} and isinstance(content, bytes):
            error.strerror = f"{error.strerror}, the file needs {len(content) / 1e6:,.1f} MB"
        raise


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[int, Path]]:
    """Create a file in the folder of `path`; close it at the end, and remove it unless it has been renamed."""
    # In the same folder, as a rename works only within a file system; with a random part, as two processes may write at a time.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
    # O_EXCL fails if the file exists, and follows no symbolic link that someone has put there.
    with _naming(path):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        yield descriptor, temporary
    finally:
        os.close(descriptor)  # Windows cannot remove an open file
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _write_all(descriptor: int, chunk: bytes, path: Path) -> None:
    view = memoryview(chunk)  # slices without copying
    # A single call may write less than it was given; 2 GB is the limit on Linux.
    while view:
        with _naming(path):
            written = os.write(descriptor, view)
        view = view[written:]


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file that the caller means in an error of a call that has a descriptor or a temporary name."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _flush(descriptor: int, path: Path) -> bool:
    """Flush a file or folder to the disk; return False if the file system does not support it."""
    try:
        with _naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
        return False
    return True


def unnamed_file(folder: Path, chunks: Iterable[bytes]) -> IO[bytes]:
    """Write `chunks` to a file without a name in `folder`: the system frees it with the process, however that ends.

    Raises:
        OSError: the disk is full, read-only or broken; nothing is left on it. Exceptions of `chunks` propagate.
    """
    # The exit stack closes the file if anything fails; on success the caller has to.
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        for chunk in chunks:
            stream.write(chunk)
        stream.flush()
        stack.pop_all()
    return stream


def existing_folder(path: Path) -> Path:
    """Return the longest part of `path` that exists and is a folder, as an absolute path."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def replace(source: Path, target: Path) -> None:
    """Rename `source` over `target` and flush their folder, so that the new name survives a power loss."""
    os.replace(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> bool:
    """Flush the folder's entries to the disk; return False if the file system does not support it."""
    # Windows cannot open a folder; its file systems journal names themselves.
    if os.name == "nt":
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return _flush(descriptor, folder)
    finally:
        os.close(descriptor)


def can_flush(folder: Path) -> bool:
    """Return whether the file system of `folder` can flush both files and folders."""
    # Tried out, as no system call tells.
    with tempfile.TemporaryFile(dir=folder) as stream:
        return _flush(stream.fileno(), folder) and sync_folder(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left in `folder`."""
    # A process that is killed cannot clean up. The caller holds a lock, so none of these is in use.
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        # rmtree refuses a link to a folder; the link itself is removed below.
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
