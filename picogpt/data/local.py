"""Local data sets, a folder or a single file: files found by name, checked before training starts, read row by row.

Files are read here and not by the library `datasets`, which expands patterns in names, needs a cache folder and retries damaged
files like network failures. Nothing here is retried: any problem with a file is one `DataError` that names the file.
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

from picogpt.data.layout import format_of, training_files
from picogpt.data.shards import Row, Shards, as_row
from picogpt.errors import DataError
from picogpt.signals import deferred_interrupt

__all__ = ["find_local", "read_local"]


class _NoColumn(Exception):
    """Raised for a missing column; the message names it and the columns of the file."""


Rows = Generator[Mapping[str, Any], None, None]
"""Rows of a file: column name to value."""

_OPENERS: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_DAMAGE = (OSError, ValueError, EOFError, csv.Error, lzma.LZMAError, zlib.error, RecursionError)
"""Errors that the readers raise for a damaged or truncated file, or one in another encoding."""
# The csv module rejects fields over 128 KiB by default; articles can be longer. 2^31 - 1 fits a C long everywhere.
_LONGEST_FIELD = (1 << 31) - 1
# Longest last line of a JSON file that is checked for truncation.
_LAST_BYTES = 1 << 20


def find_local(path: Path, config: str | None, columns: tuple[str, ...]) -> Shards:
    """List the training files at `path`, and check that each opens and has the columns.

    Args:
        path: a folder in the hub's layout, or a file of one of its formats.
        config: a configuration listed in its README.md, or None.
        columns: columns to read.

    Raises:
        DataError: there is no training file, or one of them cannot be read or lacks a column.
    """
    if path.is_file():
        # Only the folder is resolved: the target of a link may have a name without the suffix.
        files, name = [path.parent.resolve() / path.name], format_of(path)
        assert name is not None, path
    else:
        name, files = training_files(path.resolve(), config)
    shards = Shards(files=tuple(file.as_posix() for file in files), format=name, columns=columns, commit=None)
    # Check now: a bad file would otherwise end the run hours later, when its turn comes.
    for file in shards.files:
        with _named(file):
            _check(shards, file)
    return shards


def read_local(shards: Shards, file: str, start: int) -> Iterator[Row]:
    """Yield the columns of each row of `file`, from row `start`; null becomes an empty text.

    Raises:
        DataError: the file is damaged, or a column is missing or contains something other than text.
    """
    with _named(file), _rows(shards, file, start) as rows:
        for values in rows:
            yield as_row(shards.columns, values, file)


@contextlib.contextmanager
def _rows(shards: Shards, file: str, start: int) -> Iterator[Rows]:
    """Open a file and iterate over its rows; the rows are closed before the stream below them."""
    with _opened(file) as stream, contextlib.closing(_READERS[shards.format](stream, shards.columns, start)) as rows:
        yield rows


@contextlib.contextmanager
def _named(file: str) -> Iterator[None]:
    """Turn every error of reading `file` into a one-line `DataError`."""
    try:
        yield
    except _NoColumn as error:
        raise DataError(f"{file}: {error} with --text-column") from error
    # Before _DAMAGE, as it is a ValueError: here the position of the bad byte is known.
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 text ({error.reason} at byte {error.start:,}); convert it, or leave it out"
        ) from error
    except _DAMAGE as error:
        # The parsers' messages can span lines and quote the data: one line, at most 200 characters.
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{file}: cannot be read ({reason}); fix it or leave it out") from error


@contextlib.contextmanager
def _opened(file: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressing it if its suffix says so."""
    path = Path(file)
    with path.open("rb") as raw:
        # The parsers fail on an empty file in ways that name no cause.
        if not path.stat().st_size:
            raise ValueError("it is empty, 0 bytes")
        if opener := _OPENERS.get(path.suffix.lower()):
            with opener(raw) as stream:
                yield stream
        else:
            yield raw


def _check(shards: Shards, file: str) -> None:
    """Read the first row, and the end of JSON lines: the checks that are quick even for large files."""
    with _rows(shards, file, 0) as rows:
        first = next(rows, None)
        if first is not None:
            # A file without rows passes: it is valid, and adds nothing.
            _check_columns(shards.columns, first)
            as_row(shards.columns, first, file)
    # Parquet and Arrow have a footer, so opening them has found truncation. A compressed file would have to be read whole.
    if shards.format == "json" and Path(file).suffix.lower() not in _OPENERS:
        _check_last_line(file)


def _check_columns(columns: Sequence[str], names: Collection[str]) -> None:
    """Reject a file without one of `columns`."""
    missing = [column for column in columns if column not in names]
    if missing:
        raise _NoColumn(f"it has no column {missing[0]}; name one of {', '.join(names)}")


def _check_last_line(file: str) -> None:
    """Reject a JSON lines file that was cut short, before training reaches its end."""
    # Only the start and the end of the file are read, whatever its size.
    with Path(file).open("rb") as stream:
        if stream.read(_LAST_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return  # one list of objects, which `_json_rows` has parsed as a whole
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, size - _LAST_BYTES))
        *before, last = stream.read().rstrip().splitlines() or [b""]
    # Without a line before it, the last line may have started outside the bytes read, and cannot be judged.
    if before and last.startswith(b"{"):
        _parse(last.decode(), "its last line")


def _parquet_rows(stream: IO[bytes], columns: tuple[str, ...], start: int) -> Rows:
    """Read the rows of a Parquet file in batches, from row `start`."""
    with deferred_interrupt():
        import pyarrow.parquet as pq

    with pq.ParquetFile(stream) as file:
        _check_columns(columns, file.schema_arrow.names)
        # Skip whole row groups that end before `start`; `start` then counts from the first one read.
        first = 0
        while first < file.num_row_groups and start >= file.metadata.row_group(first).num_rows:
            start -= file.metadata.row_group(first).num_rows
            first += 1
        groups = range(first, file.num_row_groups)
        # Only the selected columns are read and decoded.
        for batch in file.iter_batches(batch_size=1000, row_groups=list(groups), columns=list(columns)):
            # Drop the rows before `start` inside the first batches.
            yield from batch.slice(start).to_pylist()
            start = max(0, start - batch.num_rows)


def _arrow_rows(stream: IO[bytes], columns: tuple[str, ...], start: int) -> Rows:
    """Read the rows of an Arrow file, from row `start`; both IPC formats occur under the suffix .arrow."""
    with deferred_interrupt():
        import pyarrow as pa

    try:
        # The streaming format, as `save_to_disk` writes it; else the random-access file format.
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
    """Read JSON objects: one per line, or one list of objects."""
    row = 0
    with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            # A list has to be parsed as a whole.
            if row == 0 and line.lstrip().startswith("["):
                yield from _json_list(line + text.read())[start:]
                return
            if row >= start:
                yield _parse(line, f"line {number:,}")
            row += 1


def _json_list(text: str) -> list[Mapping[str, Any]]:
    """Parse a JSON list of objects."""
    found = json.loads(text)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError("the list contains something other than objects")
    return found


def _parse(line: str, where: str) -> Mapping[str, Any]:
    """Parse one line of JSON lines; `where` names the line in errors."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not a complete JSON object: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} is not a JSON object")
    return found


def _csv_rows(stream: IO[bytes], _columns: tuple[str, ...], start: int) -> Rows:
    """Read a table, separated by commas or tabs, whose first line names the columns."""
    csv.field_size_limit(_LONGEST_FIELD)
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        # The header decides between comma and tab, as file suffixes are unreliable.
        head = text.readline()
        text.seek(0)
        lines = csv.reader(text, delimiter="\t" if "\t" in head and "," not in head else ",", strict=True)
        # Blank lines come as empty lists.
        filled = (fields for fields in lines if fields)
        names = next(filled, [])
        for row, fields in enumerate(filled):
            # A wrong field count is mostly a broken quote, after which text would land in the wrong column.
            if len(fields) != len(names):
                raise ValueError(f"line {lines.line_num:,} has {len(fields)} fields where the first line has {len(names)}")
            if row >= start:
                yield dict(zip(names, fields, strict=True))


def _text_rows(stream: IO[bytes], _columns: tuple[str, ...], start: int) -> Rows:
    """Read lines of plain text as the column `text`."""
    with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        for row, line in enumerate(text):
            if row >= start:
                yield {"text": line.removesuffix("\n")}


# One reader per format of `layout.FORMATS`.
_READERS: Mapping[str, Callable[[IO[bytes], tuple[str, ...], int], Rows]] = {
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
    "json": _json_rows,
    "csv": _csv_rows,
    "text": _text_rows,
}
