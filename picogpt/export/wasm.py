"""An assembler for the part of WebAssembly's text format that `products.wat` uses: one function over an imported memory.

Instructions are flat, without parentheses, and variables have names. Opcodes are those of the WebAssembly specification 2.0,
chapter 5.4.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = ["assemble"]

_TOKEN = re.compile(r';;[^\n]*|"(?P<string>[^"]*)"|(?P<word>[()]|[^\s()";]+)')

_TYPES = {"i32": 0x7F, "f32": 0x7D, "v128": 0x7B}
_TYPES_OF, _IMPORTS, _FUNCTIONS, _EXPORTS, _CODE = 1, 2, 3, 7, 10  # ids of the module's sections

# Instructions without operands.
_PLAIN = {
    "end": [0x0B],
    "i32.ne": [0x47],
    "i32.add": [0x6A],
    "i32.sub": [0x6B],
    "i32.shl": [0x74],
    "f32.add": [0x92],
    "f32.mul": [0x94],
    "f32x4.splat": [0xFD, 0x13],
    "i32x4.extend_low_i16x8_s": [0xFD, 0xA7, 0x01],
    "i32x4.extend_high_i16x8_s": [0xFD, 0xA8, 0x01],
    "f32x4.add": [0xFD, 0xE4, 0x01],
    "f32x4.mul": [0xFD, 0xE6, 0x01],
    "f32x4.convert_i32x4_s": [0xFD, 0xFA, 0x01],
}
# Instructions that take a variable.
_OF_LOCAL = {"local.get": 0x20, "local.set": 0x21, "local.tee": 0x22}
# Instructions that take an offset, 0 if none is written; the last byte is the logarithm of their alignment.
_OF_MEMORY = {
    "f32.load": [0x2A, 2],
    "f32.store": [0x38, 2],
    "v128.load": [0xFD, 0x00, 4],
    "v128.load8x8_s": [0xFD, 0x01, 3],
}


def assemble(text: str) -> bytes:
    """Return the binary module of `text`.

    Raises:
        ValueError: an instruction is not one of those above.
    """
    # (module (import NAMESPACE MEMORY (memory PAGES)) (func (export NAME) parameters, variables and instructions))
    ((_, (_, namespace, memory, (_, pages)), (_, (_, export), *parts)),) = _parse(_tokens(text))
    parameters = [(part[1], _TYPES[part[2]]) for part in parts if part[0] == "param"]
    variables = [(part[1], _TYPES[part[2]]) for part in parts if part[0] == "local"]
    names = [name for name, _ in (*parameters, *variables)]
    words = deque([part for part in parts if isinstance(part, str)] + ["end"])
    function = _vector(bytes([1, kind]) for _, kind in variables) + b"".join(_instructions(words, names))
    sections = {
        _TYPES_OF: b"\x60" + _vector(bytes([kind]) for _, kind in parameters) + _vector([]),
        _IMPORTS: _string(namespace) + _string(memory) + b"\2\0" + _unsigned(int(pages)),
        _FUNCTIONS: b"\0",
        _EXPORTS: _string(export) + b"\0\0",
        _CODE: _unsigned(len(function)) + function,
    }
    # Each section is a list of one.
    content = b"".join(bytes([number]) + _unsigned(len(part) + 1) + b"\1" + part for number, part in sections.items())
    return b"\0asm\1\0\0\0" + content


def _tokens(text: str) -> Iterator[str]:
    for match in _TOKEN.finditer(text):
        token = match["string"] if match["string"] is not None else match["word"]
        if token is not None:  # a comment has neither
            yield token


def _parse(tokens: Iterator[str]) -> list[Any]:
    """Return words, and lists of words for parentheses, up to the closing parenthesis."""
    words = itertools.takewhile(lambda word: word != ")", tokens)
    return [_parse(tokens) if word == "(" else word for word in words]


def _instructions(words: deque[str], names: Sequence[str]) -> Iterator[bytes]:
    """Yield the code of a function."""
    # Names of the open loops: a branch names its target by the number of loops between, from the innermost outwards.
    loops: list[str] = []
    while words:
        word = words.popleft()
        if word in _OF_LOCAL:
            yield bytes([_OF_LOCAL[word]]) + _unsigned(names.index(words.popleft()))
        elif word in _OF_MEMORY:
            offset = words.popleft().removeprefix("offset=") if words[0].startswith("offset=") else "0"
            yield bytes(_OF_MEMORY[word]) + _unsigned(int(offset))
        elif word == "loop":
            loops.append(words.popleft())
            yield b"\x03\x40"
        elif word == "br_if":
            yield b"\x0d" + _unsigned(loops[::-1].index(words.popleft()))
        elif word == "i32.const":
            yield b"\x41" + bytes([int(words.popleft())])  # below 64 it is one byte
        elif word == "f32.const":
            yield b"\x43" + struct.pack("<f", float(words.popleft()))
        elif word == "f32x4.extract_lane":
            yield bytes([0xFD, 0x1F, int(words.popleft())])
        elif word in _PLAIN:
            loops = loops[:-1] if word == "end" else loops
            yield bytes(_PLAIN[word])
        else:
            raise ValueError(f"there is no instruction {word!r}")


def _vector(items: Iterable[bytes]) -> bytes:
    """Return the items, preceded by their number."""
    listed = list(items)
    return _unsigned(len(listed)) + b"".join(listed)


def _string(text: str) -> bytes:
    return _vector(bytes([byte]) for byte in text.encode())


def _unsigned(number: int) -> bytes:
    """Encode a number as LEB128: seven bits per byte, the lowest first."""
    # The eighth bit says that more bytes follow.
    content = bytearray()
    while number > 0x7F:
        content.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*content, number])
