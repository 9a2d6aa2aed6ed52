"""Choice of the text to score (a named one, or the run's validation text) and of the text to count an n-gram on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from picogpt.alphabet import Alphabet
from picogpt.checks import check_text_column
from picogpt.config import Fold, TextConfig, TextRequest, alphabet_of
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
from picogpt.data.corpora import DATASET_FOLDER
from picogpt.data.first_articles import join_articles
from picogpt.data.resolve import Console, stored_shards
from picogpt.errors import ConfigError, DataError, RunError
from picogpt.evaluation.baselines import NGRAM_CHARS
from picogpt.evaluation.scores import cut_stretches
from picogpt.ids import Ids
from picogpt.runs.folder import RunFolder
from picogpt.runs.model_file import load_text_config
from picogpt.runs.settings import RunSettings
from picogpt.wording import Notify

__all__ = ["EvalText", "TrainedRun", "find_eval_text", "find_ngram_text", "validation_articles"]

MAX_CHARS_READ = 100_000_000
"""Maximum number of characters of a stream to search for articles that are long enough."""


@dataclass(frozen=True)
class TrainedRun:
    """The run that a model belongs to."""

    run: RunFolder
    settings: RunSettings | None
    """None if the model's folder has no config.json."""
    text: TextConfig | None = None
    """The text that the model was trained on, if the model file describes it."""

    @property
    def alphabet(self) -> Alphabet:
        """The alphabet of the model."""
        return alphabet_of(self.text)

    @property
    def scratch(self) -> Path:
        """Folder for the ids of a long text: the run's, which is on a disk, or the working directory where that is read-only."""
        return self.run.path if os.access(self.run.path, os.W_OK) else Path()

    @property
    def chars(self) -> int | None:
        """Characters that the whole run trains on; None if unknown."""
        if self.settings is None:
            return None
        # Of the whole schedule, also if the run was stopped: the n-gram gets as much text as the model was meant to.
        train = self.settings.train
        return self.settings.schedule.total_steps * train.batch_size * train.windows * self.settings.model.context_len

    @property
    def fold(self) -> Fold:
        """Replacement of characters outside the alphabet, as in training."""
        # Models older than folding have neither entry, and are scored without it, as they were trained.
        if self.text is not None:
            return self.text.fold
        return self.settings.data.fold if self.settings else False

    @property
    def seed(self) -> int:
        """Seed of the order in which the run reads its text; 0 if unknown."""
        # With the run's seed, the n-gram is counted on the articles that the model has read.
        return self.settings.train.seed if self.settings else 0

    @classmethod
    def of_model(cls, path: Path) -> TrainedRun:
        """Return the run of the model at `path`.

        Raises:
            RunError: the run's config is damaged, or names another alphabet than the model.
        """
        run, text = RunFolder(path.parent), load_text_config(path)
        if not run.has_config():  # a model file of its own, outside of any run
            return cls(run, None, text)
        settings = run.read_settings("move it away and name a text with --text")
        trained = cls(run, settings, text)
        if settings.data.alphabet != trained.alphabet:
            raise RunError(
                f"{path}: the model has the alphabet {trained.alphabet.describe()}, and its run "
                f"{settings.data.alphabet.describe()}; put the run's own model back"
            )
        return trained


@dataclass(frozen=True)
class EvalText:
    """A text to score."""

    name: str
    description: str
    """The part of the text that is scored."""
    articles: Sequence[Ids]
    unit: str
    """Kind of `articles`: articles, or the stretches that take their place."""
    corpus: Corpus | None = None
    """The run's own text, if it was read to find this one."""
    shards: Shards | None = None
    """The stream of the articles, if the run was trained on it."""


class _Stream(NamedTuple):
    """A stream of articles."""

    path: str
    short_name: str
    shards: Shards


def find_eval_text(trained: TrainedRun, asked: TextRequest, *, sequence_len: int, chars: int, console: Console) -> EvalText:
    """Return the requested text, or the validation text of the run if none was requested.

    Raises:
        ConfigError: there is no such data set, or a column is named without one.
        DataError: the text cannot be loaded.
        RunError: the run's own text is missing or has changed.
    """
    # Any name that is not an included data set is a stream on the hub.
    dataset, notify = asked.dataset, console.notify
    streamed = dataset is not None and dataset not in DATASETS
    check_text_column(asked.column, streamed=streamed)
    if not asked.is_named:
        return _own_text(trained, sequence_len, console)
    if dataset is not None and streamed:
        stream, is_own = _find_shards(trained, dataset, asked.column, notify)
        return _streamed_text(trained, stream, is_own=is_own, sequence_len=sequence_len, chars=chars, notify=notify)
    # Files are folded like the texts of the model.
    corpus = _read(trained, asked.paths, notify) if asked.paths else _load(dataset or "auto", trained.alphabet, console)
    _announce(corpus, notify)
    # The fingerprint recognises the run's own text under any file name.
    known = trained.settings is not None and corpus.fingerprint == trained.settings.data.sha256
    if known:
        flag = "--text" if asked.paths else "--dataset"
        notify(
            f"warning: {corpus.name}: the run was trained on nine tenths of this text; leave out {flag} to score only the "
            "last tenth"
        )
    return EvalText(corpus.name, "all of it", cut_stretches(corpus.ids, sequence_len), "stretches", corpus if known else None)


def find_ngram_text(trained: TrainedRun, evaluated: EvalText, paths: Sequence[str], console: Console) -> tuple[str, Ids] | str:
    """Return name and ids of the text to count n-grams on, or why there is none.

    By default it is the run's training text; for a stream as many characters of its training articles as the run reads.

    Raises:
        DataError: a text of `paths` cannot be loaded.
    """
    # In order of precedence: a text that the user names, the stream, the run's own text.
    if paths:
        corpus = _read(trained, paths, console.notify)
        return corpus.name, corpus.ids
    if evaluated.shards is not None:
        ids = _streamed_training(trained, evaluated.shards, console.notify)
        return (f"training articles of {evaluated.name}", ids) if len(ids) else "there is no training article"
    if trained.settings is None:
        return "the model has no config.json that names its training text"
    # Here the n-gram is optional: a text that is missing, or that would need the network, only leaves the baseline out.
    try:
        corpus = evaluated.corpus or _read_own(trained.settings, trained.scratch, console, local=True)
    except (DataError, RunError) as error:
        return str(error)
    # As in training, so that neither the n-gram nor the model has seen the validation text.
    return f"the first nine tenths of {corpus.name}", split_text(corpus.ids)[0]


def _read(trained: TrainedRun, paths: Sequence[str], notify: Notify) -> Corpus:
    """Read files as the model reads its texts."""
    return read_texts(
        paths,
        name=_name(paths),
        scratch=trained.scratch,
        fold=trained.fold,
        alphabet=trained.alphabet,
        notify=notify,
    )


def _name(paths: Sequence[str]) -> str:
    """Return a short name for files and folders."""
    first = "stdin" if paths[0] == "-" else Path(paths[0]).name or paths[0]
    return first if len(paths) == 1 else f"{first} and {len(paths) - 1} more"


def _own_text(trained: TrainedRun, sequence_len: int, console: Console) -> EvalText:
    """Return the validation text of the run."""
    settings, run = trained.settings, trained.run
    if settings is None:
        raise ConfigError(f"{run.path}: there is no config.json that names the model's text; name a text with --text")
    # A run on a stream does not know its number of characters, and has stored its validation text.
    if settings.data.characters is None:
        if not run.has_validation():
            raise RunError(f"{run.path}: the run's validation text is missing; name a text with --text or --dataset")
        # Empty lines separate paragraphs as well as articles, so the articles cannot be recovered.
        articles = cut_stretches(run.load_validation("name a text with --text or --dataset"), sequence_len)
        return EvalText(settings.data.name, "the validation text of the run", articles, "stretches")
    corpus = _read_own(settings, trained.scratch, console, local=False)
    _announce(corpus, console.notify)
    articles = cut_stretches(split_text(corpus.ids)[1], sequence_len)
    return EvalText(corpus.name, "the last tenth, which the run was not trained on", articles, "stretches", corpus)


def _load(name: str, alphabet: Alphabet, console: Console) -> Corpus:
    """Load a corpus by name, showing the progress of its download."""
    with console.download("Tiny Shakespeare") as progress:
        return load_dataset(name, alphabet=alphabet, notify=console.notify, progress=progress)


def _announce(corpus: Corpus, notify: Notify) -> None:
    """Print a text's length and tally, and warn if many characters are unknown."""
    notify(f"{corpus.name}: {len(corpus.ids):,} characters; {corpus.tally}")
    check_unknown(corpus.name, corpus.tally, notify, alphabet=corpus.alphabet, reject=False)


def _read_own(settings: RunSettings, scratch: Path, console: Console, *, local: bool) -> Corpus:
    """Return the text of a run on files or a named corpus; with `local`, only if it needs no network.

    Raises:
        DataError: the text cannot be loaded.
        RunError: the text has changed.
    """
    data = settings.data
    # Two kinds of text cannot be read again as a whole: streams, and standard input.
    if data.characters is None:
        raise DataError("the run's text is a stream; name a text with --ngram-text")
    if "-" in data.text:
        raise DataError("the run's text came from standard input and was not stored; name it with --text or --ngram-text")
    if data.text:
        corpus = read_texts(
            data.text, name=data.name, scratch=scratch, fold=data.fold, alphabet=data.alphabet, notify=console.notify
        )
    # Of the named corpora only Tiny Shakespeare may need a download.
    elif local and data.dataset == "tinyshakespeare" and not (DATASET_FOLDER / "tinyshakespeare.txt").exists():
        raise DataError(f"{DATASET_FOLDER / 'tinyshakespeare.txt'} does not exist; name a text with --ngram-text")
    else:
        corpus = _load(data.dataset or "auto", data.alphabet, console)
    # In another text the last tenth may be what the run was trained on.
    if corpus.fingerprint != data.sha256:
        raise RunError(f"{data.name}: the text has changed since the run was trained on it; name a text with --text")
    return corpus


def _find_shards(trained: TrainedRun, dataset: str, column: str | None, notify: Notify) -> tuple[_Stream, bool]:
    """Return the stream, and whether the run was trained on it; if so, at the run's commit."""
    spec = resolve_stream(dataset, column)
    stored = trained.settings.data if trained.settings else None
    # A run stores the name that its user gave, which may be the short name or the address.
    own = stored is not None and stored.dataset in {spec.name, spec.address}
    if stored is not None and stored.characters is None and not own:
        notify(f"warning: the run was trained on another stream, {stored.dataset}, which may contain some of these articles")
    if stored is not None and own and column is None and stored.text_column:
        spec = replace(spec, columns=(stored.text_column,))
    # The shards that the run has stored pin its commit: the same articles are for validation as in training.
    shards = stored_shards(spec, stored) or find_shards(spec, notify)
    notify(f"{spec.describe(shards)}; scoring validation articles, the one in twenty that no run is trained on")
    return _Stream(spec.path, spec.short_name, shards), own


def _streamed_text(
    trained: TrainedRun, stream: _Stream, *, is_own: bool, sequence_len: int, chars: int, notify: Notify
) -> EvalText:
    """Return the first validation articles of a stream."""
    reader = ArticleReader(stream.shards, 0, notify, fold=trained.fold, alphabet=trained.alphabet)
    # Seed 0 for every run, so that all models are scored on the same articles.
    articles = list(validation_articles(reader, sequence_len, chars))
    notify(f"{stream.path}: first {reader.tally.characters:,} characters: {reader.tally}")
    # A warning only: a text that the model cannot read well still has a loss.
    check_unknown(stream.path, reader.tally, notify, alphabet=trained.alphabet, reject=False)
    part = f"the first validation articles of over {sequence_len:,} characters"
    return EvalText(stream.short_name, part, articles, "articles", shards=stream.shards if is_own else None)


def _streamed_training(trained: TrainedRun, shards: Shards, notify: Notify) -> Ids:
    """Return the first training articles of a stream, joined as in training: as many characters as the run reads, if known."""
    chars = min(NGRAM_CHARS, trained.chars or NGRAM_CHARS)  # the n-gram counts no more than that
    notify(f"reading {chars:,} characters of training articles for the n-gram")
    reader = ArticleReader(shards, trained.seed, notify, fold=trained.fold, alphabet=trained.alphabet)
    return join_articles(reader, chars, for_validation=False)


def validation_articles(reader: ArticleReader, sequence_len: int, chars: int) -> Iterator[Ids]:
    """Yield the validation articles that are long enough for a sequence, in order, until their sequences have `chars` characters.

    After `MAX_CHARS_READ` characters the search ends with the articles found so far.
    """
    # `closing` closes the reader's generator also where the search ends early.
    total = count = read = 0
    with contextlib.closing(reader.from_start()) as taken:
        for article in taken:
            # Stop after the whole stream, with enough characters of two articles (a standard error needs two), or at the limit.
            if article.cursor.pass_number > 0 or (total >= chars and count >= 2) or read >= MAX_CHARS_READ:
                return
            read += len(article.ids)
            n_sequences = (len(article.ids) - 1) // sequence_len  # whole sequences, each with its last target
            if article.for_validation and n_sequences:
                total += n_sequences * sequence_len
                count += 1
                yield article.ids
