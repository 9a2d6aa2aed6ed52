"""Metadata of a streamed data set, on the hub or on the disk: its files, format, columns and commit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picogpt.errors import DataError

__all__ = ["Row", "Shards", "as_row"]

Row = tuple[str, ...]
"""Text of each selected column of a row."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Files of a data set at one commit."""

    # Stored in the run's config, so that a resume needs no listing.
    files: tuple[str, ...]
    """Addresses of the files, in the order of the data set."""
    format: str
    """Name of the reader: parquet, json, text, ..."""
    columns: tuple[str, ...]
    """Columns to read."""
    commit: str | None
    """Commit on the hub; None for local files."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the columns and file names; for local files also of their sizes."""
        # A commit pins the content on the hub. Local files can change; hashing them whole would read the whole data set.
        sizes = [Path(file).stat().st_size if self.commit is None else 0 for file in self.files]
        return hashlib.sha256(repr((self.columns, list(zip(self.files, sizes, strict=True)))).encode()).hexdigest()


def as_row(columns: Sequence[str], values: Mapping[str, Any], file: str) -> Row:
    """Select the texts of `columns` from a row; null becomes an empty text.

    Raises:
        DataError: a column contains something other than text.
    """
    # A missing key counts as null: JSON objects need not have every key.
    return tuple(_text(values.get(column), column, file) for column in columns)


def _text(value: Any, column: str, file: str) -> str:
    """Return `value` if it is text, or an empty text for null."""
    # Null is common in optional columns and counts as an empty article; a number or list means the wrong column.
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    # The first bad row ends the read: guessing a text from other types would hide a wrong --text-column.
    raise DataError(f"{file}: column {column} holds {type(value).__name__}, not text; name another one with --text-column")
