"""Decoding of bytes to text: by the byte order mark, else as UTF-8, else as CP1252; line ends become newlines.

Without a mark, the first block with bytes outside ASCII decides. Valid UTF-8 sequences are hardly ever an accident in CP1252, so
a block with more valid sequences than invalid bytes is damaged UTF-8, and its invalid bytes become U+FFFD.
CP1252, the Western European encoding of Windows, is Latin-1 plus curly quotes.
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
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16-LE, whose mark is a prefix of this one
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MAX_BOM_BYTES = 4
_WIDE = frozenset({"utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"})  # ASCII text contains zero bytes in these
_ASCII = bytes(range(128))
_REPLACEMENT_CHARACTER = "\ufffd"
# Largest fraction of bytes outside ASCII in Western European text; Russian or Chinese in a legacy encoding has more.
_MAX_WESTERN_SHARE = 0.5
_MIN_SAMPLE_BYTES = 64  # below it, that fraction is not meaningful


class Stream(Protocol):
    """A source of bytes: an open file, or a pipe."""

    def read(self, size: int, /) -> bytes:
        """Return the next `size` bytes, fewer only at the end."""


def normalize_newlines(text: str) -> str:
    """Drop a byte order mark at the start of `text`, and turn line ends into newlines."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def decode_text(content: bytes, *, name: str, notify: Notify) -> str:
    """Decode all of `content`; nothing is rejected.

    Args:
        content: the bytes.
        name: name of the content, for messages.
        notify: receives a line about an encoding other than UTF-8, and about damage.
    """
    return "".join(decode_stream(io.BytesIO(content), name=name, notify=notify, block_bytes=len(content), reject=False))


def decode_stream(stream: Stream, *, name: str, notify: Notify, block_bytes: int, reject: bool = True) -> Iterator[str]:
    """Decode `stream` block by block, reading it once.

    Args:
        stream: the bytes.
        name: name of the stream, for messages.
        notify: receives a line about an encoding other than UTF-8, and about damage.
        block_bytes: bytes to read at a time, approximately.
        reject: whether to reject content that is not text.

    Raises:
        OSError: the stream cannot be read.
        DataError: the content is not text, or its encoding is unknown.
    """
    block_bytes = max(block_bytes, _MAX_BOM_BYTES)
    block = stream.read(block_bytes)
    mark, encoding = next(((mark, marked) for mark, marked in _BOMS if block.startswith(mark)), (b"", "ascii"))
    # Drop the mark; a block that was only the mark must not look like the end.
    block = block[len(mark) :] or stream.read(block_bytes)
    if encoding in _WIDE:
        notify(f"{name}: read as {encoding.upper()}, according to its byte order mark")
    # Incremental decoders keep a character, or a CR LF, that is split between two blocks.
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    faults, final = 0, False
    while not final:
        # Zero bytes: binary data, or UTF-16 without a mark, which cannot be told from it.
        if reject and b"\0" in block and encoding not in _WIDE:
            raise DataError(f"{name}: not text (zero bytes, but no byte order mark); convert it to UTF-8, or leave it out")
        # ASCII so far, and the same in every candidate: this block decides.
        if encoding == "ascii" and not block.isascii():
            block, encoding = _detect_encoding(stream, block, block_bytes)
            if encoding != "utf-8":
                # CP1252 can decode nearly any bytes, so text in another 8-bit encoding has to be caught by its statistics.
                if reject and not _is_western(block):
                    raise DataError(f"{name}: neither UTF-8 nor a Western European text; convert it to UTF-8, or leave it out")
                notify(f"{name}: not UTF-8; read as CP1252 (Western European)")
            decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        # An empty block is the end: flush the decoders.
        final = not block
        text = newlines.decode(decoder.decode(block, final), final)
        faults += text.count(_REPLACEMENT_CHARACTER)
        if text:
            yield text
        block = b"" if final else stream.read(block_bytes)
    if faults:
        notify(f"{name}: damaged characters, read as unknown (U+FFFD): {faults:,}")


def _detect_encoding(stream: Stream, block: bytes, block_bytes: int) -> tuple[bytes, str]:
    """Detect the encoding at the first block with bytes outside ASCII; return the block, extended if needed, and the encoding."""
    letters, faults = _letters_and_faults(block, final=False)
    while not letters + faults:  # only the start of one character, cut off at the end
        more = stream.read(block_bytes)
        block += more
        letters, faults = _letters_and_faults(block, final=not more)
    # The majority decides: valid UTF-8 sequences against invalid bytes.
    return block, "utf-8" if letters > faults else "cp1252"


def _is_western(block: bytes) -> bool:
    """Whether few enough bytes are outside ASCII for CP1252; a short block always passes."""
    return len(block) < _MIN_SAMPLE_BYTES or len(block.translate(None, _ASCII)) <= _MAX_WESTERN_SHARE * len(block)


def _letters_and_faults(block: bytes, *, final: bool) -> tuple[int, int]:
    """Count the characters outside ASCII and the invalid sequences of `block` as UTF-8; not `final`, its end may be cut."""
    text, _ = codecs.utf_8_decode(block, "replace", final)
    # U+FFFD is outside ASCII too, so it is subtracted below.
    beyond = len(text) - len(text.encode("ascii", "ignore"))
    faults = text.count(_REPLACEMENT_CHARACTER)
    return beyond - faults, faults
