"""Articles of a streamed data set, read and encoded in a background thread, from any cursor.

Files are shuffled once per pass with the run's seed; rows within a file keep their order. A hash of file name and row holds out
one article in twenty for validation. Articles read ahead are not part of the state: a resumed run names the cursor to start from.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.config import Fold, TextConfig
from picogpt.data.alphabets import Counts, count_characters
from picogpt.data.batches import Stop, WaitInterrupted
from picogpt.data.hub import read_rows
from picogpt.data.network import explain, hint, is_transient
from picogpt.data.outage import Outage, ReaderClosed
from picogpt.data.shards import Row, Shards
from picogpt.encodings import normalize_newlines
from picogpt.errors import DataError
from picogpt.folding import to_code_points
from picogpt.ids import Ids, id_dtype
from picogpt.rng import Stream, stream_generator
from picogpt.tokenizer import Tally, TextEncoder
from picogpt.wording import Notify

__all__ = [
    "ALPHABET_CHARS",
    "Article",
    "ArticleReader",
    "Cursor",
    "PassLengthCheck",
    "Validation",
    "count_first_articles",
    "draw_validation",
    "join_articles",
]

Read = Callable[[str, int], Iterator[Row]]

VALIDATION_CHARS = 256_000
"""Characters of validation text, drawn once per run."""
VALIDATION_DIVISOR = 20
"""One article in this many is held out for validation."""
ALPHABET_CHARS = 2_000_000
"""Characters of the first articles that a stream's own alphabet is taken from."""
READ_AHEAD = 1 << 24
"""Bytes of encoded text buffered ahead of training; they bridge short network outages."""

_QUESTION_TOKENS = ("<Q>", "</Q>", "<A>", "</A>")
"""Special tokens that wrap a question and its answer."""
_SEPARATOR_CHARS = 2
"""Newlines between two articles: an empty line."""
_ARTICLE_OVERHEAD = 500
"""Bytes charged per article for its Python objects; without it, millions of tiny articles would fit into the buffer."""
_SHORT_READ_AHEAD = 1 << 20
"""Bytes read ahead where only the first articles are needed."""


class Cursor(NamedTuple):
    """Position of an article in the stream: pass over the data set, file within the pass, row of the file.

    A tuple, so that cursors compare in stream order.
    """

    epoch: int
    file: int
    row: int


@dataclass(frozen=True)
class Article:
    """One encoded article, with its cursor and the cursor to resume from after it."""

    cursor: Cursor
    next_cursor: Cursor
    for_validation: bool
    ids: Ids
    empty_before: int
    """Empty articles skipped since the previous article."""


class ArticleReader:
    """Reads articles in stream order in a background thread, starting at any cursor.

    Network failures are retried (`picogpt.data.outage`), and reading resumes at the row that failed.

    Args:
        shards: the data set.
        seed: seed of the file order.
        notify: receives one line per wait.
        read: iterates over the rows of a file from a given row.
        fold: replacement of characters outside the alphabet.
        alphabet: the model's alphabet; None to read code points instead of ids.
        patience: seconds of failures before giving up; None for `picogpt.data.outage.PATIENCE`.
    """

    def __init__(
        self,
        shards: Shards,
        seed: int,
        notify: Notify,
        read: Read | None = None,
        *,
        fold: Fold = True,
        alphabet: Alphabet | None = PICOGPT,
        patience: float | None = None,
    ) -> None:
        self._shards, self._seed, self._fold = shards, seed, fold
        # Tests pass their own `read`, so that no file or network is needed.
        self._read: Read = read or (lambda file, row: read_rows(shards, file, row))
        self._encoder = None if alphabet is None else TextEncoder(fold=fold, alphabet=alphabet)
        self._buffer = _Buffer()
        self._closed = threading.Event()
        # Event.wait is the pause between retries: it returns early, with True, as soon as `close` sets the event.
        self._outage = Outage(notify, self._closed.wait, patience=patience)
        self._thread: threading.Thread | None = None

    @property
    def text(self) -> TextConfig:
        """Encoding of the articles and the ids they can contain; two-column articles contain the question tokens too."""
        # Known before any article is read, as generation must know which ids a model has seen.
        special_ids = self.alphabet.special_ids
        specials = [] if len(self._shards.columns) == 1 else [special_ids[token] for token in _QUESTION_TOKENS]
        return TextConfig(fold=self._fold, alphabet=self.alphabet, ids=(*self.alphabet.text_ids, *specials))

    @property
    def alphabet(self) -> Alphabet:
        """The alphabet of the ids."""
        assert self._encoder is not None
        return self._encoder.alphabet

    @functools.cached_property
    def separator(self) -> Ids:
        """Ids between two articles: an empty line."""
        return np.full(_SEPARATOR_CHARS, self.alphabet.newline_id, id_dtype(self.alphabet.vocab_size))

    @property
    def tally(self) -> Tally:
        """Counts of the characters that encoding changed in the articles read so far."""
        assert self._encoder is not None
        return self._encoder.tally

    @property
    def name(self) -> str:
        """Name for messages: the first file and the number of other files."""
        first, *others = self._shards.files
        return f"{first} and {len(others)} more files" if others else first

    def start(self, cursor: Cursor) -> None:
        """Start the background thread at `cursor`."""
        # A daemon: a read that hangs in a network library must not keep the process alive.
        self._thread = threading.Thread(target=self._run, args=(cursor,), name="articles", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and drop the articles it has read ahead."""
        self._closed.set()
        # Wakes the thread if it waits in `put` for a free place.
        self._buffer.close()
        if self._thread is not None:
            # A short join only: a hanging read ends on its own later, or with the process.
            self._thread.join(timeout=0.3)

    def take(self, stop: Stop) -> Article:
        """Wait for the next article and return it.

        Raises:
            WaitInterrupted: `stop` returned True.
            DataError: the reader has failed; no more articles will come.
        """
        item = None
        while item is None:
            # Poll `stop` for every article, even if one is ready: filling the pool can take minutes.
            if stop():
                raise WaitInterrupted
            item = self._buffer.get(timeout=0.2)
        if isinstance(item, Article):
            return item
        # The thread put its exception into the queue; raise it in the consumer.
        raise item

    def from_start(self) -> Generator[Article, None, None]:
        """Yield articles from the first one of the data set, and close the reader at the end.

        Reading happens in the background thread, so that Ctrl-C works even while a library blocks on the network.

        Raises:
            DataError: the reader has failed; no more articles will come.
        """
        # A validation text needs far less than READ_AHEAD, which would be downloaded in vain.
        self._buffer = _Buffer(_SHORT_READ_AHEAD)
        self.start(Cursor(0, 0, 0))
        try:
            while True:
                yield self.take(lambda: False)
        finally:
            self.close()

    def _run(self, cursor: Cursor) -> None:
        try:
            for article in self.articles(cursor):
                self._buffer.put(article)
        # `close` was called while `put` or a retry waited: end without a word.
        except ReaderClosed:
            pass
        # Anything else belongs to the consumer: `take` raises it.
        except Exception as error:
            with contextlib.suppress(ReaderClosed):
                self._buffer.put(error)

    def articles(self, cursor: Cursor) -> Iterator[Article]:
        """Yield all articles from `cursor`, pass after pass, without end; retries network failures.

        Raises:
            DataError: the data set has no text, a file is gone, or retries have run out of time.
        """
        empty = 0
        found = True  # the pass that `cursor` lies in may have had its text before the cursor
        while not self._closed.is_set():
            # A whole pass without one article would repeat forever, so the start of the next pass checks for it.
            if cursor.file == 0 and cursor.row == 0:
                if not found:
                    raise DataError(f"{self._shards.files[0]}: no text in the whole data set; check --text-column")
                found = False
            file = self._file(cursor)
            for row, columns in self._rows(file, cursor.row):
                ids = self._encode(columns)
                if not len(ids):
                    # Empty articles are counted for the summary, and hidden from training.
                    empty += 1
                    continue
                here = cursor._replace(row=row)
                yield Article(here, cursor._replace(row=row + 1), _is_for_validation(file, row), ids, empty)
                empty, found = 0, True
            # Next file, or the first file of the next pass.
            cursor = Cursor(cursor.epoch, cursor.file + 1, 0)
            if cursor.file == len(self._shards.files):
                cursor = Cursor(cursor.epoch + 1, 0, 0)

    def _file(self, cursor: Cursor) -> str:
        """Return the address of the file that `cursor` points into."""
        # The permutation is a pure function of (seed, epoch): a resumed run recomputes it.
        order = stream_generator(self._seed, Stream.SHARD_ORDER, cursor.epoch)
        number = int(order.permutation(len(self._shards.files))[cursor.file])
        return self._shards.files[number]

    def _rows(self, file: str, row: int) -> Iterator[tuple[int, Row]]:
        """Yield the number and the columns of each row of `file`, starting at `row`; retries network failures."""
        rows = self._read(file, row)
        while True:
            try:
                # Any exception here is either fatal or worth another try; the loop decides which.
                columns = next(rows, None)
            except DataError:
                raise
            except Exception as error:  # the libraries below raise nearly anything when a connection breaks
                # A hint means that waiting cannot help: a missing file, no permission.
                if advice := hint(error):
                    raise DataError(f"{file}: cannot be read ({explain(error)}); {advice}") from error
                self._outage.wait(f"{file.rpartition('/')[2]}, row {row:,}", explain(error), damaged=not is_transient(error))
                # Reopen the file at the row that failed; earlier rows have been delivered.
                rows = self._read(file, row)
                continue
            self._outage.over()
            if columns is None:
                return
            yield row, columns
            row += 1

    def _encode(self, columns: Row) -> Ids:
        """Encode a row: one column is a text; two are a question and its answer, wrapped in special tokens."""
        columns = tuple(map(normalize_newlines, columns))
        if self._encoder is None:
            return to_code_points("".join(columns))
        texts = [self._encoder.encode(column) for column in columns]
        if len(texts) == 1:
            return texts[0]
        question, answer = texts
        # Special ids are inserted as arrays: a text cannot spell them, so a data set cannot fake a turn.
        dtype, special_ids = id_dtype(self.alphabet.vocab_size), self.alphabet.special_ids
        mark = {token: np.array([special_ids[token]], dtype) for token in _QUESTION_TOKENS}
        newline = np.array([self.alphabet.newline_id], dtype)
        # <Q>question</Q>\n<A>answer</A>
        return np.concatenate((mark["<Q>"], question, mark["</Q>"], newline, mark["<A>"], answer, mark["</A>"]))


class _Buffer:
    """Bounded queue between the reader thread and training.

    Holds up to `READ_AHEAD` bytes, or `limit` if that is smaller; one article always fits, however long.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self._limit = limit
        self._items: deque[Article | Exception] = deque()
        self._size = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: Article | Exception) -> None:
        """Append `item`, waiting while the queue is full.

        Raises:
            ReaderClosed: the consumer has closed the queue.
        """
        with self._changed:
            # The size is compared before the item is added, so an item larger than the limit cannot deadlock.
            # READ_AHEAD is looked up on each call, so that tests can lower it.
            self._changed.wait_for(lambda: self._closed or self._size < min(READ_AHEAD, self._limit))
            if self._closed:
                raise ReaderClosed
            self._items.append(item)
            self._size += _size(item)
            self._changed.notify()

    def get(self, timeout: float) -> Article | Exception | None:
        """Remove and return the oldest item, or None if none arrives within `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items, timeout):
                return None
            item = self._items.popleft()
            self._size -= _size(item)
            self._changed.notify()
            return item

    def close(self) -> None:
        """Reject further items and wake a waiting `put`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _size(item: Article | Exception) -> int:
    """Return the bytes that an item counts for in the buffer; an exception is free, so that it can always be delivered."""
    return _ARTICLE_OVERHEAD + item.ids.nbytes if isinstance(item, Article) else 0


def _is_for_validation(file: str, row: int) -> bool:
    """Decide by a hash of file and row, so that an article is on the same side of the split in every pass and every run."""
    # Only the file's base name is hashed: moving a folder does not change the split.
    digest = hashlib.sha256(f"{file.rpartition('/')[2]}:{row}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") % VALIDATION_DIVISOR == 0


def join_articles(reader: ArticleReader, characters: int, *, for_validation: bool) -> Ids:
    """Join the first articles of one side of the split, up to `characters` characters or the end of the data set.

    The result can be empty.
    """
    parts: list[Ids] = []
    total = 0
    with contextlib.closing(reader.from_start()) as articles:
        for article in articles:
            # Stop after one pass: the second would repeat the same articles.
            if article.cursor.epoch > 0 or total >= characters:
                break
            if article.for_validation is for_validation:
                parts += [article.ids, reader.separator]
                total += len(article.ids) + _SEPARATOR_CHARS
    return np.concatenate(parts)[:characters] if parts else np.zeros(0, id_dtype(reader.alphabet.vocab_size))


def count_first_articles(reader: ArticleReader) -> Counts:
    """Count the characters of the first articles, of both sides of the split, up to `ALPHABET_CHARS` characters.

    Args:
        reader: source of the articles, of code points; not yet started, and closed afterwards.
    """
    parts = [np.zeros(0, np.uint32)]
    total = 0
    with contextlib.closing(reader.from_start()) as articles:
        for article in articles:
            if article.cursor.epoch > 0 or total >= ALPHABET_CHARS:
                break
            parts.append(article.ids.astype(np.uint32))
            total += len(article.ids)
    return count_characters(np.concatenate(parts)[:ALPHABET_CHARS])


class Validation(NamedTuple):
    """The validation text of a run, and what was learned about the data set while it was drawn."""

    ids: Ids
    train_chars: int | None
    """Characters to train on in a pass; None if the text was complete before the data set ended."""


def draw_validation(reader: ArticleReader, characters: int | None = None, *, sequence_len: int = 0) -> Validation:
    """Join the first held-out articles into the validation text of a run.

    Of a data set that has no more text, the length is known afterwards.

    Args:
        reader: source of the articles; not yet started, and closed afterwards.
        characters: length of the validation text; None for `VALIDATION_CHARS`.
        sequence_len: characters in a training sequence; the training articles must have more than that.

    Raises:
        DataError: no article is held out for validation, or the data set is too short to train on.
    """
    # Looked up on each call, so that tests can lower it.
    wanted = VALIDATION_CHARS if characters is None else characters
    parts: list[Ids] = []
    drawn, check = 0, PassLengthCheck(reader.name, sequence_len, Cursor(0, 0, 0))
    with contextlib.closing(reader.from_start()) as articles:
        for article in articles:
            # Raises at the start of the second pass if the first had too little text to train on.
            check.count(article)
            if article.cursor.epoch > 0 or drawn >= wanted:
                break
            if article.for_validation:
                # Articles keep their stream order, so the same seed gives the same validation text.
                parts += [article.ids, reader.separator]
                drawn += len(article.ids) + _SEPARATOR_CHARS
    # A prediction needs an input and a target character.
    if drawn < 2:
        raise DataError(f"{reader.name}: too small, no article is held out for validation; use --text for small texts")
    return Validation(np.concatenate(parts)[:wanted], check.whole_pass)


class PassLengthCheck:
    """Rejects a data set whose pass has less training text than one sequence, which would be read in circles forever.

    Args:
        name: name of the data set, for the message.
        sequence_len: characters in a sequence.
        begun: cursor of the first article that is counted.
    """

    def __init__(self, name: str, sequence_len: int, begun: Cursor) -> None:
        self._name, self._sequence_len = name, sequence_len
        # A pass that is joined in the middle (a resumed run) proves nothing; only whole passes are judged.
        self._epoch, self._from_start = begun.epoch, begun[1:] == (0, 0)
        self._chars = 0
        self.whole_pass: int | None = None
        """Characters to train on in the last whole pass; None before one has ended."""

    def count(self, article: Article) -> None:
        """Count the next article.

        Raises:
            DataError: the article begins a new pass, and the whole pass before had too little text to train on.
        """
        # The first article of a new pass closes the account of the pass before.
        if article.cursor.epoch != self._epoch:
            if self._from_start and self._chars <= self._sequence_len:
                raise DataError(
                    f"{self._name}: too short, {self._chars:,} characters to train on where a sequence needs "
                    f"{self._sequence_len + 1:,} (one article in {VALIDATION_DIVISOR} is held out for validation); "
                    "give more text, smaller --windows or --context-len, or a small text with --text"
                )
            if self._from_start:
                self.whole_pass = self._chars
            self._epoch, self._from_start, self._chars = article.cursor.epoch, True, 0
        if not article.for_validation:
            self._chars += len(article.ids) + _SEPARATOR_CHARS
