"""Check at load time that Python and a native library use the same structures and constants."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from ctypes import POINTER, Structure, c_int64
from typing import Any

__all__ = ["compare_layouts", "fields_of"]


def fields_of(kind: type[Any], names: str) -> tuple[tuple[str, type[Any]], ...]:
    """Return the ctypes fields of the space-separated `names`, all of type `kind`."""
    return tuple((name, kind) for name in names.split())


# ctypes trusts its field lists. A field that is moved in one file only would make C write to foreign memory, without an error.


class _Entry(Structure):
    """`struct layout_entry`: a field's offset and size, a structure's size, or a constant's value."""

    _fields_ = (("name", ctypes.c_char_p), ("offset", c_int64), ("size", c_int64))


def compare_layouts(
    library: ctypes.CDLL, structures: Mapping[str, type[Structure]], constants: Mapping[str, int], *, sides: str
) -> None:
    """Compare structures and constants with those the library was compiled with: a mismatch would corrupt memory.

    Args:
        library: exports `layout`, a table of `struct layout_entry` that ends with an entry without a name (layout.h).
        structures: ctypes structures by their C names, in the order of the table.
        constants: values by name, in the order of the table, after the structures.
        sides: names of the two files that define them, for the message.

    Raises:
        AssertionError: the layouts differ; one of the files was changed without the other.
    """
    expected, found = list(_expected(structures, constants)), list(_found(library))
    # The symmetric difference lists each entry that only one side has.
    assert found == expected, f"{sides} differ: {sorted(set(expected) ^ set(found))}"


def _expected(structures: Mapping[str, type[Structure]], constants: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """Yield the layout on Python's side: name, offset or value, and size."""
    for name, structure in structures.items():
        yield name, 0, ctypes.sizeof(structure)
        for field, *_ in structure._fields_:
            place = getattr(structure, field)  # a descriptor with the offset and size that ctypes computed
            yield f"{name}.{field}", place.offset, place.size
    # Constants use the same table: the value stands in the offset.
    yield from ((name, value, 0) for name, value in constants.items())


def _found(library: ctypes.CDLL) -> Iterator[tuple[str, int, int]]:
    """Yield the layout that the library was compiled with."""
    library.layout.argtypes, library.layout.restype = (), POINTER(_Entry)
    entries = library.layout()
    # The table ends with a null name.
    index = 0
    while (entry := entries[index]).name:
        yield entry.name.decode(), entry.offset, entry.size
        index += 1
