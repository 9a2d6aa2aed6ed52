"""The text to score, by name or as the run was validated on it, and the text that an n-gram is counted on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from picogpt.checks import check_text_column
from picogpt.config import TextConfig, TextRequest
from picogpt.data import (
    DATASETS,
    ArticleReader,
    Corpus,
    Shards,
    check_unknown,
    find_shards,
    load_dataset,
    read_texts,
    resolve_stream,
    split_text,
)
from picogpt.data.articles import Ids, join_articles
from picogpt.data.corpora import DATASET_FOLDER
from picogpt.data.resolve import Console, stored_shards
from picogpt.errors import ConfigError, DataError, RunError
from picogpt.evaluation.baselines import NGRAM_CHARS
from picogpt.evaluation.scores import cut_stretches
from picogpt.runs.folder import RunFolder, load_text_config
from picogpt.runs.settings import RunSettings
from picogpt.wording import Notify, plural

__all__ = ["EvalText", "TrainedRun", "find_eval_text", "find_ngram_text", "validation_articles"]

MAX_CHARS_READ = 100_000_000
"""Characters of a stream that are searched for articles of enough length."""


@dataclass(frozen=True)
class TrainedRun:
    """A model's run, as far as it is there."""

    run: RunFolder
    settings: RunSettings | None
    """None where the model lies without a config.json beside it."""
    text: TextConfig | None = None
    """The text that the model was trained on, where its file names it."""

    @property
    def chars(self) -> int | None:
        """Characters that the whole run reads, or None where that is not known."""
        if self.settings is None:
            return None
        train = self.settings.train
        return self.settings.schedule.total_steps * train.batch_size * train.windows * self.settings.model.context_len

    @property
    def fold(self) -> bool:
        """Whether texts are folded for it, as in training; a model of before there was folding is scored as it always was."""
        if self.text is not None:
            return self.text.fold
        return self.settings is not None and self.settings.data.fold

    @property
    def seed(self) -> int:
        """The seed of the order that it read its text in; 0 where that is not known."""
        return self.settings.train.seed if self.settings else 0

    @classmethod
    def of_model(cls, path: Path) -> TrainedRun:
        """The run whose model is at `path`.

        Raises:
            RunError: its config is damaged.
        """
        run, text = RunFolder(path.parent), load_text_config(path)
        if not run.has_config():
            return cls(run, None, text)
        try:
            return cls(run, RunSettings.from_dict(run.read_config()), text)
        except ConfigError as error:
            raise RunError(f"{run.path / 'config.json'}: {error}; move it away and name a text with --text") from error


@dataclass(frozen=True)
class EvalText:
    """A text to score."""

    name: str
    description: str
    """Which part of it."""
    articles: Sequence[Ids]
    unit: str
    """What they are: articles, or the stretches that stand for them."""
    corpus: Corpus | None = None
    """The run's own text, as far as it had to be read for this."""
    shards: Shards | None = None
    """The stream that the articles are from, where it is the one that the run reads."""


class _Stream(NamedTuple):
    """A stream of articles."""

    path: str
    short_name: str
    shards: Shards


def find_eval_text(trained: TrainedRun, asked: TextRequest, *, sequence_len: int, chars: int, console: Console) -> EvalText:
    """The text that is asked for, or the one that the run was validated on.

    Raises:
        ConfigError: there is no such data set, or a column is named without one.
        DataError: the text cannot be had.
        RunError: the run's own text is not there, or has changed.
    """
    dataset, notify = asked.dataset, console.notify
    streamed = dataset is not None and dataset not in DATASETS
    check_text_column(asked.column, streamed=streamed)
    if not asked.is_named:
        return _own_text(trained, sequence_len, console)
    if dataset is not None and streamed:
        stream, is_own = _find_shards(trained, dataset, asked.column, notify)
        return _streamed_text(trained, stream, is_own=is_own, sequence_len=sequence_len, chars=chars, notify=notify)
    if asked.paths:
        corpus = read_texts(asked.paths, name=_name(asked.paths), scratch=trained.run.path, fold=trained.fold, notify=notify)
    else:
        corpus = _load(dataset or "auto", console)
    _announce(corpus, notify)
    known = trained.settings is not None and corpus.fingerprint == trained.settings.data.sha256
    if known:
        notify(f"warning: {corpus.name}: the run was trained on nine tenths of this text; without --text only the rest is scored")
    return EvalText(corpus.name, "all of it", cut_stretches(corpus.ids, sequence_len), "stretches", corpus if known else None)


def find_ngram_text(trained: TrainedRun, evaluated: EvalText, paths: Sequence[str], console: Console) -> tuple[str, Ids] | str:
    """Name and ids of the text to count n-grams on, or why there is none at hand.

    Of a stream that is evaluated it is the articles for training, as many characters as the run reads.

    Raises:
        DataError: a text of `paths` cannot be had.
    """
    if paths:
        corpus = read_texts(paths, name=_name(paths), scratch=trained.run.path, fold=trained.fold, notify=console.notify)
        return corpus.name, corpus.ids
    if evaluated.shards is not None:
        ids = _streamed_training(trained, evaluated.shards, console.notify)
        return (f"the articles of {evaluated.name} for training", ids) if len(ids) else "not one article is for training"
    if trained.settings is None:
        return "no run beside the model that would name its text"
    try:
        corpus = evaluated.corpus or _read_own(trained.settings, trained.run.path, console, local=True)
    except (DataError, RunError) as error:
        return str(error)
    return f"the first nine tenths of {corpus.name}", split_text(corpus.ids)[0]


def _name(paths: Sequence[str]) -> str:
    """A short name for files and folders."""
    first = "stdin" if paths[0] == "-" else Path(paths[0]).name or paths[0]
    return first if len(paths) == 1 else f"{first} and {len(paths) - 1} more"


def _own_text(trained: TrainedRun, sequence_len: int, console: Console) -> EvalText:
    """The part of the run's text that it was validated on."""
    settings, run = trained.settings, trained.run
    if settings is None:
        raise ConfigError(f"{run.path}: there is no config.json beside the model that names its text; name one with --text")
    if settings.data.characters is None:
        if not run.has_validation():
            raise RunError(f"{run.path}: the validation text of its stream is not there; name a text with --text or --dataset")
        # Paragraphs are set off by empty lines too, so where one article ends cannot be told.
        articles = cut_stretches(run.load_validation(), sequence_len)
        return EvalText(settings.data.name, "the validation text of the run", articles, "stretches")
    corpus = _read_own(settings, run.path, console, local=False)
    _announce(corpus, console.notify)
    articles = cut_stretches(split_text(corpus.ids)[1], sequence_len)
    return EvalText(corpus.name, "the last tenth, which the run has not trained on", articles, "stretches", corpus)


def _load(name: str, console: Console) -> Corpus:
    """A corpus by name, with the progress of its download."""
    with console.download("Tiny Shakespeare") as progress:
        return load_dataset(name, notify=console.notify, progress=progress)


def _announce(corpus: Corpus, notify: Notify) -> None:
    """Print what a text is made of, and warn of many unknown characters."""
    notify(f"{corpus.name}: {len(corpus.ids):,} characters; {corpus.tally}")
    check_unknown(corpus.name, corpus.tally, notify, reject=False)


def _read_own(settings: RunSettings, scratch: Path, console: Console, *, local: bool) -> Corpus:
    """The text of a run on files or a named corpus; with `local`, only where it needs no network.

    Raises:
        DataError: it cannot be had.
        RunError: it has changed.
    """
    data = settings.data
    if data.characters is None:
        raise DataError("the run's text is a stream; name a text with --ngram-text")
    if "-" in data.text:
        raise DataError("the run's text came through standard input and was not kept; give it with --text or --ngram-text")
    if data.text:
        corpus = read_texts(data.text, name=data.name, scratch=scratch, fold=data.fold, notify=console.notify)
    elif local and data.dataset == "tinyshakespeare" and not (DATASET_FOLDER / "tinyshakespeare.txt").exists():
        raise DataError(f"{DATASET_FOLDER / 'tinyshakespeare.txt'} is not there; name a text with --ngram-text")
    else:
        corpus = _load(data.dataset or "auto", console)
    if corpus.fingerprint != data.sha256:
        raise RunError(f"{data.name}: the text has changed since the run was trained on it; name a text with --text")
    return corpus


def _find_shards(trained: TrainedRun, dataset: str, column: str | None, notify: Notify) -> tuple[_Stream, bool]:
    """A stream, at the run's own commit if it is the run's stream; and whether it is."""
    spec = resolve_stream(dataset, column)
    stored = trained.settings.data if trained.settings else None
    own = stored is not None and stored.dataset in {spec.name, spec.address}
    if stored is not None and stored.characters is None and not own:
        notify(f"warning: the run was trained on another stream, {stored.dataset}; it may have read some of these articles there")
    shards = None
    if stored is not None and column is None:
        run_spec = replace(spec, columns=(stored.text_column,) if stored.text_column else spec.columns)
        shards = stored_shards(run_spec, stored)
    shards = shards or find_shards(spec, notify)
    where = f"at commit {shards.commit[:12]}" if shards.commit else "in this folder"
    files = plural(len(shards.files), "file")
    notify(f"{spec.path}: {files} {where}; the articles that no run on it is trained on, one in twenty")
    return _Stream(spec.path, spec.short_name, shards), own


def _streamed_text(
    trained: TrainedRun, stream: _Stream, *, is_own: bool, sequence_len: int, chars: int, notify: Notify
) -> EvalText:
    """The first articles for validation of a stream."""
    reader = ArticleReader(stream.shards, 0, notify, fold=trained.fold)
    articles = list(validation_articles(reader, sequence_len, chars))
    notify(f"{stream.path}: of the first {reader.tally.characters:,} characters: {reader.tally}")
    check_unknown(stream.path, reader.tally, notify, reject=False)
    part = f"the first articles for validation of over {sequence_len:,} characters"
    return EvalText(stream.short_name, part, articles, "articles", shards=stream.shards if is_own else None)


def _streamed_training(trained: TrainedRun, shards: Shards, notify: Notify) -> Ids:
    """The first articles for training of a stream, joined as training has them: as many characters as the run reads, if known."""
    chars = min(NGRAM_CHARS, trained.chars or NGRAM_CHARS)
    notify(f"reading {chars:,} characters of the articles for training, to count the n-gram on")
    return join_articles(ArticleReader(shards, trained.seed, notify, fold=trained.fold), chars, for_validation=False)


def validation_articles(reader: ArticleReader, sequence_len: int, chars: int) -> Iterator[Ids]:
    """The articles for validation that are long enough for a roll, in order, until their rolls have so many characters.

    After `MAX_CHARS_READ` characters it ends with what there is.
    """
    total = count = read = 0
    with contextlib.closing(reader.from_start()) as taken:
        for article in taken:
            if article.cursor.epoch > 0 or (total >= chars and count >= 2) or read >= MAX_CHARS_READ:
                return
            read += len(article.ids)
            rolls = (len(article.ids) - 1) // sequence_len
            if article.for_validation and rolls:
                total += rolls * sequence_len
                count += 1
                yield article.ids
