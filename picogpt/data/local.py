"""Data sets in a local folder: found by name, checked before training begins, read row by row.

Files are opened here and not by the library of the hub, which takes names for patterns, needs a folder for its cache and waits
for what is damaged as if it were a network. Nothing here is waited for: whatever is wrong with a file is one `DataError` that
names it.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from picogpt.data.layout import training_files
from picogpt.data.shards import Row, Shards, as_row
from picogpt.errors import DataError

__all__ = ["find_local", "read_local"]


class _NoColumn(Exception):
    """A file without a column that is wanted; the message names one and what there is."""


Rows = Generator[Mapping[str, Any], None, None]
"""Values of a file's columns, row by row."""

_OPENERS: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_DAMAGE = (OSError, ValueError, EOFError, csv.Error, lzma.LZMAError, zlib.error, RecursionError)
"""Raised by the readers for a file that is damaged, cut short or in another encoding."""
_LONGEST_FIELD = (1 << 31) - 1
_LAST_BYTES = 1 << 20


def find_local(folder: Path, config: str | None, columns: tuple[str, ...]) -> Shards:
    """The files of `folder` that are for training; each of them is opened and its columns are checked.

    Args:
        folder: a folder in the hub's layout.
        config: a part that its README.md lists, or None.
        columns: what is to be read.

    Raises:
        DataError: there is no file for training, or one of them cannot be read or lacks a column.
    """
    name, files = training_files(folder.resolve(), config)
    shards = Shards(files=tuple(file.as_posix() for file in files), format=name, columns=columns, commit=None)
    for file in shards.files:
        with _named(file):
            _check(shards, file)
    return shards


def read_local(shards: Shards, file: str, start: int) -> Iterator[Row]:
    """The columns of each row of `file`, from row `start` on; null is an empty text.

    Raises:
        DataError: the file is damaged, a column is missing or holds something else than text.
    """
    with _named(file), _rows(shards, file, start) as rows:
        for values in rows:
            yield as_row(shards.columns, values, file)


@contextlib.contextmanager
def _rows(shards: Shards, file: str, start: int) -> Iterator[Rows]:
    """The rows of a file; whatever was opened for them is closed in the order in which it must be."""
    with _opened(file) as stream, contextlib.closing(_READERS[shards.format](stream, shards.columns, start)) as rows:
        yield rows


@contextlib.contextmanager
def _named(file: str) -> Iterator[None]:
    """Turn whatever goes wrong with `file` into one line."""
    try:
        yield
    except _NoColumn as error:
        raise DataError(f"{file}: {error} with --text-column") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not a text in UTF-8 ({error.reason} at byte {error.start:,}); convert it, or leave it out"
        ) from error
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{file}: cannot be read ({reason}); mend it or leave it out") from error


@contextlib.contextmanager
def _opened(file: str) -> Iterator[IO[bytes]]:
    path = Path(file)
    with path.open("rb") as raw:
        if not path.stat().st_size:
            raise ValueError("it is empty, 0 bytes")
        if opener := _OPENERS.get(path.suffix.lower()):
            with opener(raw) as stream:
                yield stream
        else:
            yield raw


def _check(shards: Shards, file: str) -> None:
    """Read as much of a file as tells whether it is whole, as far as that can be told quickly."""
    with _rows(shards, file, 0) as rows:
        first = next(rows, None)
        if first is not None:
            _check_columns(shards.columns, first)
            as_row(shards.columns, first, file)
    if shards.format == "json" and Path(file).suffix.lower() not in _OPENERS:
        _check_last_line(file)


def _check_columns(columns: Sequence[str], names: Collection[str]) -> None:
    missing = [column for column in columns if column not in names]
    if missing:
        raise _NoColumn(f"it has no column {missing[0]}; name one of {', '.join(names)}")


def _check_last_line(file: str) -> None:
    """Notice a file of JSON lines that was cut short, before training gets there."""
    with Path(file).open("rb") as stream:
        if stream.read(_LAST_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return  # a list of objects, which was parsed as a whole
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, size - _LAST_BYTES))
        *before, last = stream.read().rstrip().splitlines() or [b""]
    # A line that began before what was read is unknown.
    if before and last.startswith(b"{"):
        _parse(last.decode(), "its last line")


def _parquet_rows(stream: IO[bytes], columns: tuple[str, ...], start: int) -> Rows:
    import pyarrow.parquet as pq

    with pq.ParquetFile(stream) as file:
        _check_columns(columns, file.schema_arrow.names)
        # Row groups that end before `start` are not read at all.
        first = 0
        while first < file.num_row_groups and start >= file.metadata.row_group(first).num_rows:
            start -= file.metadata.row_group(first).num_rows
            first += 1
        groups = range(first, file.num_row_groups)
        for batch in file.iter_batches(batch_size=1000, row_groups=list(groups), columns=list(columns)):
            yield from batch.slice(start).to_pylist()
            start = max(0, start - batch.num_rows)


def _arrow_rows(stream: IO[bytes], columns: tuple[str, ...], start: int) -> Rows:
    import pyarrow as pa

    try:
        reader = pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        file = pa.ipc.open_file(stream)
        batches = (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        batches = iter(reader)
    for batch in batches:
        _check_columns(columns, batch.schema.names)
        yield from batch.select(list(columns)).slice(start).to_pylist()
        start = max(0, start - batch.num_rows)


def _json_rows(stream: IO[bytes], _columns: tuple[str, ...], start: int) -> Rows:
    """Objects, one a line, or one list of them."""
    row = 0
    with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            if row == 0 and line.lstrip().startswith("["):
                yield from _json_list(line + text.read())[start:]
                return
            if row >= start:
                yield _parse(line, f"line {number:,}")
            row += 1


def _json_list(text: str) -> list[Mapping[str, Any]]:
    found = json.loads(text)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError("a list that does not hold objects alone")
    return found


def _parse(line: str, where: str) -> Mapping[str, Any]:
    """The object that a line of JSON is."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no whole JSON object: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} is no JSON object")
    return found


def _csv_rows(stream: IO[bytes], _columns: tuple[str, ...], start: int) -> Rows:
    """Rows of a table whose first line names the columns, parted by commas or tabs."""
    csv.field_size_limit(_LONGEST_FIELD)
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        # Which of the two, the line of names tells, whatever the file is called.
        head = text.readline()
        text.seek(0)
        lines = csv.reader(text, delimiter="\t" if "\t" in head and "," not in head else ",", strict=True)
        filled = (fields for fields in lines if fields)
        names = next(filled, [])
        for row, fields in enumerate(filled):
            if len(fields) != len(names):
                raise ValueError(f"line {lines.line_num:,} has {len(fields)} fields where the first line has {len(names)}")
            if row >= start:
                yield dict(zip(names, fields, strict=True))


def _text_rows(stream: IO[bytes], _columns: tuple[str, ...], start: int) -> Rows:
    """Lines, in a column called text."""
    with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        for row, line in enumerate(text):
            if row >= start:
                yield {"text": line.removesuffix("\n")}


_READERS: Mapping[str, Callable[[IO[bytes], tuple[str, ...], int], Rows]] = {
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
    "json": _json_rows,
    "csv": _csv_rows,
    "text": _text_rows,
}
