"""Data sets of the Hugging Face hub, and local folders in the same layout or single files (`picogpt.data.local`).

This is the only module that imports `datasets`. Nothing is downloaded as a whole: a commit, stored in the run, pins the list of
files, and each file is streamed on its own. So this package controls file order and resume position, not the library.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from picogpt.data.corpora import DATASETS
from picogpt.data.layout import COMPRESSIONS, FORMATS, format_of, stem_of
from picogpt.data.local import find_local, read_local
from picogpt.data.network import check_environment, disable_retries, explain, first_line, hint, is_transient
from picogpt.data.outage import START_PATIENCE, Outage, run_in_thread
from picogpt.data.shards import Row, Shards, as_row
from picogpt.errors import ConfigError, DataError
from picogpt.wording import did_you_mean, plural

__all__ = ["NAMED_STREAMS", "StreamSpec", "find_shards", "read_rows", "resolve_stream"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_FILES = f"a file of {', '.join(FORMATS)}, which may be compressed ({', '.join(COMPRESSIONS)})"
_COMMIT = re.compile(r"@([0-9a-f]{40})/")


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """Data set requested by the user."""

    name: str
    """Name as the user wrote it."""
    path: str
    """ORG/NAME on the hub, or the absolute path of a folder or file."""
    config: str | None = None
    """Configuration (subset) of the data set; None for the default."""
    columns: tuple[str, ...] = ("text",)
    """Text column, or the question and answer columns."""
    is_file: bool = False
    """Whether `path` is a single file."""

    @property
    def is_local(self) -> bool:
        """Whether the data set is a local folder or file."""
        return Path(self.path).is_absolute()

    @property
    def address(self) -> str:
        """Name stored in the run: valid from any working directory."""
        return (self.path + (f":{self.config}" if self.config else "")) if self.is_local else self.name

    @property
    def short_name(self) -> str:
        """Last part of the name, without the suffixes of a file, reduced to characters that a run name allows."""
        if self.is_local:
            last = stem_of(Path(self.path)) if self.is_file else Path(self.path).name
        else:
            last = self.name.partition(":")[0].rpartition("/")[2]
        return re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:64] or "stream"

    def describe(self, shards: Shards) -> str:
        """Return a phrase for the user: the path, and how many files at which commit."""
        if self.is_file:
            return f"{self.path}: one file"
        where = f"at commit {shards.commit[:12]}" if shards.commit else "in this folder"
        return f"{self.path}: {plural(len(shards.files), 'file')} {where}"


NAMED_STREAMS = {
    "wikipedia": StreamSpec(name="wikipedia", path="wikimedia/wikipedia", config="20231101.en"),
    "tinytextbook": StreamSpec(name="tinytextbook", path="nampdn-ai/tiny-strange-textbooks"),
    "openorca": StreamSpec(name="openorca", path="Open-Orca/OpenOrca", columns=("question", "response")),
}
"""Short names for data sets of the hub."""


def resolve_stream(name: str, text_column: str | None) -> StreamSpec:
    """Resolve `name`: one of `NAMED_STREAMS`, a folder, FOLDER:CONFIG, a file, or ORG/NAME[:CONFIG] on the hub.

    Raises:
        ConfigError: `name` is none of these.
    """
    columns = (text_column or "text",)
    if name in NAMED_STREAMS:
        # --text-column replaces the columns, so openorca can also be read as plain text.
        named = NAMED_STREAMS[name]
        return named if text_column is None else replace(named, columns=columns)
    # Existing folders come first, and literally: a folder called `d:e` wins over configuration `e` of `d`.
    folder, _, part = name.rpartition(":")
    for path, config in ((name, None), (folder, part)):
        if path and Path(path).is_dir():
            return StreamSpec(name=name, path=str(Path(path).absolute()), config=config, columns=columns)
    has_format = format_of(Path(name)) is not None
    if has_format and Path(name).is_file():
        return StreamSpec(name=name, path=str(Path(name).absolute()), columns=columns, is_file=True)
    # From here on only errors and hub names; catch likely mistakes before they become a failed request.
    if Path(name).exists():
        raise ConfigError(f"dataset {name}: not {_FILES}; give a plain text with --text", "dataset")
    # A data set of the hub whose name ends like a file needs its CONFIG.
    if has_format or Path(name).is_absolute() or name.startswith((".", "~")):
        what = f"ORG/NAME[:CONFIG] on the hub, a folder, or {_FILES}"
        raise ConfigError(f"dataset {name}: there is no such folder or file; name {what}", "dataset")
    if _HUB_NAME.fullmatch(name):
        path, _, config = name.partition(":")
        return StreamSpec(name=name, path=path, config=config or None, columns=columns)
    names = (*DATASETS, *NAMED_STREAMS)
    suggestion = did_you_mean(name, names)
    raise ConfigError(
        f"dataset must be {', '.join(names)}, ORG/NAME[:CONFIG], a folder, or {_FILES}, got {name!r}"
        + (f"; {suggestion}" if suggestion else ""),
        "dataset",
    )


def find_shards(spec: StreamSpec, notify: Callable[[str], None] = lambda _: None) -> Shards:
    """List the files of the train split, on the hub at its newest commit or on the disk.

    Requests to a hub that does not answer are retried for `picogpt.data.outage.START_PATIENCE` seconds.

    Args:
        spec: the data set.
        notify: receives one line per wait.

    Raises:
        DataError: the data set, its train split or its column does not exist, a local file cannot be read, an environment
            variable is malformed, or the hub does not answer.
    """
    if spec.is_local:
        return find_local(Path(spec.path), spec.config, spec.columns)
    # In a thread, so that Ctrl-C ends the wait at once.
    return run_in_thread(lambda pause: _find_on_hub(spec, Outage(notify, pause, patience=START_PATIENCE)))


def _find_on_hub(spec: StreamSpec, outage: Outage) -> Shards:
    """Query the hub until it answers, an error turns out to be fatal, or `outage` gives up."""
    while True:
        try:
            return _ask_hub(spec)
        except DataError:  # noqa: PERF203 - a try that fails waits for a second at least
            raise
        except Exception as error:  # the libraries below raise nearly anything when a connection breaks
            # A fatal error comes with advice; everything else is worth a retry.
            if advice := hint(error):
                raise DataError(f"{spec.path}: the hub cannot be reached ({explain(error)}); {advice}") from error
            outage.wait(spec.path, explain(error), damaged=not is_transient(error))


def _ask_hub(spec: StreamSpec) -> Shards:
    """Query the hub once for the list of files, pinned to a commit, and check that the columns exist."""
    datasets = _library()
    try:
        builder = datasets.load_dataset_builder(spec.path, spec.config)
    except datasets.exceptions.DatasetNotFoundError as error:
        # The library reports a broken connection as a missing data set, too; let the caller retry.
        if is_transient(error):
            raise
        raise DataError(
            f"{spec.path}: no such data set on the hub, or it needs permission (set HF_TOKEN); {first_line(error)}"
        ) from error
    except (datasets.data_files.EmptyDatasetError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise DataError(f"{spec.path}: it has no data files ({first_line(error)})") from error
    except ValueError as error:
        # The library raises a bare ValueError for a missing or ambiguous configuration; only its text tells.
        if "onfig" not in first_line(error):
            raise
        raise DataError(f"{spec.path}: {first_line(error)}; name one of these as {spec.path}:CONFIG") from error
    found = dict(builder.config.data_files or {})
    files = tuple(str(file) for file in found.get("train", ()))
    # Streaming always starts from the train split; validation is held out of it.
    if not files or builder.name is None:
        raise DataError(f"{spec.path}: it has no train split; it has {', '.join(map(str, found)) or 'no splits'}")
    # File addresses contain the resolved commit: hf://datasets/ORG/NAME@<40 hex digits>/path.
    commit = _COMMIT.search(files[0])
    assert commit is not None, files[0]
    shards = Shards(files=files, format=builder.name, columns=spec.columns, commit=commit[1])
    names = _column_names(shards)
    # Report a missing column before training instead of reading empty texts.
    missing = [column for column in spec.columns if column not in names]
    if missing:
        raise DataError(f"{spec.path}: it has no column {missing[0]}; name one of {', '.join(names)} with --text-column")
    return shards


def _column_names(shards: Shards) -> list[str]:
    """Return the columns of the first file; for CSV and text they are known only after reading a row."""
    rows = _open(shards, shards.files[0])
    if rows.column_names is not None:
        return list(rows.column_names)
    iterator = iter(rows)
    try:
        return list(next(iterator, {}))
    finally:
        iterator.close()


@functools.cache
def _library() -> Any:
    """Import `datasets` without its own retries, progress bars and log lines.

    By itself the library retries silently for minutes and then gives up. Here every failure is raised at once, and
    `picogpt.data.outage` waits, tells the user and decides when to stop.
    """
    check_environment()
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    # Skip the hub's parquet conversion service: it is not needed, and could delay the start.
    datasets.config.USE_PARQUET_EXPORT = False
    # One attempt per request, without a pause after it.
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    for name in ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT", "OPEN"):
        setattr(datasets.config, f"STREAMING_{name}_RETRY_INTERVAL", 0)
    for logging in (datasets.logging, huggingface_hub.logging):
        logging.set_verbosity(logging.CRITICAL)
    disable_retries()
    return datasets


def _open(shards: Shards, file: str, **options: Any) -> Any:
    """Open one file as a streaming data set; its name is literal, where `load_dataset` would expand patterns."""
    datasets = _library()
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if shards.format == "csv":
        # Pandas would read the word NA as missing. The csv builder also reads .tsv files, but has to be told the separator.
        options |= {"keep_default_na": False, "sep": "\t" if ".tsv" in file else ","}
    # Build the packaged reader of the format by hand, with an explicit list of one file.
    builder_class = datasets.load.import_main_class(_PACKAGED_DATASETS_MODULES[shards.format][0])
    files = datasets.data_files.DataFilesDict({"train": datasets.data_files.DataFilesList([file], [(file,)])})
    return builder_class(data_files=files, dataset_name=shards.format, **options).as_streaming_dataset(split="train")


def read_rows(shards: Shards, file: str, start: int) -> Iterator[Row]:
    """Yield the columns of each row of one file, from row `start`; null becomes an empty text.

    Raises:
        DataError: a column contains something other than text, or a local file cannot be read.
        Exception: any error of the libraries while reading from the hub.
    """
    # No commit: a local folder or file.
    if shards.commit is None:
        yield from read_local(shards, file, start)
        return
    columns = list(shards.columns)
    # Parquet is columnar: only the byte ranges of these columns are downloaded.
    rows = _open(shards, file, **({"columns": columns} if shards.format == "parquet" else {})).select_columns(columns)
    if start:
        # Resume inside the file.
        rows = rows.skip(start)
    iterator = iter(rows)
    try:
        for row in iterator:
            yield as_row(columns, row, file)
    finally:
        # Close explicitly: an abandoned iterator keeps prefetching.
        iterator.close()
