"""What `picogpt-eval` scores, found by its flags or by what the run learned from, and what its n-gram is counted on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from picogpt.cli.common import notice
from picogpt.config import RunSettings, TextConfig, check_text_column
from picogpt.errors import ConfigError, DataError, RunError
from picogpt.wording import plural

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from picogpt.data import ArticleReader, Corpus, Shards
    from picogpt.run import RunFolder

    Ids = npt.NDArray[np.uint8]

__all__ = ["EvalText", "Trained", "find_eval_text", "find_ngram_text", "validation_articles"]

MOST_READ = 100_000_000
"""Characters of a stream that are searched for articles of enough length."""


@dataclass(frozen=True)
class Trained:
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
    def of_model(cls, path: Path) -> Trained:
        """The run whose model is at `path`.

        Raises:
            RunError: its config is damaged.
        """
        from picogpt.run import RunFolder, load_text_config

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


def find_eval_text(
    trained: Trained, *, text: Sequence[str], dataset: str | None, text_column: str | None, roll_len: int, chars: int
) -> EvalText:
    """The text that the flags name, or the one that the run was validated on.

    Raises:
        ConfigError: there is no such data set, or a column is named without one.
        DataError: the text cannot be had.
        RunError: the run's own text is not there, or has changed.
    """
    from picogpt.cli.download import DownloadBar
    from picogpt.data import DATASETS, load_dataset, read_texts
    from picogpt.scores import cut_stretches

    streamed = dataset is not None and dataset not in DATASETS
    check_text_column(text_column, streamed=streamed)
    if not text and dataset is None:
        return _own_text(trained, roll_len)
    if dataset is not None and streamed:
        return _streamed_text(trained, dataset, text_column, roll_len, chars)
    if text:
        corpus = read_texts(text, name=_name(text), scratch=trained.run.path, fold=trained.fold, notify=notice)
    else:
        with DownloadBar("Tiny Shakespeare") as bar:
            corpus = load_dataset(dataset or "auto", notify=notice, progress=bar)
    _announce(corpus)
    known = trained.settings is not None and corpus.fingerprint == trained.settings.data.sha256
    if known:
        notice(f"warning: {corpus.name}: the run was trained on nine tenths of this text; without --text only the rest is scored")
    return EvalText(corpus.name, "all of it", cut_stretches(corpus.ids, roll_len), "stretches", corpus if known else None)


def find_ngram_text(trained: Trained, evaluated: EvalText, paths: Sequence[str]) -> tuple[str, Ids] | str:
    """Name and ids of the text to count n-grams on, or why there is none at hand.

    Of a stream that is evaluated it is the articles for training, as many characters as the run reads.

    Raises:
        DataError: a text of `paths` cannot be had.
    """
    from picogpt.data import read_texts, split_text

    if paths:
        corpus = read_texts(paths, name=_name(paths), scratch=trained.run.path, fold=trained.fold, notify=notice)
        return corpus.name, corpus.ids
    if evaluated.shards is not None:
        ids = _streamed_training(trained, evaluated.shards)
        return (f"the articles of {evaluated.name} for training", ids) if len(ids) else "not one article is for training"
    if trained.settings is None:
        return "no run beside the model that would name its text"
    try:
        corpus = evaluated.corpus or _read_own(trained.settings, trained.run.path, local=True)
    except (DataError, RunError) as error:
        return str(error)
    return f"the first nine tenths of {corpus.name}", split_text(corpus.ids)[0]


def _name(paths: Sequence[str]) -> str:
    """A short name for files and folders."""
    first = "stdin" if paths[0] == "-" else Path(paths[0]).name or paths[0]
    return first if len(paths) == 1 else f"{first} and {len(paths) - 1} more"


def _own_text(trained: Trained, roll_len: int) -> EvalText:
    """The part of the run's text that it was validated on."""
    from picogpt.data import split_text
    from picogpt.scores import cut_stretches

    settings, run = trained.settings, trained.run
    if settings is None:
        raise ConfigError(f"{run.path}: there is no config.json beside the model that names its text; name one with --text")
    if settings.data.characters is None:
        if not run.has_validation():
            raise RunError(f"{run.path}: the validation text of its stream is not there; name a text with --text or --dataset")
        # Paragraphs are set off by empty lines too, so where one article ends cannot be told.
        articles = cut_stretches(run.load_validation(), roll_len)
        return EvalText(settings.data.name, "the validation text of the run", articles, "stretches")
    corpus = _read_own(settings, run.path, local=False)
    _announce(corpus)
    articles = cut_stretches(split_text(corpus.ids)[1], roll_len)
    return EvalText(corpus.name, "the last tenth, which the run has not trained on", articles, "stretches", corpus)


def _announce(corpus: Corpus) -> None:
    """Say what a text is made of, and warn of many unknown characters."""
    from picogpt.data import check_unknown

    notice(f"{corpus.name}: {len(corpus.ids):,} characters; {corpus.tally}")
    check_unknown(corpus.name, corpus.tally, notice, reject=False)


def _read_own(settings: RunSettings, scratch: Path, *, local: bool) -> Corpus:
    """The text of a run on files or a named corpus; with `local`, only where it needs no network.

    Raises:
        DataError: it cannot be had.
        RunError: it has changed.
    """
    from picogpt.cli.download import DownloadBar
    from picogpt.data import load_dataset, read_texts
    from picogpt.data.corpora import DATASET_FOLDER

    data = settings.data
    if data.characters is None:
        raise DataError("the run's text is a stream; name a text with --ngram-text")
    if "-" in data.text:
        raise DataError("the run's text came through standard input and was not kept; give it with --text or --ngram-text")
    if data.text:
        corpus = read_texts(data.text, name=data.name, scratch=scratch, fold=data.fold, notify=notice)
    elif local and data.dataset == "tinyshakespeare" and not (DATASET_FOLDER / "tinyshakespeare.txt").exists():
        raise DataError(f"{DATASET_FOLDER / 'tinyshakespeare.txt'} is not there; name a text with --ngram-text")
    else:
        with DownloadBar("Tiny Shakespeare") as bar:
            corpus = load_dataset(data.dataset or "auto", notify=notice, progress=bar)
    if corpus.fingerprint != data.sha256:
        raise RunError(f"{data.name}: the text has changed since the run was trained on it; name a text with --text")
    return corpus


def _streamed_text(trained: Trained, dataset: str, text_column: str | None, roll_len: int, chars: int) -> EvalText:
    """The first articles for validation of a stream, at the run's own commit if it is the run's stream."""
    from picogpt.data import ArticleReader, Shards, check_environment, check_unknown, find_shards, resolve_stream

    spec = resolve_stream(dataset, text_column)
    stored = trained.settings.data if trained.settings else None
    own = stored is not None and stored.dataset in {spec.name, spec.address}
    if stored is not None and stored.characters is None and not own:
        notice(f"warning: the run was trained on another stream, {stored.dataset}; it may have read some of these articles there")
    if stored is not None and stored.commit and stored.format and stored.dataset == spec.name and text_column is None:
        spec = replace(spec, columns=(stored.text_column,) if stored.text_column else spec.columns)
        shards = Shards(files=stored.files, format=stored.format, columns=spec.columns, commit=stored.commit)
        check_environment()
    else:
        shards = find_shards(spec, notice)
    where = f"at commit {shards.commit[:12]}" if shards.commit else "in this folder"
    files = plural(len(shards.files), "file")
    notice(f"{spec.path}: {files} {where}; the articles that no run on it is trained on, one in twenty")
    reader = ArticleReader(shards, 0, notice, fold=trained.fold)
    articles = list(validation_articles(reader, roll_len, chars))
    notice(f"{spec.path}: of the first {reader.tally.characters:,} characters: {reader.tally}")
    check_unknown(spec.path, reader.tally, notice, reject=False)
    part = f"the first articles for validation of over {roll_len:,} characters"
    return EvalText(spec.short_name, part, articles, "articles", shards=shards if own else None)


def _streamed_training(trained: Trained, shards: Shards) -> Ids:
    """The first articles for training of a stream, joined as training has them: as many characters as the run reads, if known."""
    from picogpt.baselines import NGRAM_CHARS
    from picogpt.data import ArticleReader
    from picogpt.data.articles import join_articles

    chars = min(NGRAM_CHARS, trained.chars or NGRAM_CHARS)
    notice(f"reading {chars:,} characters of the articles for training, to count the n-gram on")
    return join_articles(ArticleReader(shards, trained.seed, notice, fold=trained.fold), chars, for_validation=False)


def validation_articles(reader: ArticleReader, roll_len: int, chars: int) -> Iterator[Ids]:
    """The articles for validation that are long enough for a roll, in order, until their rolls have so many characters.

    After `MOST_READ` characters it ends with what there is.
    """
    total = count = read = 0
    with contextlib.closing(reader.taken()) as taken:
        for article in taken:
            if article.place.epoch > 0 or (total >= chars and count >= 2) or read >= MOST_READ:
                return
            read += len(article.ids)
            rolls = (len(article.ids) - 1) // roll_len
            if article.for_validation and rolls:
                total += rolls * roll_len
                count += 1
                yield article.ids
