"""The user's cache folder for compiled libraries: what is loaded from it was put there by this user, whole and unchanged.

A library runs as code, so a folder is used only if nobody else can write to it, and a file only if its content has the checksum
in its name, NAME-KEY-CHECKSUM.so. One rename puts it there, so starts at the same time do not disturb each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import time
from pathlib import Path

from picogpt.files import TEMPORARY_SUFFIX, atomic_write

__all__ = ["LibraryCache", "UnusableCacheError", "user_cache_folder"]

_KEPT = 24
"""Libraries that stay when a new one is stored; one is some 100 KB, and a model's shape has one for each number type."""
_DIGITS = 40
"""Of a SHA-256 in a name; two whole ones make a name that some file systems do not take."""
_LEFTOVER = 3600.0
"""Seconds after which a file that is being written has been given up."""


class UnusableCacheError(Exception):
    """The cache folder cannot be used; the message says which folder and why."""


def user_cache_folder() -> Path:
    """Where this system keeps what a user's programs can make again: XDG_CACHE_HOME, or the platform's own place.

    Raises:
        UnusableCacheError: the user has no home folder.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named
    try:
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    except RuntimeError as error:
        raise UnusableCacheError(f"no home folder ({error})") from error


class LibraryCache:
    """Compiled libraries by key, in a folder of this user's alone.

    Raises:
        UnusableCacheError: the folder cannot be made, or others can write where it is.
    """

    def __init__(self) -> None:
        # Links on the way are followed once, before anything is checked: one that is changed later has no effect.
        base = user_cache_folder().resolve()
        self.folder = base / "picogpt" / "kernels"
        try:
            for folder in (self.folder.parent, self.folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _make_private(folder)
            _check_parents(base)
        except OSError as error:
            raise UnusableCacheError(f"{self.folder} cannot be used ({error.strerror or error})") from error

    def find(self, name: str, key: str) -> Path | None:
        """A whole library that was stored under this key; damaged ones are removed."""
        for path in self._entries(f"{name}-{key[:_DIGITS]}-*.so"):
            # Another start has removed it, or it is damaged on a read-only disk: then it is compiled again.
            with contextlib.suppress(OSError):
                if _is_own_file(path) and path.stem.endswith(_checksum(path.read_bytes())):
                    _mark_used(path)
                    return path
                path.unlink()
        return None

    def store(self, name: str, key: str, library: bytes) -> Path:
        """Keep a library under a key, and remove those that have not been used for longest.

        Raises:
            UnusableCacheError: the disk is full or read-only.
        """
        path = self.folder / f"{name}-{key[:_DIGITS]}-{_checksum(library)}.so"
        try:
            atomic_write(path, library)
        except OSError as error:
            raise UnusableCacheError(f"{path} cannot be written ({error.strerror or error})") from error
        self._prune()
        return path

    def _entries(self, pattern: str) -> list[Path]:
        """Files in the folder, the last used one first."""
        return sorted(self.folder.glob(pattern), key=_last_used, reverse=True)

    def _prune(self) -> None:
        """Remove libraries beyond the newest, and what starts that were killed have left."""
        leftovers = [path for path in self.folder.glob(f".*{TEMPORARY_SUFFIX}") if time.time() - _last_used(path) > _LEFTOVER]
        for path in (*self._entries("*.so")[_KEPT:], *leftovers):
            with contextlib.suppress(OSError):  # removed by another start, or locked by one that has it loaded (Windows)
                path.unlink()


def _mark_used(path: Path) -> None:
    with contextlib.suppress(OSError):  # a disk that is read-only, as in a container image that comes with the kernels
        os.utime(path)


def _last_used(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


if sys.platform == "win32":

    def _make_private(folder: Path) -> None:
        """A user's own folders are closed to others by the system's access lists."""

    def _check_parents(folder: Path) -> None:
        """The same holds for the folder that they are in."""

    def _is_own_file(path: Path) -> bool:
        return path.is_file() and not path.is_symlink()

else:
    import grp
    import pwd

    def _make_private(folder: Path) -> None:
        """Close a folder to others, or raise `UnusableCacheError` where they may have been before."""
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode):
            raise UnusableCacheError(f"{folder} is a link")
        if state.st_uid != os.geteuid():
            raise UnusableCacheError(f"{folder} belongs to another user")
        if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UnusableCacheError(f"others can write to {folder}")
        if stat.S_IMODE(state.st_mode) != 0o700:
            folder.chmod(0o700)

    def _check_parents(folder: Path) -> None:
        """Raise `UnusableCacheError` where others can rename a folder on the way, and put their own in its place."""
        for parent in (folder, *folder.parents):
            state = parent.stat()
            if state.st_uid not in {0, os.geteuid()}:
                raise UnusableCacheError(f"{parent} belongs to another user")
            shared = state.st_mode & stat.S_IWOTH or (state.st_mode & stat.S_IWGRP and not _is_private_group(state.st_gid))
            if shared and not state.st_mode & stat.S_ISVTX:
                raise UnusableCacheError(f"others can write to {parent}")

    def _is_private_group(group: int) -> bool:
        """Whether a group is named after this user, as on systems where each user has one of their own."""
        try:
            return group == os.getegid() and grp.getgrgid(group).gr_name == pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:
            return False

    def _is_own_file(path: Path) -> bool:
        state = path.lstat()
        others_write = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        return stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid() and not others_write
