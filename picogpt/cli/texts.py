"""What a run learns from, found by its flags: a text in memory or a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from picogpt.cli.common import notice
from picogpt.cli.settings import Request
from picogpt.config import DataConfig, GPTConfig, RunSettings, TrainConfig

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
    """A data set of the hub, or a folder like one."""

    def __init__(self, spec: StreamSpec, shards: Shards, text_column: str | None) -> None:
        self.name = spec.short_name
        self._spec, self._shards, self._text_column = spec, shards, text_column

    def describe(self) -> DataConfig:
        """Its commit and the fingerprint of its files."""
        local = self._shards.commit is None
        return DataConfig(
            dataset=self._spec.path if local else self._spec.name,
            name=self.name,
            characters=None,
            sha256=self._shards.fingerprint,
            commit=self._shards.commit,
            text_column=self._text_column,
        )

    def source(self, model: GPTConfig, config: TrainConfig, run: RunFolder | None) -> Source:
        """Batches drawn from a pool; the validation text is drawn here, or is the run's own."""
        from picogpt.data import ArticleReader, StreamSource, draw_validation

        where = f"at commit {self._shards.commit[:12]}" if self._shards.commit else "in this folder"
        notice(f"{self._spec.path}: {len(self._shards.files)} files {where}, streamed; one article in twenty is for validation")
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
        ConfigError: there is no such data set.
        DataError: the text cannot be had.
    """
    from picogpt.cli.download import DownloadBar
    from picogpt.data import DATASETS, find_shards, load_dataset, read_texts, resolve_stream

    text, dataset, column = request.text, request.dataset, request.text_column
    if not text and dataset is None and stored is not None:
        text, dataset = stored.data.text, stored.data.dataset
    if text:
        return _Whole(read_texts(text, name=request.text_name(text)), text)
    if dataset is None or dataset in DATASETS:
        return _Whole(load_dataset(dataset or "auto", notify=notice, progress=DownloadBar("Tiny Shakespeare")), ())
    column = column or (stored.data.text_column if stored else None)
    spec = resolve_stream(dataset, column)
    return _Streamed(spec, find_shards(spec, stored.data.commit if stored else None), column)
