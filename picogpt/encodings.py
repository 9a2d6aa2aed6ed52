"""Bytes to text: a byte order mark names the encoding, else UTF-8 where that fits, else CP1252; line ends become newlines.

Without a mark the first block that is not all ASCII decides. Letters of UTF-8 in it are no accident, as CP1252 hardly ever
makes their pattern: a block with more of them than of faulty bytes is damaged UTF-8, whose faulty bytes become U+FFFD.
CP1252, Windows's Western European encoding, has the letters of Latin-1, and the curly quotes that Latin-1 lacks.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from typing import Protocol

from picogpt.errors import DataError
from picogpt.wording import Notify

__all__ = ["decode_stream", "decode_text", "normalize_newlines"]


_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MAX_BOM_BYTES = 4
_WIDE = frozenset({"utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"})
"""Encodings whose ASCII has zero bytes."""
_ASCII = bytes(range(128))
_REPLACEMENT_CHARACTER = "\ufffd"
_MAX_WESTERN_SHARE = 0.5
"""Largest share of bytes beyond ASCII in a Western European text; Russian or Chinese in an encoding of its own has more."""
_MIN_SAMPLE_BYTES = 64
"""Bytes from which on that share says something."""


class Stream(Protocol):
    """A source of bytes: an open file, or a pipe."""

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes, fewer only at the end."""


def normalize_newlines(text: str) -> str:
    """`text` without a byte order mark at its start, its line ends newlines."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def decode_text(content: bytes, *, name: str, notify: Notify) -> str:
    """All of `content` as text, whatever it is: nothing is rejected.

    Args:
        content: the bytes.
        name: what they are called in messages.
        notify: told in a line of another encoding than UTF-8, and of damage.
    """
    return "".join(decode_stream(io.BytesIO(content), name=name, notify=notify, block_bytes=len(content), reject=False))


def decode_stream(stream: Stream, *, name: str, notify: Notify, block_bytes: int, reject: bool = True) -> Iterator[str]:
    """The text of `stream`, which is read once.

    Args:
        stream: the bytes.
        name: what they are called in messages.
        notify: told in a line of another encoding than UTF-8, and of damage.
        block_bytes: about how many bytes are read at once.
        reject: whether to reject what is no text.

    Raises:
        OSError: it cannot be read.
        DataError: it is no text, or in an encoding that is not known.
    """
    block_bytes = max(block_bytes, _MAX_BOM_BYTES)
    block = stream.read(block_bytes)
    mark, encoding = next(((mark, marked) for mark, marked in _BOMS if block.startswith(mark)), (b"", "ascii"))
    block = block[len(mark) :] or stream.read(block_bytes)
    if encoding in _WIDE:
        notify(f"{name}: read as {encoding.upper()}, which its byte order mark names")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    faults, final = 0, False
    while not final:
        if reject and b"\0" in block and encoding not in _WIDE:
            raise DataError(f"{name}: no text (it has zero bytes, and no byte order mark); convert it to UTF-8, or leave it out")
        if encoding == "ascii" and not block.isascii():
            block, encoding = _detect_encoding(stream, block, block_bytes)
            if encoding != "utf-8":
                if reject and not _is_western(block):
                    raise DataError(f"{name}: neither UTF-8 nor a Western European text; convert it to UTF-8, or leave it out")
                notify(f"{name}: not UTF-8; read as CP1252 (Western European)")
            decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        final = not block
        text = newlines.decode(decoder.decode(block, final), final)
        faults += text.count(_REPLACEMENT_CHARACTER)
        if text:
            yield text
        block = b"" if final else stream.read(block_bytes)
    if faults:
        notify(f"{name}: damaged characters, which stay unknown (U+FFFD): {faults:,}")


def _detect_encoding(stream: Stream, block: bytes, block_bytes: int) -> tuple[bytes, str]:
    """The encoding of a stream from `block` on, the first one beyond ASCII; and the block, longer where it did not tell."""
    letters, faults = _letters_and_faults(block, final=False)
    while not letters + faults:  # all there is beyond ASCII is the beginning of a character at the end
        more = stream.read(block_bytes)
        block += more
        letters, faults = _letters_and_faults(block, final=not more)
    return block, "utf-8" if letters > faults else "cp1252"


def _is_western(block: bytes) -> bool:
    """Whether few enough bytes are beyond ASCII for CP1252, as far as can be told."""
    return len(block) < _MIN_SAMPLE_BYTES or len(block.translate(None, _ASCII)) <= _MAX_WESTERN_SHARE * len(block)


def _letters_and_faults(block: bytes, *, final: bool) -> tuple[int, int]:
    """How many characters beyond ASCII, and how many faults, `block` has as UTF-8; not `final`, it may end within a character."""
    text, _ = codecs.utf_8_decode(block, "replace", final)
    beyond = len(text) - len(text.encode("ascii", "ignore"))
    faults = text.count(_REPLACEMENT_CHARACTER)
    return beyond - faults, faults
