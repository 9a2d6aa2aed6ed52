"""The user's cache folder for compiled libraries. Only files that this user has stored, complete and unchanged, are loaded.

A library runs as code, so a folder is used only if nobody else can write to it, and a file only if its content has the checksum
in its name, NAME-KEY-CHECKSUM.so. Files are stored by an atomic rename, so concurrent starts do not disturb each other.
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

_KEPT = 24  # libraries to keep: one is some 100 KB, and each model shape has one for each dtype
_DIGITS = 40  # hexadecimal digits of a SHA-256 in a name: two whole hashes are too long for some file systems
_LEFTOVER = 3600.0  # age in seconds from which a temporary file counts as abandoned


class UnusableCacheError(Exception):
    """The cache folder cannot be used; the message says which folder and why."""


def user_cache_folder() -> Path:
    """Return the user's cache folder: XDG_CACHE_HOME, or the platform's default.

    Raises:
        UnusableCacheError: the user has no home folder.
    """
    # Its specification says to ignore a relative path.
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named
    try:
        if sys.platform == "win32":
            # The local folder: the roaming one is copied to other machines, whose processors differ.
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    except RuntimeError as error:  # neither HOME nor an entry in the user database
        raise UnusableCacheError(f"no home folder ({error})") from error


class LibraryCache:
    """Compiled libraries by key, in a folder that only this user can write to.

    Raises:
        UnusableCacheError: the folder cannot be created, or others can write to it or to a folder above it.
    """

    def __init__(self) -> None:
        # Symbolic links are resolved once, before the checks: a link that is changed later has no effect.
        base = user_cache_folder().resolve()
        self.folder = base / "picogpt" / "kernels"
        try:
            for folder in (self.folder.parent, self.folder):
                # Closed to others from the start; a folder that exists already is checked and closed.
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _make_private(folder)
            # Private folders are not enough: whoever can rename a parent can put another tree in its place.
            _check_parents(base)
        except OSError as error:
            raise UnusableCacheError(f"{self.folder} cannot be used ({error.strerror or error})") from error

    def find(self, name: str, key: str) -> Path | None:
        """Return a complete library that was stored under this key, or None; remove damaged ones."""
        for path in self._entries(f"{name}-{key[:_DIGITS]}-*.so"):
            # A concurrent start may have removed the file, or it is damaged on a read-only disk: then it is compiled again.
            with contextlib.suppress(OSError):
                if _is_own_file(path) and path.stem.endswith(_checksum(path.read_bytes())):
                    _mark_used(path)
                    return path
                path.unlink()  # wrong checksum or owner
        return None

    def store(self, name: str, key: str, library: bytes) -> Path:
        """Store a library under a key, and remove the least recently used ones.

        Raises:
            UnusableCacheError: the disk is full or read-only.
        """
        # The checksum in the name detects a truncated or damaged file at loading, where it would crash the process.
        path = self.folder / f"{name}-{key[:_DIGITS]}-{_checksum(library)}.so"
        try:
            atomic_write(path, library)
        except OSError as error:
            raise UnusableCacheError(f"{path} cannot be written ({error.strerror or error})") from error
        self._prune()
        return path

    def _entries(self, pattern: str) -> list[Path]:
        """Return files in the folder, most recently used first."""
        # The modification time is the time of the last use: access times are switched off on many systems.
        return sorted(self.folder.glob(pattern), key=_last_used, reverse=True)

    def _prune(self) -> None:
        """Remove all but the most recently used libraries, and temporary files of killed starts."""
        leftovers = [path for path in self.folder.glob(f".*{TEMPORARY_SUFFIX}") if time.time() - _last_used(path) > _LEFTOVER]
        for path in (*self._entries("*.so")[_KEPT:], *leftovers):
            with contextlib.suppress(OSError):  # removed by a concurrent start, or loaded there (Windows)
                path.unlink()


def _mark_used(path: Path) -> None:
    with contextlib.suppress(OSError):  # a read-only disk, as in a container image with prebuilt kernels
        os.utime(path)


def _last_used(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:  # removed by a concurrent start
        return 0.0


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


if sys.platform == "win32":

    def _make_private(folder: Path) -> None:
        """Do nothing: the system's access lists close a user's folders to others."""

    def _check_parents(folder: Path) -> None:
        """Do nothing: the access lists also cover the folders above."""

    def _is_own_file(path: Path) -> bool:
        return path.is_file() and not path.is_symlink()

else:
    import grp
    import pwd

    def _make_private(folder: Path) -> None:
        """Close a folder to other users, or raise `UnusableCacheError` if others could write to it until now."""
        # lstat, not stat: a link could point to a folder that someone else controls.
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode):
            raise UnusableCacheError(f"{folder} is a link")
        if state.st_uid != os.geteuid():
            raise UnusableCacheError(f"{folder} belongs to another user")
        # Closing it now would be too late: a library may have been planted before.
        if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UnusableCacheError(f"others can write to {folder}")
        if stat.S_IMODE(state.st_mode) != 0o700:
            folder.chmod(0o700)

    def _check_parents(folder: Path) -> None:
        """Raise `UnusableCacheError` if others can replace a folder on the path by one of their own."""
        for parent in (folder, *folder.parents):
            state = parent.stat()
            if state.st_uid not in {0, os.geteuid()}:
                raise UnusableCacheError(f"{parent} belongs to another user")
            # A private group has one member, so its write permission gives nothing to others.
            shared = state.st_mode & stat.S_IWOTH or (state.st_mode & stat.S_IWGRP and not _is_private_group(state.st_gid))
            # With the sticky bit, as on /tmp, only the owner can rename a folder.
            if shared and not state.st_mode & stat.S_ISVTX:
                raise UnusableCacheError(f"others can write to {parent}")

    def _is_private_group(group: int) -> bool:
        """Whether a group is the user's private group, named after the user as on Debian and Fedora."""
        try:
            return group == os.getegid() and grp.getgrgid(group).gr_name == pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:  # a container may run as a user that has no entry
            return False

    def _is_own_file(path: Path) -> bool:
        state = path.lstat()
        others_write = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        return stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid() and not others_write
