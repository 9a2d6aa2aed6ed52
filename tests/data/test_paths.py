"""The files that paths stand for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from picogpt.data.paths import find_files
from picogpt.errors import DataError


def find(*paths: Path | str) -> tuple[list[str], list[str]]:
    """The files' names, and what is said of them."""
    notices: list[str] = []
    files = find_files([str(path) for path in paths], notices.append)
    return [os.path.relpath(file, paths[0]) if Path(paths[0]).is_dir() else file for file in files], notices


def make(folder: Path, *names: str) -> None:
    """Make files with contents of their own."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the text of {name}")


def test_endings_and_hidden_files(tmp_path: Path) -> None:
    """Texts in capitals or small letters are read; hidden files and folders and other endings are passed over, and counted."""
    make(tmp_path, "b.txt", "A.TXT", "notes.Md", "sub/c.txt", "x.pdf", "y.PDF", "z", ".hidden.txt", "._b.txt")
    make(tmp_path, ".venv/lib/d.txt", "sub/.ipynb_checkpoints/c.txt")

    assert find(tmp_path) == (
        ["A.TXT", "b.txt", "notes.Md", "sub/c.txt"],
        ["files to read: 4 (skipped: 4 hidden, 2 .pdf, 1 without a suffix)"],
    )


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    """What the user names is read, whatever its name."""
    make(tmp_path, ".notes/a.txt", "plain.dat")

    assert find(tmp_path / ".notes")[0] == ["a.txt"]
    assert find(tmp_path / "plain.dat") == ([str(tmp_path / "plain.dat")], [])


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links(tmp_path: Path) -> None:
    """A loop of links ends; a linked file is read once; a link into nothing is passed over."""
    make(tmp_path, "sub/a.txt")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "again.txt").symlink_to(tmp_path / "sub" / "a.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nothing")
    files, notices = find(tmp_path)

    assert files == ["again.txt"]
    assert notices[0] == "files to read: 1 (skipped: 1 linked, 1 not a regular file)"
    assert notices[1] == f"duplicates, read once: {tmp_path}/sub/a.txt (same as {tmp_path}/again.txt)"


def test_the_same_content_is_read_once(tmp_path: Path) -> None:
    """A copy under another name, the same path twice and standard input twice are read once; empty files are no copies."""
    make(tmp_path, "a.txt", "b.txt")
    (tmp_path / "copy.txt").write_bytes((tmp_path / "a.txt").read_bytes())
    for name in ("empty.txt", "none.txt"):
        (tmp_path / name).touch()
    files, notices = find(tmp_path, tmp_path / "b.txt", "-", "-")

    assert files[:4] == ["a.txt", "b.txt", "empty.txt", "none.txt"]
    assert len(files) == 5  # and standard input
    assert "copy.txt (same as" in notices[1]
    assert notices[1].count("(same as") == 3


def test_many_copies_are_counted(tmp_path: Path) -> None:
    """Three copies are named, and how many more there are."""
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("the same")

    assert find(tmp_path)[1][-1].endswith("3.txt (same as " + str(tmp_path / "0.txt") + ") and 2 more")


def test_missing_files_are_left_to_their_reader(tmp_path: Path) -> None:
    """A path that is not there comes back as it is."""
    assert find(tmp_path / "none") == ([str(tmp_path / "none")], [])


def test_folder_without_texts(tmp_path: Path) -> None:
    """What was passed over is said."""
    make(tmp_path, "x.pdf", ".a.txt")

    with pytest.raises(DataError, match=r"the folder has no \.txt or \.md file \(skipped: 1 hidden, 1 \.pdf\); name another"):
        find(tmp_path)


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that may not be read is an error, not a shorter text."""
    make(tmp_path, "a.txt", "sub/b.txt")
    scan = os.scandir

    def guarded(path: str) -> object:
        if path.endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr("os.scandir", guarded)

    with pytest.raises(DataError, match=r"sub: cannot be read \(Permission denied\)"):
        find(tmp_path)
