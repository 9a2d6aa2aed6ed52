"""What a run learns from, found by its flags: a text in memory or a stream."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol

from picogpt.cli.common import notice
from picogpt.cli.settings import Request
from picogpt.config import DataConfig, GPTConfig, RunSettings, TrainConfig, check_text_column
from picogpt.wording import plural

if TYPE_CHECKING:
    from picogpt.data import Corpus, Shards, Source, StreamSpec
    from picogpt.run import RunFolder

__all__ = ["Text", "find_text"]


class Text(Protocol):
    """What a run learns from, found but not yet cut into batches."""

    name: str

    def describe(self) -> DataConfig:
        """What goes into the run's config."""

    def source(self, model: GPTConfig, config: TrainConfig, run: RunFolder | None) -> Source:
        """Its batches; `run` is the folder of a run that goes on."""


class _Whole:
    """A text in memory."""

    def __init__(self, corpus: Corpus, text: tuple[str, ...]) -> None:
        self.name = corpus.name
        self._corpus, self._text = corpus, text

    def describe(self) -> DataConfig:
        """Its length and fingerprint."""
        corpus = self._corpus
        return DataConfig(
            dataset=None if self._text else corpus.name,
            text=self._text,
            name=corpus.name,
            characters=len(corpus.ids),
            sha256=corpus.fingerprint,
        )

    def source(self, model: GPTConfig, config: TrainConfig, run: RunFolder | None) -> Source:  # noqa: ARG002
        """Batches of passes over it."""
        from picogpt.data import TextSource

        corpus = self._corpus
        roll_len = config.windows * model.context_len
        source = TextSource(corpus, roll_len=roll_len, batch_size=config.batch_size, seed=config.seed)
        notice(
            f"{corpus.name}: {len(corpus.ids):,} characters, {len(source.train_ids):,} to train on and {len(source.val_ids):,} "
            f"to validate; {corpus.describe_unknown()}"
        )
        return source


class _Streamed:
    """A data set of the hub, or a folder like one.

    Args:
        spec: the data set.
        text_column: the column that was asked for.
        stored: the text of the run that goes on.
    """

    def __init__(self, spec: StreamSpec, text_column: str | None, stored: DataConfig | None) -> None:
        self.name = spec.short_name
        self._spec, self._text_column, self._stored = spec, text_column, stored

    @functools.cached_property
    def _shards(self) -> Shards:
        """The files: those of the run's commit, which need no network to be named, or the newest ones."""
        from picogpt.data import Shards, find_shards

        stored = self._stored
        if stored is None or stored.commit is None or stored.format is None or stored.dataset != self._spec.name:
            return find_shards(self._spec)
        return Shards(files=stored.files, format=stored.format, columns=self._spec.columns, commit=stored.commit)

    def describe(self) -> DataConfig:
        """Its commit, its files and their fingerprint."""
        shards = self._shards
        return DataConfig(
            dataset=self._spec.name if shards.commit else self._spec.path,
            name=self.name,
            characters=None,
            sha256=shards.fingerprint,
            commit=shards.commit,
            text_column=self._text_column,
            files=shards.files,
            format=shards.format,
        )

    def source(self, model: GPTConfig, config: TrainConfig, run: RunFolder | None) -> Source:
        """Batches drawn from a pool; the validation text is drawn here, or is the run's own."""
        from picogpt.data import ArticleReader, StreamSource, draw_validation

        where = f"at commit {self._shards.commit[:12]}" if self._shards.commit else "in this folder"
        files = plural(len(self._shards.files), "file")
        notice(f"{self._spec.path}: {files} {where}, streamed; one article in twenty is for validation")
        val_ids = run.load_validation() if run else draw_validation(ArticleReader(self._shards, config.seed, notice))
        notice(f"validation text: {len(val_ids):,} characters, the same for the whole run")
        return StreamSource(
            ArticleReader(self._shards, config.seed, notice),
            val_ids,
            roll_len=config.windows * model.context_len,
            batch_size=config.batch_size,
            seed=config.seed,
        )


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
    if text:
        return _Whole(read_texts(text, name=request.text_name(text), scratch=existing_folder(request.logs_dir)), text)
    if dataset is None or dataset in DATASETS:
        with DownloadBar("Tiny Shakespeare") as bar:
            return _Whole(load_dataset(dataset or "auto", notify=notice, progress=bar), ())
    column = column or (stored.data.text_column if stored else None)
    return _Streamed(resolve_stream(dataset, column), column, stored.data if stored else None)
