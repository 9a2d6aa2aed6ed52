"""Compile a C source into a shared library once; later starts load it from the user's cache folder.

This module knows nothing about the kernels and does not need torch: both training and generation build theirs here.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from picogpt.errors import BuildError
from picogpt.kernels import processor
from picogpt.kernels.cache import LibraryCache, UnusableCacheError

__all__ = ["Compiler", "Library", "find_compilers", "load_library"]

_COMPILERS = ("cc", "gcc", "clang")  # in order of preference
_FORMAT = 1  # part of the cache key; increment it when libraries are built or loaded differently
_TIMEOUT = 60.0  # seconds that a call of the compiler may take


class Library(NamedTuple):
    """A loaded library, and the command that compiled it."""

    functions: ctypes.CDLL
    compiler: str


@dataclass(frozen=True)
class Compiler:
    """A C compiler of this machine."""

    command: tuple[str, ...]
    """The command in CC, with its flags."""
    path: str
    """Path of the program, the command's first word."""

    @cached_property
    def identity(self) -> str:
        """The compiler's resolved path, its flags and its version; the version is empty where the compiler prints none."""
        return "\n".join([os.path.realpath(self.path), *self.command[1:], self._version])

    @cached_property
    def _version(self) -> str:
        try:
            return self.run(["--version"])
        except BuildError:
            return ""  # the same compiler then fails at compiling, with a message

    @property
    def name(self) -> str:
        """The first word of the command, for messages."""
        return self.command[0]

    @property
    def is_clang(self) -> bool:
        """Whether the compiler is a clang, whose OpenMP runtime differs from gcc's."""
        return "clang" in self._version

    def run(self, arguments: Sequence[str]) -> str:
        """Run the compiler; return its stdout.

        Raises:
            BuildError: the compiler cannot be run, takes too long or fails.
        """
        try:
            done = subprocess.run(  # noqa: S603 (the user's own compiler)
                [*self.command, *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT,
                check=False,
                env={**os.environ, "LC_ALL": "C"},  # messages in English: "error" is searched for below
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{self.name} does not run ({error})") from error
        if done.returncode:
            # The first line with "error" says more than the warnings in front of it.
            message = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            message = message or f"exit code {done.returncode}"
            raise BuildError(f"{self.name} fails ({' '.join(message.split())})")
        return done.stdout


@dataclass(frozen=True)
class _Build:
    """A library to build: a source with its settings."""

    source: Path
    defines: tuple[tuple[str, int | str], ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    openmp: bool

    def key(self, compiler: Compiler) -> str:
        """Return the SHA-256 of everything that determines the library's content and where it runs."""
        # Any header in the folder may be included, so all of them count.
        sources = sorted([self.source, *self.source.parent.glob("*.h")])
        # The key has to change whenever the library would; -march=native makes it depend on the processor.
        parts = {
            "format": _FORMAT,
            "sources": [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sources],
            "compile": self.compile_flags(),
            "link": self.link_arguments(compiler),
            "compiler": compiler.identity,
            "processor": processor.identity(),
            "pointer": struct.calcsize("P"),  # 32-bit or 64-bit Python
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def compile_flags(self) -> list[str]:
        # Position-independent code, as for any shared library.
        macros = [f"-D{name}={value}" for name, value in self.defines]
        return [*self.flags, "-fPIC", *["-fopenmp"] * self.openmp, *macros]

    def link_arguments(self, compiler: Compiler) -> list[str]:
        # gcc's code uses the OpenMP runtime that torch has loaded, so none is linked: a second one has its own threads.
        # clang needs its own runtime.
        return ["-shared", *["-fopenmp"] * (self.openmp and compiler.is_clang), *self.link_flags]

    def compile(self, compiler: Compiler, folder: Path) -> Path:
        """Compile and link in `folder`; return the library's path."""
        # Two steps, because -fopenmp has to be given to the compiler but, with gcc, not to the linker.
        compiled, library = folder / f"{self.source.stem}.o", folder / f"{self.source.stem}.so"
        compiler.run([*self.compile_flags(), "-c", str(self.source), "-o", str(compiled)])
        shared, *libraries = self.link_arguments(compiler)
        compiler.run([shared, str(compiled), "-o", str(library), *libraries])
        return library


def load_library(
    source: Path,
    defines: Mapping[str, int | str],
    *,
    flags: Sequence[str],
    link_flags: Sequence[str] = ("-lm",),
    openmp: bool = False,
    notify: Callable[[str], None],
) -> Library:
    """Load the library of a C source compiled for this processor: from the cache, or compiled now and cached.

    The compiler is the one that CC names, or the first of cc, gcc and clang that works.

    Args:
        source: the C file; headers in its folder count as part of it.
        defines: macros.
        flags: compiler flags for optimization and instruction sets.
        link_flags: libraries to link with.
        openmp: whether the source uses OpenMP. gcc's code then needs a process that has loaded gcc's runtime, as torch does.
        notify: receives a line before the library is compiled, which takes a few seconds, and if it cannot be cached.

    Raises:
        BuildError: there is no compiler, or none whose library can be loaded; the message is one line.
    """
    build = _Build(source, tuple(sorted(defines.items())), tuple(flags), tuple(link_flags), openmp)
    # A cache that cannot be used costs a few seconds at each start, and is no reason to fail.
    compilers, cache, obstacle = find_compilers(), None, ""
    try:
        cache = LibraryCache()
        cached = _load_cached(build, compilers, cache)
        if cached is not None:
            return cached
    except UnusableCacheError as error:
        cache, obstacle = None, str(error)
    notify(f"compiling {source.name}, " + (f"at each start: {obstacle}" if obstacle else "once for this machine (a few seconds)"))
    # Try them in order: on some systems cc exists but cannot compile.
    *others, last = compilers
    for compiler in others:
        with contextlib.suppress(BuildError):  # only the last error is reported
            return _compile(build, compiler, cache, notify)
    return _compile(build, last, cache, notify)


def find_compilers() -> list[Compiler]:
    """Return the compiler that CC names, or those of cc, gcc and clang that are installed.

    Raises:
        BuildError: there is none.
    """
    # CC may have flags, as in `ccache gcc` or `clang -O1`.
    try:
        wanted = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise BuildError(f"CC is not a command ({error})") from error
    # A user who sets CC wants that compiler and no other.
    names = wanted[:1] or list(_COMPILERS)
    found = [(name, shutil.which(name)) for name in names]
    compilers = [Compiler((name, *wanted[1:]), path) for name, path in found if path]
    if not compilers:
        raise BuildError(f"no C compiler ({', '.join(names)}, by PATH or CC)")
    return compilers


def _load_cached(build: _Build, compilers: Sequence[Compiler], cache: LibraryCache) -> Library | None:
    """Return the library from the cache, built by any of the compilers, or None."""
    # Any of them will do: a compiler that failed at the first start must not be tried again at each start.
    for compiler in compilers:
        path = cache.find(build.source.stem, build.key(compiler))
        if path is not None:
            try:
                return Library(ctypes.CDLL(str(path)), compiler.name)
            except OSError as error:  # such as a disk mounted noexec
                raise UnusableCacheError(f"{path} cannot be loaded ({error})") from error
    return None


def _load(path: Path, compiler: Compiler) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"what {compiler.name} makes cannot be loaded ({error}; TMPDIR may name another folder)") from error


def _compile(build: _Build, compiler: Compiler, cache: LibraryCache | None, notify: Callable[[str], None]) -> Library:
    """Compile in a private temporary folder, load the library and store it in the cache."""
    try:
        # Windows cannot remove a loaded library: such a file is left to the system's cleanup of temporary files.
        temporary = tempfile.TemporaryDirectory(prefix="picogpt-", ignore_cleanup_errors=True)
    except OSError as error:
        raise BuildError(f"there is no temporary folder ({error})") from error
    # Before compiling: the sources may change meanwhile, as at a git pull, and the old library must not get the new key.
    key = build.key(compiler)
    with temporary as folder:
        path = build.compile(compiler, Path(folder))
        # Loaded before it is stored, so that the cache holds only libraries that load.
        functions = _load(path, compiler)
        if cache is not None and build.key(compiler) == key:
            try:
                cache.store(build.source.stem, key, path.read_bytes())
            except UnusableCacheError as error:  # the disk may be full; the loaded library works all the same
                notify(f"{build.source.name} will be compiled again at the next start: {error}")
        return Library(functions, compiler.name)
