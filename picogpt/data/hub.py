"""Data sets of the hub, and folders laid out like them, file by file: the one place that touches `datasets`.

Nothing is downloaded as a whole. The list of files is fixed by a commit, which belongs to the run; each file is then streamed
on its own, so that the order of files and the place in them are ours to keep.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from picogpt.errors import ConfigError, DataError

__all__ = ["NAMED_STREAMS", "Shards", "StreamSpec", "explain", "find_shards", "read_rows", "remedy", "resolve_stream"]

Row = tuple[str, ...]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_COMMIT = re.compile(r"@([0-9a-f]{40})/")


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """Which data set is meant."""

    name: str
    """What the user calls it."""
    path: str
    """The hub's ORG/NAME, or a folder."""
    config: str | None = None
    """The hub's name of one of its parts."""
    columns: tuple[str, ...] = ("text",)
    """The column that holds the text, or those of question and answer."""

    @property
    def short_name(self) -> str:
        """The last part of its name, as a run can be called."""
        last = self.name.partition(":")[0].rstrip("/").rpartition("/")[2]
        return re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:64] or "stream"


NAMED_STREAMS = {
    "wikipedia": StreamSpec(name="wikipedia", path="wikimedia/wikipedia", config="20231101.en"),
    "tinytextbook": StreamSpec(name="tinytextbook", path="nampdn-ai/tiny-strange-textbooks"),
    "openorca": StreamSpec(name="openorca", path="Open-Orca/OpenOrca", columns=("question", "response")),
}
"""Data sets with a name of their own."""


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
        """SHA-256 of the columns and of what the files are called and, in a folder, how long they are."""
        sizes = [Path(file).stat().st_size if self.commit is None else 0 for file in self.files]
        return hashlib.sha256(repr((self.columns, list(zip(self.files, sizes, strict=True)))).encode()).hexdigest()


def resolve_stream(name: str, text_column: str | None) -> StreamSpec:
    """The data set that `name` means: a name of `NAMED_STREAMS`, a folder, or the hub's ORG/NAME[:CONFIG].

    Raises:
        ConfigError: it is none of these.
    """
    columns = (text_column or "text",)
    if name in NAMED_STREAMS:
        named = NAMED_STREAMS[name]
        return named if text_column is None else replace(named, columns=columns)
    if Path(name).is_dir():
        return StreamSpec(name=name, path=str(Path(name).absolute()), columns=columns)
    if _HUB_NAME.fullmatch(name):
        path, _, config = name.partition(":")
        return StreamSpec(name=name, path=path, config=config or None, columns=columns)
    raise ConfigError(
        f"dataset must be auto, sample, tinyshakespeare, {', '.join(NAMED_STREAMS)}, ORG/NAME[:CONFIG] or a folder, got {name!r}",
        "dataset",
    )


def find_shards(spec: StreamSpec) -> Shards:
    """Ask the hub, or look into the folder, for the files of `spec`'s part `train` at the newest commit.

    Raises:
        DataError: the data set, its part or its column is not there, or the hub cannot be reached.
    """
    datasets = _library()
    try:
        builder = datasets.load_dataset_builder(spec.path, spec.config)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{spec.path}: no such data set on the hub, or one that needs permission (set HF_TOKEN); {_first_line(error)}"
        ) from error
    except ValueError as error:
        raise DataError(f"{spec.path}: {_first_line(error)}; name one of these as {spec.path}:CONFIG") from error
    except OSError as error:
        raise DataError(
            f"{spec.path}: the hub cannot be reached ({_first_line(error)}); check the network and HF_HUB_OFFLINE, or use --text"
        ) from error
    found = dict(builder.config.data_files or {})
    files = tuple(str(file) for file in found.get("train", ()))
    if not files or builder.name is None:
        raise DataError(f"{spec.path}: it has no files of a part named train; there are {', '.join(map(str, found)) or 'none'}")
    commit = _COMMIT.search(files[0])
    shards = Shards(files=files, format=builder.name, columns=spec.columns, commit=commit[1] if commit else None)
    _check_columns(spec, shards)
    return shards


def _check_columns(spec: StreamSpec, shards: Shards) -> None:
    try:
        names = _open(shards, shards.files[0]).column_names
    except OSError as error:
        raise DataError(f"{shards.files[0]}: cannot be read ({explain(error)}); check the network") from error
    missing = [column for column in spec.columns if column not in (names or ())]
    if missing:
        raise DataError(f"{spec.path}: it has no column {missing[0]}; name one of {', '.join(names or ())} with --text-column")


def _library() -> Any:
    """`datasets`, told to leave waiting, and talking about it, to us: by itself it would be silent for minutes, then give up."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    for name in ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT", "OPEN"):
        setattr(datasets.config, f"STREAMING_{name}_RETRY_INTERVAL", 0)
    for logging in (datasets.logging, huggingface_hub.logging):
        logging.set_verbosity(logging.CRITICAL)
    return datasets


def _open(shards: Shards, file: str, **options: Any) -> Any:
    return _library().load_dataset(shards.format, data_files={"train": [file]}, split="train", streaming=True, **options)


def read_rows(shards: Shards, file: str, start: int) -> Iterator[Row]:
    """The columns of each row of one file, from row `start` on; null is an empty text.

    Raises:
        DataError: a column holds something else than text.
        Exception: whatever the libraries raise where the file cannot be read.
    """
    columns = list(shards.columns)
    # Of a parquet file no more than these columns is downloaded.
    rows = _open(shards, file, **({"columns": columns} if shards.format == "parquet" else {})).select_columns(columns)
    if start:
        rows = rows.skip(start)
    iterator = iter(rows)
    try:
        for row in iterator:
            yield tuple(_text(row[column], column, file) for column in columns)
    finally:
        # A reader that is left open goes on reading.
        iterator.close()


def _text(value: Any, column: str, file: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise DataError(f"{file}: column {column} holds {type(value).__name__}, not text; name another one with --text-column")


def remedy(error: BaseException) -> str | None:
    """What to do about an error that waiting does not mend; None where it may."""
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if type(cause).__name__ == "OfflineModeIsEnabled":
            return "unset HF_HUB_OFFLINE to go on"
        if isinstance(cause, PermissionError) or status in {401, 403}:
            return "set HF_TOKEN to one that may read it"
        if isinstance(cause, FileNotFoundError) or status in {404, 410, 416}:
            return "it is there no more, or not at the run's commit; --fresh starts over with the newest"
    return None


def explain(error: BaseException) -> str:
    """What happened, on one line, as the innermost error tells it."""
    *_, innermost = _causes(error)
    return f"{type(innermost).__name__}: {_first_line(innermost)[:200]}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
