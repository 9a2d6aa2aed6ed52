"""The check that Python and a native library mean the same structures and constants, made when the library is loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from ctypes import POINTER, Structure, c_int64
from typing import Any

__all__ = ["compare_layouts", "fields_of"]


def fields_of(kind: type[Any], names: str) -> tuple[tuple[str, type[Any]], ...]:
    """Fields of one type, by their names with spaces between them."""
    return tuple((name, kind) for name in names.split())


class _Entry(Structure):
    """`struct layout_entry`: a field's place, the size of a structure, or the value of a constant."""

    _fields_ = (("name", ctypes.c_char_p), ("offset", c_int64), ("size", c_int64))


def compare_layouts(
    library: ctypes.CDLL, structures: Mapping[str, type[Structure]], constants: Mapping[str, int], *, sides: str
) -> None:
    """Compare structures and constants with those that the library was compiled with: a mismatch would write to foreign memory.

    Args:
        library: exports `layout`, a table of `struct layout_entry` that an entry without a name ends (layout.h).
        structures: Python's structures, by their names in C, in the order of the table.
        constants: values by name, in the order of the table, behind the structures.
        sides: the two files that describe them, for the message.

    Raises:
        AssertionError: they differ; one of the files was changed alone.
    """
    expected, found = list(_expected(structures, constants)), list(_found(library))
    assert found == expected, f"{sides} differ: {sorted(set(expected) ^ set(found))}"


def _expected(structures: Mapping[str, type[Structure]], constants: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """The layout as Python has it: name, offset or value, and size."""
    for name, structure in structures.items():
        yield name, 0, ctypes.sizeof(structure)
        for field, *_ in structure._fields_:
            place = getattr(structure, field)
            yield f"{name}.{field}", place.offset, place.size
    yield from ((name, value, 0) for name, value in constants.items())


def _found(library: ctypes.CDLL) -> Iterator[tuple[str, int, int]]:
    """The layout as the library was compiled with it."""
    library.layout.argtypes, library.layout.restype = (), POINTER(_Entry)
    entries = library.layout()
    index = 0
    while (entry := entries[index]).name:
        yield entry.name.decode(), entry.offset, entry.size
        index += 1
