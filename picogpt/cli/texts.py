"""What a run learns from, found by its flags: a text in memory or a stream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from picogpt.cli.common import notice
from picogpt.cli.settings import Request
from picogpt.config import DataConfig, GPTConfig, RunSettings, TrainConfig, check_text_column
from picogpt.wording import plural

if TYPE_CHECKING:
    from picogpt.data import Corpus, Shards, Source, StreamSpec
    from picogpt.data.articles import Ids
    from picogpt.run import RunFolder

__all__ = ["Text", "find_text"]

FEW_CHARS = 100_000
"""Characters to train on below which a text is said to be short."""


class Text(Protocol):
    """What a run learns from, found but not yet cut into batches."""

    name: str

    def describe(self) -> DataConfig:
        """What goes into the run's config."""

    def source(self, model: GPTConfig, config: TrainConfig, run: RunFolder | None) -> Source:
        """Its batches; `run` is the folder of a run that goes on."""


class _Whole:
    """A text in memory.

    Args:
        name: its short name.
        read: reads it, when it is first needed.
        text: the paths that it is read from, if it is the user's own.
        stored: the text of the run that goes on.
    """

    def __init__(self, name: str, read: Callable[[], Corpus], text: tuple[str, ...], stored: DataConfig | None) -> None:
        self.name = name
        self._read, self._text, self._stored = read, text, stored

    @functools.cached_property
    def _corpus(self) -> Corpus:
        return self._read()

    def describe(self) -> DataConfig:
        """Its length and fingerprint."""
        corpus = self._corpus
        return DataConfig(
            dataset=None if self._text else corpus.name,
            text=self._text,
            name=corpus.name,
            characters=len(corpus.ids),
            sha256=corpus.fingerprint,
            fold=corpus.fold,
        )

    def source(self, model: GPTConfig, config: TrainConfig, run: RunFolder | None) -> Source:  # noqa: ARG002
        """Batches of passes over it."""
        from picogpt.data import TextSource, check_unknown

        corpus = self._corpus
        roll_len = config.windows * model.context_len
        source = TextSource(corpus, roll_len=roll_len, batch_size=config.batch_size, seed=config.seed)
        notice(
            f"{corpus.name}: {len(corpus.ids):,} characters, {len(source.train_ids):,} to train on and {len(source.val_ids):,} "
            f"to validate; {corpus.tally}{self._advice(len(source.train_ids))}"
        )
        # A run of an earlier version may have begun on a text that is rejected now.
        check_unknown(corpus.name, corpus.tally, notice, reject=self._stored is None)
        return source

    @staticmethod
    def _advice(characters: int) -> str:
        """A warning of a text with few characters to train on."""
        return "" if characters >= FEW_CHARS else f"; short, so soon learned by heart: better {FEW_CHARS:,} characters or more"


class _Streamed:
    """A data set of the hub, or a folder like one.

    Args:
        spec: the data set.
        text_column: the column that was asked for.
        stored: the text of the run that goes on.
        fold: whether characters outside ASCII are folded.
    """

    def __init__(self, spec: StreamSpec, text_column: str | None, stored: DataConfig | None, *, fold: bool) -> None:
        self.name = spec.short_name
        self._spec, self._text_column, self._stored, self._fold = spec, text_column, stored, fold

    @functools.cached_property
    def _shards(self) -> Shards:
        """The files: those of the run's commit, which need no network to be named, or the newest ones."""
        from picogpt.data import Shards, check_environment, find_shards

        stored = self._stored
        if stored is None or stored.commit is None or stored.format is None or stored.dataset != self._spec.name:
            return find_shards(self._spec, notice)
        check_environment()
        return Shards(files=stored.files, format=stored.format, columns=self._spec.columns, commit=stored.commit)

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

    def source(self, model: GPTConfig, config: TrainConfig, run: RunFolder | None) -> Source:
        """Batches drawn from a pool; the validation text is drawn here, or is the run's own."""
        from picogpt.data import ArticleReader, StreamSource

        where = f"at commit {self._shards.commit[:12]}" if self._shards.commit else "in this folder"
        files = plural(len(self._shards.files), "file")
        notice(f"{self._spec.path}: {files} {where}, streamed; one article in twenty is for validation")
        roll_len = config.windows * model.context_len
        val_ids = run.load_validation() if run else self._draw_validation(config.seed, roll_len)
        notice(f"validation text: {len(val_ids):,} characters, the same for the whole run")
        return StreamSource(
            ArticleReader(self._shards, config.seed, notice, fold=self._fold),
            val_ids,
            roll_len=roll_len,
            batch_size=config.batch_size,
            seed=config.seed,
        )

    def _draw_validation(self, seed: int, roll_len: int) -> Ids:
        """The validation text; the articles that are read for it show what the stream's characters are.

        Raises:
            DataError: there is none, the stream is too short, or most of these articles' characters are unknown.
        """
        from picogpt.data import START_PATIENCE, ArticleReader, check_unknown, draw_validation

        reader = ArticleReader(self._shards, seed, notice, fold=self._fold, patience=START_PATIENCE)
        ids = draw_validation(reader, roll_len=roll_len)
        notice(f"{self._spec.path}: of its first {reader.tally.characters:,} characters: {reader.tally}")
        check_unknown(self._spec.path, reader.tally, notice)
        return ids


def find_text(request: Request, stored: RunSettings | None) -> Text:
    """Find the text that the flags name, or that the run learns from.

    Raises:
        ConfigError: there is no such data set, or a column is named without one.
        DataError: the text cannot be had.
    """
    from picogpt.cli.download import DownloadBar
    from picogpt.data import DATASETS, load_dataset, read_texts, resolve_stream
    from picogpt.files import existing_folder

    text, dataset, column = request.text, request.dataset, request.text_column
    if not text and dataset is None and stored is not None:
        text, dataset = stored.data.text, stored.data.dataset
    check_text_column(column, streamed=not text and dataset is not None and dataset not in DATASETS)
    data = stored.data if stored else None
    fold = data.fold if data else request.fold is not False
    if text:
        name, scratch = request.text_name(text), existing_folder(request.logs_dir)
        return _Whole(name, lambda: read_texts(text, name=name, scratch=scratch, fold=fold, notify=notice), text, data)
    if dataset is None or dataset in DATASETS:
        # These texts are ASCII, so folding makes no difference to them.
        with DownloadBar("Tiny Shakespeare") as bar:
            corpus = replace(load_dataset(dataset or "auto", notify=notice, progress=bar), fold=fold)
        return _Whole(corpus.name, lambda: corpus, (), data)
    column = column or (data.text_column if data else None)
    return _Streamed(resolve_stream(dataset, column), column, data, fold=fold)
