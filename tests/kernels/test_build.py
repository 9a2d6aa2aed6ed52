"""Compiling a C source once, and loading what was kept."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from picogpt.errors import BuildError
from picogpt.kernels import cache, processor
from picogpt.kernels.build import Compiler, Library, _Build, load_library
from picogpt.kernels.cache import LibraryCache, UnusableCacheError, user_cache_folder
from tests.conftest import needs_any_compiler
from tests.programs import program

pytestmark = needs_any_compiler


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "home"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A library of one function, which returns a macro plus what its header says."""
    (tmp_path / "plus.h").write_text("#define PLUS 1\n")
    path = tmp_path / "number.c"
    path.write_text('#include "plus.h"\nint number(void) { return NUMBER + PLUS; }\n')
    return path


def load(source: Path, number: int = 41, *flags: str) -> tuple[int, list[str]]:
    """What the library's function returns, and what is said while it is loaded."""
    said: list[str] = []
    library = load_library(source, {"NUMBER": number}, flags=["-O1", *flags], notify=said.append)
    assert isinstance(library, Library)
    return int(library.functions.number()), said


ONCE = ["compiling number.c, once for this machine (a few seconds)"]


def entries(home: Path) -> list[Path]:
    """All that is in the cache."""
    return sorted((home / "picogpt" / "kernels").iterdir())


def test_compiled_once(source: Path, home: Path) -> None:
    """The second start loads what the first has kept, in a folder that is closed to others."""
    assert load(source) == (42, ONCE)
    assert load(source) == (42, [])
    assert len(entries(home)) == 1
    for folder in (home / "picogpt", home / "picogpt" / "kernels"):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_what_makes_another_library(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another macro, flag, source, header, processor, compiler or flag of its own is compiled anew; each is kept."""
    assert load(source) == (42, ONCE)
    assert load(source, 5) == (6, ONCE)
    assert load(source, 41, "-DX=1") == (42, ONCE)
    (source.parent / "plus.h").write_text("#define PLUS 2\n")
    assert load(source) == (43, ONCE)
    source.write_text(source.read_text().replace("NUMBER +", "2 * NUMBER +"))
    assert load(source) == (84, ONCE)
    monkeypatch.setenv("CC", "cc -DY=1")
    assert load(source) == (84, ONCE)
    monkeypatch.setattr(processor, "identity", lambda: "another")
    assert load(source) == (84, ONCE)
    assert load(source) == (84, [])


def test_a_source_that_changes_meanwhile(source: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is not of the sources that now lie there is loaded, and not kept under their key."""
    compiled = _Build.compile

    def change(self: _Build, compiler: Compiler, folder: Path) -> Path:
        path = compiled(self, compiler, folder)
        (source.parent / "plus.h").write_text("#define PLUS 2\n")
        return path

    with monkeypatch.context() as patch:
        patch.setattr(_Build, "compile", change)
        assert load(source) == (42, ONCE)
    assert load(source) == (43, ONCE)


def test_another_version_of_the_compiler(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that has been updated compiles anew."""
    compiler = tmp_path / "compiler"
    monkeypatch.setenv("CC", str(compiler))
    for version in (1, 2):
        compiler.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo {version}; else exec cc "$@"; fi\n')
        compiler.chmod(0o755)
        assert load(source) == (42, ONCE)
        assert load(source) == (42, [])


@pytest.mark.parametrize("damage", ["flipped", "empty", "cut", "link", "writable"])
def test_damaged(damage: str, source: Path, home: Path, tmp_path: Path) -> None:
    """What is not the file that was stored, or that others may have written to, is never loaded, but removed and compiled anew."""
    load(source)
    (path,) = entries(home)
    whole = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(whole[:-1])
    elif damage == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.chmod(0o666)

    assert load(source) == (42, ONCE)
    (path,) = entries(home)
    assert path.read_bytes() == whole
    assert not path.is_symlink()
    assert not path.stat().st_mode & 0o022


def make_unusable(home: Path, how: str) -> str:
    """Have the cache folder be one that cannot be used; return what is said of it."""
    folder = home / "picogpt"
    if how == "a file":
        home.write_text("")
        return f"{folder / 'kernels'} cannot be used (Not a directory)"
    if how == "a link":
        home.mkdir()
        (home / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(home / "elsewhere")
        return f"{folder} is a link"
    folder.mkdir(parents=True)
    (folder if how == "open to others" else home).chmod(0o777)
    return f"others can write to {folder if how == 'open to others' else home}"


@pytest.mark.parametrize("how", ["a file", "a link", "open to others", "in an open folder"])
def test_no_cache(how: str, source: Path, home: Path) -> None:
    """Where a library cannot be kept safely, each start compiles in a folder of its own, and says why."""
    reason = make_unusable(home, how)

    for _ in range(2):
        assert load(source) == (42, [f"compiling number.c, at each start: {reason}"])


def test_another_owner(source: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of another user, which sudo may leave one with, is not used."""
    (home / "picogpt").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)

    assert load(source) == (42, [f"compiling number.c, at each start: {home / 'picogpt'} belongs to another user"])


def test_parents_of_another_owner(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one that lies in such a folder, which its owner could replace."""
    home.mkdir()
    monkeypatch.setattr(cache, "_make_private", lambda _: None)
    owner = home.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        os.chown(home, 12345, -1)

    with pytest.raises(UnusableCacheError, match=f"^{home} belongs to another user$"):
        LibraryCache()


def test_folders_that_may_be_shared(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sticky folder such as /tmp is safe to lie in, and one that is open to the group named after the user alone."""
    home.mkdir()
    home.chmod(0o1777)
    LibraryCache()
    home.chmod(0o775)
    monkeypatch.setattr(cache, "_is_private_group", lambda group: group == home.stat().st_gid)
    LibraryCache()
    monkeypatch.setattr(cache, "_is_private_group", lambda _: False)
    with pytest.raises(UnusableCacheError, match=f"^others can write to {home}$"):
        LibraryCache()


def test_private_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the user's own group, of the user's own name; a user without a name has none."""
    import grp
    import pwd

    own = os.getegid()
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        pytest.skip("this user has no name")
    named_alike = grp.getgrgid(own).gr_name == pwd.getpwuid(os.geteuid()).pw_name

    assert cache._is_private_group(own) == named_alike
    assert not cache._is_private_group(own + 1)
    monkeypatch.setattr(os, "geteuid", lambda: 987654)
    assert not cache._is_private_group(own)


def test_disk_full(source: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be stored is loaded all the same, and said."""

    def full(path: Path, _: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "atomic_write", full)
    number, said = load(source)

    assert number == 42
    assert said[0] == ONCE[0]
    assert said[1].startswith(f"number.c will be compiled again at the next start: {home}/picogpt/kernels/number-")
    assert said[1].endswith(".so cannot be written (No space left on device)")


def test_read_only_disk(source: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot be written to any more, as in a container image, is read all the same."""
    load(source)

    def refusing(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refusing)

    assert load(source) == (42, [])
    (path,) = entries(home)
    path.unlink()  # as another file: this process has the old one loaded
    path.write_bytes(b"damaged")
    monkeypatch.setattr(Path, "unlink", refusing)
    monkeypatch.setattr(cache, "atomic_write", refusing)

    assert load(source)[0] == 42


def test_links_are_followed_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is what is used: the folder's own path, not a link that may be changed later."""
    link = tmp_path / "link"
    link.symlink_to(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(link))

    assert cache.LibraryCache().folder == home.resolve() / "picogpt" / "kernels"


def test_not_executable(source: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cache lies on a disk from which nothing may be loaded, each start compiles."""
    load(source)
    loaded = ctypes.CDLL

    def refusing(path: str) -> object:
        if path.startswith(str(home)):
            raise OSError("Operation not permitted")
        return loaded(path)

    monkeypatch.setattr(ctypes, "CDLL", refusing)
    number, (said,) = load(source)

    assert number == 42
    assert said.startswith(f"compiling number.c, at each start: {home}/picogpt/kernels/number-")
    assert said.endswith(".so cannot be loaded (Operation not permitted)")


def test_old_ones_go(source: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries that were used last stay; what a killed start has left goes after a while."""
    monkeypatch.setattr(cache, "_KEPT", 2)
    for number in range(3):
        load(source, number)
        for path in entries(home):
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
        if number == 1:
            assert load(source, 0)[1] == []  # is used, and so not the oldest
    new, old = (home / "picogpt" / "kernels" / f".x.{age}.part" for age in ("new", "old"))
    new.touch()
    old.touch()
    os.utime(old, (0, 0))
    load(source, 3)

    assert len([path for path in entries(home) if path.suffix == ".so"]) == 2
    assert load(source, 2)[1] == []
    assert new.exists()
    assert not old.exists()


def test_starts_at_once(source: Path, home: Path) -> None:
    """Starts at the same time come to the same whole library."""
    started = [subprocess.Popen(program("load_library", str(source)), stdout=subprocess.PIPE) for _ in range(4)]

    assert [process.communicate()[0] for process in started] == [b"42\n"] * 4
    assert len(entries(home)) == 1
    assert load(source) == (42, [])


def test_needs_no_torch() -> None:
    """Generation builds its kernel without torch and numpy."""
    code = "import sys; import picogpt.kernels.build\nassert not {'torch', 'numpy'} & set(sys.modules)"

    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_compiler_that_works(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler says, in one line; the cache does not help where the compiler that made it is gone."""
    load(source)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(BuildError, match=r"^false fails \(exit code 1\)$"):
        load(source)
    monkeypatch.delenv("CC")
    with pytest.raises(BuildError, match=r"^\w+ fails \(\S*number.c:2:\d+: error: [^\n]*NUMBER[^\n]*\)$"):
        load_library(source, {}, flags=[], notify=lambda _: None)


class TestUserCacheFolder:
    def test_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """XDG_CACHE_HOME, if it is an absolute path; others are to be ignored by its specification."""
        monkeypatch.setenv("HOME", "/home/me")
        monkeypatch.setattr(sys, "platform", "linux")
        for named, expected in (("/x/y", "/x/y"), ("", "/home/me/.cache"), ("relative", "/home/me/.cache")):
            monkeypatch.setenv("XDG_CACHE_HOME", named)
            assert user_cache_folder() == Path(expected)

    @pytest.mark.parametrize(
        ("platform", "expected"),
        [("darwin", "/home/me/Library/Caches"), ("linux", "/home/me/.cache"), ("win32", "/users/me/local")],
    )
    def test_of_the_platform(self, platform: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each system has its own."""
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/home/me")
        monkeypatch.setenv("LOCALAPPDATA", "/users/me/local")
        monkeypatch.setattr(sys, "platform", platform)

        assert user_cache_folder() == Path(expected)

    def test_no_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A user without a home folder has none, which is said."""

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", homeless)
        with pytest.raises(UnusableCacheError, match=r"^no home folder \(Could not determine home directory.\)$"):
            user_cache_folder()


class TestProcessor:
    @pytest.mark.parametrize(
        ("machine", "flags", "held", "expected"),
        [
            ("x86_64", "avx2 fma avx512f avx512bw avx512dq avx512vl", "", "AVX512"),
            ("x86_64", "avx2 fma avx512f avx512bw avx512dq avx512vl", "avx2", "AVX2"),
            ("x86_64", "avx2 fma avx512f avx512bw avx512dq avx512vl", "default", ""),
            ("x86_64", "avx2 fma avx512f", "", "AVX2"),
            ("x86_64", "avx2 avx", "", ""),
            ("aarch64", "", "", "NEON"),
            ("riscv64", "", "", ""),
        ],
    )
    def test_vectors(self, machine: str, flags: str, held: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The longest vectors that the processor has all instructions for, or those that torch is held to."""
        monkeypatch.setattr("platform.machine", lambda: machine)
        monkeypatch.setattr(processor, "_description", lambda: {"flags": flags})
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", held)

        assert processor.vector_instructions() == expected

    def test_identity(self) -> None:
        """The model and its instructions are part of it, as /proc/cpuinfo tells them."""
        if not Path("/proc/cpuinfo").exists():
            pytest.skip("needs /proc/cpuinfo")

        assert "flags=" in processor.identity() or "Features=" in processor.identity()
