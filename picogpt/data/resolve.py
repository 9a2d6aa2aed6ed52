"""From names and paths to a text: files or a corpus in memory, or a stream; for a new run or as a stored run has it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from picogpt.checks import check_text_column
from picogpt.config import DataConfig, GPTConfig, TextRequest, TrainConfig
from picogpt.data.articles import ArticleReader, Ids, draw_validation
from picogpt.data.batches import Source, TextSource
from picogpt.data.corpora import DATASETS, Progress, load_dataset
from picogpt.data.hub import StreamSpec, find_shards, resolve_stream
from picogpt.data.network import check_environment
from picogpt.data.outage import START_PATIENCE
from picogpt.data.shards import Shards
from picogpt.data.stream import StreamSource
from picogpt.data.text import Corpus, check_unknown, read_texts
from picogpt.files import existing_folder
from picogpt.wording import Notify, plural

__all__ = ["Console", "FoundText", "find_text", "stored_shards", "text_name"]

FEW_CHARS = 100_000
"""Characters to train on below which a text is said to be short."""


class Console(NamedTuple):
    """How the search for a text is shown."""

    notify: Notify
    download: Callable[[str], AbstractContextManager[Progress]]
    """Makes a progress display for a download, given the name of what is downloaded."""


class FoundText(Protocol):
    """What a run learns from, found but not yet cut into batches."""

    name: str

    def describe(self) -> DataConfig:
        """What goes into the run's config."""

    def source(self, model: GPTConfig, config: TrainConfig, val_ids: Ids | None) -> Source:
        """Its batches; `val_ids` is the validation text of a resumed run on a stream."""


class _LocalText:
    """A text in memory.

    Args:
        name: its short name.
        read: reads it, when it is first needed.
        paths: the paths that it is read from, if it is the user's own.
        stored: the text of the run that is resumed.
        notify: given a line about the text.
    """

    def __init__(
        self, name: str, read: Callable[[], Corpus], paths: tuple[str, ...], stored: DataConfig | None, notify: Notify
    ) -> None:
        self.name = name
        self._read, self._paths, self._stored, self._notify = read, paths, stored, notify

    @functools.cached_property
    def _corpus(self) -> Corpus:
        return self._read()

    def describe(self) -> DataConfig:
        """Its length and fingerprint."""
        corpus = self._corpus
        return DataConfig(
            dataset=None if self._paths else corpus.name,
            text=self._paths,
            name=corpus.name,
            characters=len(corpus.ids),
            sha256=corpus.fingerprint,
            fold=corpus.fold,
        )

    def source(self, model: GPTConfig, config: TrainConfig, val_ids: Ids | None) -> Source:  # noqa: ARG002 (cut from the text)
        """Batches of passes over it."""
        corpus = self._corpus
        sequence_len = config.windows * model.context_len
        source = TextSource(corpus, sequence_len=sequence_len, batch_size=config.batch_size, seed=config.seed)
        self._notify(
            f"{corpus.name}: {len(corpus.ids):,} characters, {len(source.train_ids):,} to train on and {len(source.val_ids):,} "
            f"to validate; {corpus.tally}{self._advice(len(source.train_ids))}"
        )
        # A run of an earlier version may have begun on a text that is rejected now.
        check_unknown(corpus.name, corpus.tally, self._notify, reject=self._stored is None)
        return source

    @staticmethod
    def _advice(characters: int) -> str:
        """A warning of a text with few characters to train on."""
        return "" if characters >= FEW_CHARS else f"; short, so soon learned by heart: better {FEW_CHARS:,} characters or more"


class _HubStream:
    """A data set of the hub, or a folder like one.

    Args:
        spec: the data set.
        text_column: the column that was asked for.
        stored: the text of the run that is resumed.
        fold: whether characters outside ASCII are folded.
        notify: given a line about the stream, and about every wait for the network.
    """

    def __init__(
        self, spec: StreamSpec, text_column: str | None, stored: DataConfig | None, *, fold: bool, notify: Notify
    ) -> None:
        self.name = spec.short_name
        self._spec, self._text_column, self._stored, self._fold, self._notify = spec, text_column, stored, fold, notify

    @functools.cached_property
    def _shards(self) -> Shards:
        """The files: those of the run's commit, or the newest ones."""
        return stored_shards(self._spec, self._stored) or find_shards(self._spec, self._notify)

    def describe(self) -> DataConfig:
        """Its commit, its files and their fingerprint."""
        shards = self._shards
        return DataConfig(
            dataset=self._spec.address,
            name=self.name,
            characters=None,
            sha256=shards.fingerprint,
            commit=shards.commit,
            text_column=self._text_column,
            files=shards.files,
            format=shards.format,
            fold=self._fold,
        )

    def source(self, model: GPTConfig, config: TrainConfig, val_ids: Ids | None) -> Source:
        """Batches drawn from a pool; the validation text is drawn here, or is the run's own."""
        where = f"at commit {self._shards.commit[:12]}" if self._shards.commit else "in this folder"
        files = plural(len(self._shards.files), "file")
        self._notify(f"{self._spec.path}: {files} {where}, streamed; one article in twenty is for validation")
        sequence_len = config.windows * model.context_len
        if val_ids is None:
            val_ids = self._draw_validation(config.seed, sequence_len)
        self._notify(f"validation text: {len(val_ids):,} characters, the same for the whole run")
        return StreamSource(
            ArticleReader(self._shards, config.seed, self._notify, fold=self._fold),
            val_ids,
            sequence_len=sequence_len,
            batch_size=config.batch_size,
            seed=config.seed,
        )

    def _draw_validation(self, seed: int, sequence_len: int) -> Ids:
        """The validation text; the articles that are read for it show what the stream's characters are.

        Raises:
            DataError: there is none, the stream is too short, or most of these articles' characters are unknown.
        """
        reader = ArticleReader(self._shards, seed, self._notify, fold=self._fold, patience=START_PATIENCE)
        ids = draw_validation(reader, sequence_len=sequence_len)
        self._notify(f"{self._spec.path}: of its first {reader.tally.characters:,} characters: {reader.tally}")
        check_unknown(self._spec.path, reader.tally, self._notify)
        return ids


def stored_shards(spec: StreamSpec, stored: DataConfig | None) -> Shards | None:
    """The files that a run on `spec` has stored, at its commit of the hub, which need no network to be listed; else None.

    Raises:
        DataError: the environment's settings for the hub are not valid.
    """
    if stored is None or stored.commit is None or stored.format is None or stored.dataset != spec.name:
        return None
    check_environment()
    return Shards(files=stored.files, format=stored.format, columns=spec.columns, commit=stored.commit)


def text_name(paths: Sequence[str]) -> str:
    """The name of a text from the user's own files: that of the first one, as far as it can be a run's name."""
    first = paths[0]
    letters = "stdin" if first == "-" else re.sub(r"[^A-Za-z0-9._-]", "-", Path(first).stem)
    return letters.lstrip("._-")[:64] or "text"


def find_text(asked: TextRequest, stored: DataConfig | None, *, scratch: Path, console: Console) -> FoundText:
    """Find the text that is asked for, or the one that a stored run learns from.

    Args:
        asked: names or paths.
        stored: the text of the run that is resumed; None for a new run.
        scratch: folder whose disk holds a text that is too long for memory.
        console: given lines about the text, and the progress of a download.

    Raises:
        ConfigError: there is no such data set, or a column is named without one.
        DataError: the text cannot be had.
    """
    paths, dataset, column, notify = asked.paths, asked.dataset, asked.column, console.notify
    if not asked.is_named and stored is not None:
        paths, dataset = stored.text, stored.dataset
    check_text_column(column, streamed=not paths and dataset is not None and dataset not in DATASETS)
    fold = stored.fold if stored else asked.fold is not False
    if paths:
        name, scratch = text_name(paths), existing_folder(scratch)
        read = functools.partial(read_texts, paths, name=name, scratch=scratch, fold=fold, notify=notify)
        return _LocalText(name, read, paths, stored, notify)
    if dataset is None or dataset in DATASETS:
        # These texts are ASCII, so folding makes no difference to them.
        with console.download("Tiny Shakespeare") as progress:
            corpus = replace(load_dataset(dataset or "auto", notify=notify, progress=progress), fold=fold)
        return _LocalText(corpus.name, lambda: corpus, (), stored, notify)
    column = column or (stored.text_column if stored else None)
    return _HubStream(resolve_stream(dataset, column), column, stored, fold=fold, notify=notify)
