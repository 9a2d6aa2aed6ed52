"""Resolution of names and paths to a text: files or a named corpus in memory, or a stream.

A new run takes the text from the command line; a resumed run takes the text stored in its config, unless another one is named.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from picogpt.alphabet import PICOGPT, TEXT, Alphabet
from picogpt.checks import check_text_column
from picogpt.config import DataConfig, Fold, GPTConfig, TextRequest, TrainConfig
from picogpt.data.alphabets import TextCharacters
from picogpt.data.articles import ArticleReader
from picogpt.data.batches import Source, TextSource
from picogpt.data.corpora import DATASETS, Progress, load_dataset
from picogpt.data.first_articles import Validation, count_first_articles, draw_validation
from picogpt.data.hub import StreamSpec, find_shards, resolve_stream
from picogpt.data.network import check_environment
from picogpt.data.outage import START_PATIENCE
from picogpt.data.shards import Shards
from picogpt.data.stream import StreamSource
from picogpt.data.text import Corpus, check_unknown, read_texts, require_piped_text
from picogpt.files import existing_folder
from picogpt.ids import Ids
from picogpt.wording import Notify

__all__ = ["Console", "FoundText", "find_text", "stored_shards", "text_name"]

FEW_CHARS = 100_000
"""Training characters below which a text is reported as short."""


class Console(NamedTuple):
    """Output of the search for a text."""

    notify: Notify
    download: Callable[[str], AbstractContextManager[Progress]]
    """Makes a progress display for a download, given the name of the download."""


class FoundText(Protocol):
    """Text of a run, found but not yet cut into batches."""

    name: str

    def describe(self) -> DataConfig:
        """Return the entry for the run's config."""

    def source(self, model: GPTConfig, config: TrainConfig, val_ids: Ids | None) -> Source:
        """Make the batches; `val_ids` is the stored validation text of a resumed run on a stream, else None."""


class _LocalText:
    """A text in memory.

    Args:
        name: short name of the text.
        read: reads the text; called at the first use.
        paths: paths of the user's own files; empty for a named corpus.
        stored: config entry of the run that is resumed; None for a new run.
        notify: receives lines about the text.
    """

    def __init__(
        self, name: str, read: Callable[[], Corpus], paths: tuple[str, ...], stored: DataConfig | None, notify: Notify
    ) -> None:
        self.name = name
        self._read, self._paths, self._stored, self._notify = read, paths, stored, notify

    @functools.cached_property
    def _corpus(self) -> Corpus:
        """The text, read on first use."""
        return self._read()

    def describe(self) -> DataConfig:
        """Return name, length and fingerprint, by which a resumed run recognizes the text."""
        corpus = self._corpus
        return DataConfig(
            # Either paths or a corpus name is stored; a resume reads the same again.
            dataset=None if self._paths else corpus.name,
            text=self._paths,
            name=corpus.name,
            characters=len(corpus.ids),
            sha256=corpus.fingerprint,
            fold=corpus.fold,
            alphabet=corpus.alphabet,
        )

    def source(self, model: GPTConfig, config: TrainConfig, val_ids: Ids | None) -> Source:  # noqa: ARG002 (cut from the text)
        """Make batches from shuffled passes over the text."""
        corpus = self._corpus
        sequence_len = config.windows * model.context_len
        source = TextSource(corpus, sequence_len=sequence_len, batch_size=config.batch_size, seed=config.seed)
        self._notify(
            f"{corpus.name}: {len(corpus.ids):,} characters, {len(source.train_ids):,} to train on and {len(source.val_ids):,} "
            f"to validate; {corpus.tally}{self._advice(len(source.train_ids))}"
        )
        # Earlier versions accepted texts that are rejected now; their runs can still be resumed.
        check_unknown(corpus.name, corpus.tally, self._notify, alphabet=corpus.alphabet, reject=self._stored is None)
        return source

    @staticmethod
    def _advice(characters: int) -> str:
        """Return a warning about a text with few training characters, or nothing."""
        return "" if characters >= FEW_CHARS else f"; short, so soon memorized: better {FEW_CHARS:,} characters or more"


class _HubStream:
    """A streamed data set, on the hub or on the disk.

    Args:
        spec: the data set.
        text_column: the column named by the user, or None.
        stored: config entry of the run that is resumed; None for a new run.
        fold: replacement of characters outside the alphabet.
        alphabet: the characters to know; None takes those of the first articles.
        notify: receives lines about the stream, and about every wait for the network.
    """

    def __init__(
        self,
        spec: StreamSpec,
        text_column: str | None,
        stored: DataConfig | None,
        *,
        fold: Fold,
        alphabet: Alphabet | None,
        notify: Notify,
    ) -> None:
        self.name = spec.short_name
        self._spec, self._text_column, self._stored, self._fold, self._notify = spec, text_column, stored, fold, notify
        self._asked_alphabet = alphabet

    @functools.cached_property
    def _shards(self) -> Shards:
        """Files at the commit of the resumed run, or at the newest commit."""
        # A stored list of files needs no request, so a resume can start while the hub is down.
        return stored_shards(self._spec, self._stored) or find_shards(self._spec, self._notify)

    @functools.cached_property
    def _alphabet(self) -> Alphabet:
        """The alphabet, for which the first articles may be read."""
        if self._asked_alphabet is not None:
            return self._asked_alphabet
        # Seed 0, so that the alphabet does not depend on the order in which the run reads its files.
        reader = ArticleReader(self._shards, 0, self._notify, alphabet=None, patience=START_PATIENCE)
        counts = count_first_articles(reader)
        chosen = TextCharacters.of(counts)
        self._notify(f"{self._spec.path}: of its first {counts.sum():,} characters: {chosen.describe()}")
        return chosen.alphabet

    def describe(self) -> DataConfig:
        """Return commit, files and fingerprint; the commit pins the content, so a resume is bit-identical."""
        shards = self._shards
        return DataConfig(
            dataset=self._spec.address,
            name=self.name,
            # The length of a stream is unknown.
            characters=None,
            sha256=shards.fingerprint,
            commit=shards.commit,
            text_column=self._text_column,
            files=shards.files,
            format=shards.format,
            fold=self._fold,
            alphabet=self._alphabet,
        )

    def source(self, model: GPTConfig, config: TrainConfig, val_ids: Ids | None) -> Source:
        """Make batches drawn from a pool; the validation text is drawn here, or comes from the resumed run."""
        self._notify(f"{self._spec.describe(self._shards)}, streamed; one article in twenty is held out for validation")
        sequence_len = config.windows * model.context_len
        # A resumed run has the length of a pass in its checkpoint.
        train_chars = None
        if val_ids is None:
            # A new run reads the start of the stream once for validation, and again for training.
            val_ids, train_chars = self._draw_validation(config.seed, sequence_len)
        # Later starts load the stored validation text, so the validation losses of a run stay comparable.
        self._notify(f"validation text: {len(val_ids):,} characters, the same for the whole run")
        return StreamSource(
            ArticleReader(self._shards, config.seed, self._notify, fold=self._fold, alphabet=self._alphabet),
            val_ids,
            sequence_len=sequence_len,
            batch_size=config.batch_size,
            seed=config.seed,
            train_chars=train_chars,
        )

    def _draw_validation(self, seed: int, sequence_len: int) -> Validation:
        """Draw the validation text, and check the characters of the articles read for it.

        Raises:
            DataError: no article is held out, the stream is too short, or most characters of these articles are unknown.
        """
        # A reader of its own: the training reader starts at the first article again. The user is watching, so it gives up soon.
        reader = ArticleReader(
            self._shards, seed, self._notify, fold=self._fold, alphabet=self._alphabet, patience=START_PATIENCE
        )
        validation = draw_validation(reader, sequence_len=sequence_len)
        self._notify(f"{self._spec.path}: of its first {reader.tally.characters:,} characters: {reader.tally}")
        check_unknown(self._spec.path, reader.tally, self._notify, alphabet=self._alphabet)
        return validation


def stored_shards(spec: StreamSpec, stored: DataConfig | None) -> Shards | None:
    """Return the list of files that a run on `spec` has stored, so that none has to be requested; None if there is none.

    Raises:
        DataError: the environment variables for the hub are malformed.
    """
    # A folder or file has no commit: its files are listed again, and its fingerprint compared.
    if stored is None or stored.commit is None or stored.format is None or stored.dataset != spec.name:
        return None
    check_environment()
    return Shards(files=stored.files, format=stored.format, columns=spec.columns, commit=stored.commit)


def text_name(paths: Sequence[str]) -> str:
    """Name a text after its first file, reduced to characters that a run name allows."""
    # Only the first: a list of files would make a long name.
    first = paths[0]
    letters = "stdin" if first == "-" else re.sub(r"[^A-Za-z0-9._-]", "-", Path(first).stem)
    return letters.lstrip("._-")[:64] or "text"


def _resolve_characters(asked: TextRequest, inherited: Alphabet) -> tuple[Alphabet | None, Fold]:
    """Return the alphabet of a new run, None for the text's own characters, and the replacement of others."""
    alphabet = None if asked.alphabet == TEXT else asked.alphabet or inherited
    # A model with an alphabet of its own is to know the text as it is.
    return alphabet, alphabet == PICOGPT if asked.fold is None else asked.fold


def find_text(
    asked: TextRequest, stored: DataConfig | None, *, scratch: Path, console: Console, inherited: Alphabet = PICOGPT
) -> FoundText:
    """Find the requested text, or the text of a stored run.

    Args:
        asked: names or paths from the command line.
        stored: config entry of the run that is resumed; None for a new run.
        scratch: folder whose disk takes a text that is too long for memory.
        console: receives lines about the text, and the progress of a download.
        inherited: alphabet of a new run that is requested to have no other.

    Raises:
        ConfigError: unknown data set, or a column is named without a streamed data set.
        DataError: the text is not available.
    """
    paths, dataset, column, notify = asked.paths, asked.dataset, asked.column, console.notify
    # Nothing named: use the text of the run.
    if not asked.is_named and stored is not None:
        paths, dataset = stored.text, stored.dataset
        require_piped_text(paths)
    check_text_column(column, streamed=not paths and dataset is not None and dataset not in DATASETS)
    # A run keeps its alphabet and its folding for life, as others would change the ids of its text.
    alphabet, fold = (stored.alphabet, stored.fold) if stored else _resolve_characters(asked, inherited)
    if paths:
        # The logs folder may not exist yet; its nearest existing parent is on the same disk.
        name, scratch = text_name(paths), existing_folder(scratch)
        read = functools.partial(read_texts, paths, name=name, scratch=scratch, fold=fold, alphabet=alphabet, notify=notify)
        return _LocalText(name, read, paths, stored, notify)
    if dataset is None or dataset in DATASETS:
        # These texts are ASCII, so folding makes no difference to them.
        # The display appears only if a download happens.
        with console.download("Tiny Shakespeare") as progress:
            corpus = load_dataset(dataset or "auto", alphabet=alphabet, notify=notify, progress=progress)
        corpus = dataclasses.replace(corpus, fold=fold)
        return _LocalText(corpus.name, lambda: corpus, (), stored, notify)
    # Neither paths nor a named corpus: a stream.
    column = column or (stored.text_column if stored else None)
    return _HubStream(resolve_stream(dataset, column), column, stored, fold=fold, alphabet=alphabet, notify=notify)
