"""Bytes to text: marks, UTF-8, CP1252, line ends, and where a block ends."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picogpt.encodings import decode_stream, decode_text, normalize_newlines
from picogpt.errors import DataError

CP1252 = "x: not UTF-8; read as CP1252 (Western European)"


def read(content: bytes, block_bytes: int | None = None) -> tuple[str, list[str]]:
    """The text of some bytes, and what is said of them."""
    notices: list[str] = []
    if block_bytes is None:
        return decode_text(content, name="x", notify=notices.append), notices
    stream = decode_stream(io.BytesIO(content), name="x", notify=notices.append, block_bytes=block_bytes)
    return "".join(stream), notices


@pytest.mark.parametrize(
    ("content", "expected", "notices"),
    [
        (b"", "", []),
        (b"a\r\nb\rc\n", "a\nb\nc\n", []),
        ("é\r\n€".encode(), "é\n€", []),
        ("\ufeffé\r\n".encode(), "é\n", []),
        (b"\xff\xfe" + "é\r\nx".encode("utf-16-le"), "é\nx", ["x: read as UTF-16-LE, according to its byte order mark"]),
        (b"\xfe\xff" + "é\r\nx".encode("utf-16-be"), "é\nx", ["x: read as UTF-16-BE, according to its byte order mark"]),
        ("é\r\nx".encode("utf-32"), "é\nx", ["x: read as UTF-32-LE, according to its byte order mark"]),
        (b"\0\0\xfe\xff" + "é".encode("utf-32-be"), "é", ["x: read as UTF-32-BE, according to its byte order mark"]),
        ("café “x” €".encode("cp1252"), "café “x” €", [CP1252]),
        ("café".encode("latin-1"), "café", [CP1252]),
        (b"\x81\xe9", "\ufffdé", [CP1252, "x: damaged characters, read as unknown (U+FFFD): 1"]),
        ("éé".encode() + b"\xffa", "éé\ufffda", ["x: damaged characters, read as unknown (U+FFFD): 1"]),
        ("éé€".encode()[:-1], "éé\ufffd", ["x: damaged characters, read as unknown (U+FFFD): 1"]),
    ],
    ids=[
        "nothing", "line ends", "UTF-8", "UTF-8 with a mark", "UTF-16 LE", "UTF-16 BE", "UTF-32 LE", "UTF-32 BE", "CP1252",
        "Latin-1", "undefined in CP1252", "damaged UTF-8", "cut short",
    ],
)  # fmt: skip
@pytest.mark.parametrize("block_bytes", [None, 1, 5])
def test_encodings(content: bytes, expected: str, notices: list[str], block_bytes: int | None) -> None:
    """The encoding is found, said where it is not UTF-8, and line ends are newlines; blocks of any size give the same."""
    if block_bytes is not None and b"\xffa" in content:
        pytest.skip("what is decided by the first letters differs with the block")

    assert read(content, block_bytes) == (expected, notices)


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0\r\ufeff\ufffd")), st.integers(1, 12))
def test_utf8_in_blocks(text: str, block_bytes: int) -> None:
    """UTF-8 comes back whole, wherever its blocks end, and nothing is said."""
    assert read(text.encode(), block_bytes) == (text, [])


@pytest.mark.parametrize("encoding", ["cp1251", "gbk", "shift_jis"])
def test_other_encodings_are_rejected(encoding: str) -> None:
    """A text of mostly bytes beyond ASCII is not taken for Western European."""
    text = ("Привет, мир! " if encoding == "cp1251" else "日本中国。") * 20

    with pytest.raises(DataError, match="x: neither UTF-8 nor a Western European text; convert it to UTF-8"):
        read(text.encode(encoding), 1000)
    assert read(text.encode(encoding))[1][0] == CP1252


def test_zero_bytes_are_rejected() -> None:
    """Zero bytes without a mark are no text."""
    with pytest.raises(DataError, match=r"x: not text \(zero bytes, but no byte order mark\); convert it to UTF-8"):
        read("text".encode("utf-16-le"), 1000)
    assert read(b"a\0b") == ("a\0b", [])


def test_unify_text() -> None:
    """A text that is already decoded loses its mark and other line ends."""
    assert normalize_newlines("\ufeffa\r\nb\rc\n") == "a\nb\nc\n"
