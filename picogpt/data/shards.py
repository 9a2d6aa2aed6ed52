"""The files of a streamed data set, on the hub or in a folder: what is known of them before a row is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picogpt.errors import DataError

__all__ = ["Row", "Shards", "as_row"]

Row = tuple[str, ...]
"""The text of each column that is read."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The files of a data set at one commit."""

    files: tuple[str, ...]
    """Their addresses, in the data set's own order."""
    format: str
    """Name of the reader: parquet, json, text, ..."""
    columns: tuple[str, ...]
    """Columns to read."""
    commit: str | None
    """The hub's commit; None for a folder."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the columns and of the files' names and, in a folder, of their lengths."""
        sizes = [Path(file).stat().st_size if self.commit is None else 0 for file in self.files]
        return hashlib.sha256(repr((self.columns, list(zip(self.files, sizes, strict=True)))).encode()).hexdigest()


def as_row(columns: Sequence[str], values: Mapping[str, Any], file: str) -> Row:
    """The texts of `columns`; null is an empty text.

    Raises:
        DataError: a column holds something else than text.
    """
    return tuple(_text(values.get(column), column, file) for column in columns)


def _text(value: Any, column: str, file: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise DataError(f"{file}: column {column} holds {type(value).__name__}, not text; name another one with --text-column")
