"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from picogpt.files import atomic_folder, atomic_write, can_flush, remove_leftovers, unnamed_file


def test_writes_bytes_and_chunks(tmp_path: Path) -> None:
    """Content in one piece or in several, over an older file, with nothing left beside it."""
    path = tmp_path / "a"
    atomic_write(path, b"old")
    atomic_write(path, iter([b"ne", b"w"]))

    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """A full or broken disk at any call: the old content stays, nothing is left beside it, the error comes out."""
    path = tmp_path / "a"
    atomic_write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(f"picogpt.files.os.{call}", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        atomic_write(path, b"new")

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_failing_chunks_leave_the_old_file(tmp_path: Path) -> None:
    """An error in whoever makes the content counts the same."""
    path = tmp_path / "a"
    atomic_write(path, b"old")

    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        atomic_write(path, chunks())

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes one byte at a time still gets them all."""
    write = os.write
    monkeypatch.setattr("picogpt.files.os.write", lambda descriptor, data: write(descriptor, data[:1]))

    atomic_write(tmp_path / "a", b"abc")

    assert (tmp_path / "a").read_bytes() == b"abc"


def test_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link at the temporary name is an error, and what it points to is untouched."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    monkeypatch.setattr("picogpt.files.secrets.token_hex", lambda _: "0")
    (tmp_path / ".a.0.part").symlink_to(victim)

    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "a", b"new")

    assert victim.read_bytes() == b"mine"


def test_leftovers_are_removed(tmp_path: Path) -> None:
    """What a killed process left half-written goes; everything else stays."""
    for name in (".a.123.part", "a", ".part-of-me"):
        (tmp_path / name).touch()

    (tmp_path / ".pace-1.part" / "model").mkdir(parents=True)
    (tmp_path / ".link.part").symlink_to(tmp_path / ".part-of-me")
    remove_leftovers(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == [".part-of-me", "a"]


def failing(monkeypatch: pytest.MonkeyPatch, number: int, *, folders_only: bool) -> None:
    """Have every `fsync`, or that of folders, fail as a file system that lacks it has it fail."""
    fsync = os.fsync

    def limited(descriptor: int) -> None:
        if not folders_only or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr("picogpt.files.os.fsync", limited)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP], ids=errno.errorcode.get)
@pytest.mark.parametrize("folders_only", [True, False], ids=["folders", "all"])
def test_file_systems_without_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, folders_only: bool) -> None:
    """Files are written without it, and it can be told."""
    assert can_flush(tmp_path)
    failing(monkeypatch, number, folders_only=folders_only)
    atomic_write(tmp_path / "a", b"new")

    assert (tmp_path / "a").read_bytes() == b"new"
    assert not can_flush(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A call that knows only a descriptor fails with the name of the file that it is about."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"picogpt.files.os.{call}", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic_write(tmp_path / "a", b"new")

    assert caught.value.filename == str(tmp_path / "a")


def test_missing_folder_names_the_file(tmp_path: Path) -> None:
    """Where the temporary file cannot be made, the error names the file that was to be written."""
    with pytest.raises(FileNotFoundError) as caught:
        atomic_write(tmp_path / "none" / "a", b"new")

    assert caught.value.filename == str(tmp_path / "none" / "a")


def test_file_systems_without_unnamed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where O_TMPFILE is not supported a file is made and its name removed."""
    unnamed = getattr(os, "O_TMPFILE", 0)
    open_ = os.open

    def limited(path: str, flags: int, *rest: int) -> int:
        if unnamed and flags & unnamed == unnamed:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return open_(path, flags, *rest)

    monkeypatch.setattr("tempfile._os.open", limited)
    with unnamed_file(tmp_path, [b"a", b"b"]) as stream:
        stream.seek(0)

        assert stream.read() == b"ab"
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_names_file_and_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The error of a full disk says which file did not fit, and how large it is."""

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("picogpt.files.os.write", fail)
    with pytest.raises(OSError, match=r"the file needs 2.5 MB") as caught:
        atomic_write(tmp_path / "a", bytes(2_500_000))
    assert caught.value.filename == str(tmp_path / "a")


def test_folder_appears_whole(tmp_path: Path) -> None:
    """A folder takes its name at the end of the body, a new one or an empty one's, with nothing left beside it."""
    for name in ("new", "empty"):
        path = tmp_path / name
        if name == "empty":
            path.mkdir()
        with atomic_folder(path) as folder:
            (folder / "a").write_bytes(b"1")
            assert not path.exists() or not any(path.iterdir())

        assert (path / "a").read_bytes() == b"1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_failing_folder_leaves_nothing(tmp_path: Path) -> None:
    """An error in the body comes out, and so does that of a folder that holds something, which stays as it is."""
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "new") as folder:
        (folder / "nowhere" / "a").touch()
    assert list(tmp_path.iterdir()) == []

    full = tmp_path / "full"
    full.mkdir()
    (full / "b").touch()
    with pytest.raises(OSError, match="not empty") as caught, atomic_folder(full) as folder:
        (folder / "a").touch()
    assert caught.value.filename2 == str(full)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "b"]
