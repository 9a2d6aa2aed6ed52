"""Data sets of the hub, and folders laid out like them (`picogpt.data.local`): the one place that touches `datasets`.

Nothing is downloaded as a whole. The list of files is fixed by a commit, which belongs to the run; each file is then streamed
on its own, so that the order of files and the place in them are ours to keep.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from picogpt.data.local import find_local, read_local
from picogpt.data.network import check_environment, disable_retries, explain, first_line, hint, is_transient
from picogpt.data.outage import START_PATIENCE, Outage, run_in_thread
from picogpt.data.shards import Row, Shards, as_row
from picogpt.errors import ConfigError, DataError

__all__ = ["NAMED_STREAMS", "StreamSpec", "find_shards", "read_rows", "resolve_stream"]

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
    def is_folder(self) -> bool:
        """Whether it is a folder of this computer."""
        return Path(self.path).is_absolute()

    @property
    def address(self) -> str:
        """A name for it that means the same from any folder."""
        return (self.path + (f":{self.config}" if self.config else "")) if self.is_folder else self.name

    @property
    def short_name(self) -> str:
        """The last part of its name, as a run can be called."""
        last = Path(self.path).name if self.is_folder else self.name.partition(":")[0].rpartition("/")[2]
        return re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:64] or "stream"


NAMED_STREAMS = {
    "wikipedia": StreamSpec(name="wikipedia", path="wikimedia/wikipedia", config="20231101.en"),
    "tinytextbook": StreamSpec(name="tinytextbook", path="nampdn-ai/tiny-strange-textbooks"),
    "openorca": StreamSpec(name="openorca", path="Open-Orca/OpenOrca", columns=("question", "response")),
}
"""Data sets with a name of their own."""


def resolve_stream(name: str, text_column: str | None) -> StreamSpec:
    """The data set that `name` means: a name of `NAMED_STREAMS`, a folder, FOLDER:CONFIG, or the hub's ORG/NAME[:CONFIG].

    Raises:
        ConfigError: it is none of these.
    """
    columns = (text_column or "text",)
    if name in NAMED_STREAMS:
        named = NAMED_STREAMS[name]
        return named if text_column is None else replace(named, columns=columns)
    # A folder called `d:e` is itself, and not the part `e` of `d`.
    folder, _, part = name.rpartition(":")
    for path, config in ((name, None), (folder, part)):
        if path and Path(path).is_dir():
            return StreamSpec(name=name, path=str(Path(path).absolute()), config=config, columns=columns)
    if Path(name).exists():
        raise ConfigError(f"dataset {name} is a file; name the folder that it is in, or give a plain text with --text", "dataset")
    if Path(name).is_absolute() or name.startswith((".", "~")):
        raise ConfigError(f"dataset {name}: there is no such folder", "dataset")
    if _HUB_NAME.fullmatch(name):
        path, _, config = name.partition(":")
        return StreamSpec(name=name, path=path, config=config or None, columns=columns)
    raise ConfigError(
        f"dataset must be auto, sample, tinyshakespeare, {', '.join(NAMED_STREAMS)}, ORG/NAME[:CONFIG] or a folder, got {name!r}",
        "dataset",
    )


def find_shards(spec: StreamSpec, notify: Callable[[str], None] = lambda _: None) -> Shards:
    """Ask the hub, or look into the folder, for the files of `spec`'s part `train` at the newest commit.

    A hub that does not answer is asked again for `picogpt.data.outage.START_PATIENCE` seconds.

    Args:
        spec: the data set.
        notify: told in a line of every wait.

    Raises:
        DataError: the data set, its part or its column is not there, a file of a folder cannot be read, a variable of the
            environment is malformed, or the hub does not answer.
    """
    if spec.is_folder:
        return find_local(Path(spec.path), spec.config, spec.columns)
    return run_in_thread(lambda pause: _find_on_hub(spec, Outage(notify, pause, patience=START_PATIENCE)))


def _find_on_hub(spec: StreamSpec, outage: Outage) -> Shards:
    while True:
        try:
            return _ask_hub(spec)
        except DataError:  # noqa: PERF203 - a try that fails waits for a second at least
            raise
        except Exception as error:  # the libraries below raise nearly anything when a connection breaks
            if advice := hint(error):
                raise DataError(f"{spec.path}: the hub cannot be reached ({explain(error)}); {advice}") from error
            outage.wait(spec.path, explain(error), damaged=not is_transient(error))


def _ask_hub(spec: StreamSpec) -> Shards:
    """The list of files and the names of the columns, as of now."""
    datasets = _library()
    try:
        builder = datasets.load_dataset_builder(spec.path, spec.config)
    except datasets.exceptions.DatasetNotFoundError as error:
        if is_transient(error):
            raise
        raise DataError(
            f"{spec.path}: no such data set on the hub, or one that needs permission (set HF_TOKEN); {first_line(error)}"
        ) from error
    except (datasets.data_files.EmptyDatasetError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise DataError(f"{spec.path}: there is no file of a data set in it ({first_line(error)})") from error
    except ValueError as error:
        if "onfig" not in first_line(error):
            raise
        raise DataError(f"{spec.path}: {first_line(error)}; name one of these as {spec.path}:CONFIG") from error
    found = dict(builder.config.data_files or {})
    files = tuple(str(file) for file in found.get("train", ()))
    if not files or builder.name is None:
        raise DataError(f"{spec.path}: it has no files of a part named train; there are {', '.join(map(str, found)) or 'none'}")
    commit = _COMMIT.search(files[0])
    assert commit is not None, files[0]
    shards = Shards(files=files, format=builder.name, columns=spec.columns, commit=commit[1])
    names = _column_names(shards)
    missing = [column for column in spec.columns if column not in names]
    if missing:
        raise DataError(f"{spec.path}: it has no column {missing[0]}; name one of {', '.join(names)} with --text-column")
    return shards


def _column_names(shards: Shards) -> list[str]:
    """The columns of the first file; those of a CSV or a text are known only once a row has been read."""
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
    """`datasets`, told to leave waiting, and talking about it, to us: by itself it would be silent for minutes, then give up."""
    check_environment()
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    # What another service of the hub may know of the data set is of no use here, and could keep a start waiting.
    datasets.config.USE_PARQUET_EXPORT = False
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    for name in ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT", "OPEN"):
        setattr(datasets.config, f"STREAMING_{name}_RETRY_INTERVAL", 0)
    for logging in (datasets.logging, huggingface_hub.logging):
        logging.set_verbosity(logging.CRITICAL)
    disable_retries()
    return datasets


def _open(shards: Shards, file: str, **options: Any) -> Any:
    """The rows of one file, whose name is taken as it is: `load_dataset` would take it for a pattern."""
    datasets = _library()
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if shards.format == "csv":
        # A text may be the word NA. Tables of tabs are read as csv too, which the list of files does not keep.
        options |= {"keep_default_na": False, "sep": "\t" if ".tsv" in file else ","}
    builder_class = datasets.load.import_main_class(_PACKAGED_DATASETS_MODULES[shards.format][0])
    files = datasets.data_files.DataFilesDict({"train": datasets.data_files.DataFilesList([file], [(file,)])})
    return builder_class(data_files=files, dataset_name=shards.format, **options).as_streaming_dataset(split="train")


def read_rows(shards: Shards, file: str, start: int) -> Iterator[Row]:
    """The columns of each row of one file, from row `start` on; null is an empty text.

    Raises:
        DataError: a column holds something else than text, or a local file cannot be read.
        Exception: whatever the libraries raise where a file of the hub cannot be read.
    """
    if shards.commit is None:
        yield from read_local(shards, file, start)
        return
    columns = list(shards.columns)
    # Of a parquet file no more than these columns is downloaded.
    rows = _open(shards, file, **({"columns": columns} if shards.format == "parquet" else {})).select_columns(columns)
    if start:
        rows = rows.skip(start)
    iterator = iter(rows)
    try:
        for row in iterator:
            yield as_row(columns, row, file)
    finally:
        # A reader that is left open goes on reading.
        iterator.close()
