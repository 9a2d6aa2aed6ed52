"""Articles of a data set, one after the other: read and encoded in a thread of their own, from any cursor on.

Articles come in the order of their files, and files in an order made of the seed, anew each pass. One in twenty, by a hash of
where it stands, is for validation. What was read ahead is no state: whoever goes on names the cursor to go on from.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from picogpt.config import TextConfig
from picogpt.data.batches import Stop, WaitInterrupted
from picogpt.data.hub import read_rows
from picogpt.data.network import explain, hint, is_transient
from picogpt.data.outage import Outage, ReaderClosed
from picogpt.data.shards import Row, Shards
from picogpt.encodings import normalize_newlines
from picogpt.errors import DataError
from picogpt.rng import Stream, stream_generator
from picogpt.tokenizer import SPECIAL_IDS, TEXT_IDS, CharTokenizer, Tally, TextEncoder
from picogpt.wording import Notify

__all__ = ["SEPARATOR", "Article", "ArticleReader", "Cursor", "Ids", "PassLengthCheck", "draw_validation", "join_articles"]

Ids = npt.NDArray[np.uint8]
Read = Callable[[str, int], Iterator[Row]]

VALIDATION_CHARS = 256_000
"""Characters of validation text that are drawn once for a run."""
VALIDATION_DIVISOR = 20
"""One article in so many is for validation."""
READ_AHEAD = 1 << 24
"""Bytes, one a character, that wait between the reader and training: a network may be gone while they last."""

_QUESTION_TOKENS = ("<Q>", "</Q>", "<A>", "</A>")
"""Special tokens around a question and its answer."""
_ARTICLE_OVERHEAD = 500
"""Bytes that an article takes beside its characters: of articles of a few characters each, millions would be read ahead."""
_SHORT_READ_AHEAD = 1 << 20
"""Bytes read ahead where only the first articles are wanted."""


class Cursor(NamedTuple):
    """Where an article stands: pass over the data set, file within the pass, row of the file."""

    epoch: int
    file: int
    row: int


@dataclass(frozen=True)
class Article:
    """One article, encoded, with its cursor and the cursor after it."""

    cursor: Cursor
    next_cursor: Cursor
    for_validation: bool
    ids: Ids
    empty_before: int
    """Articles without a character that were passed over since the one before."""


class ArticleReader:
    """Reads articles in order, in a thread of its own, from any cursor on.

    A failure of the network is waited out (`picogpt.data.outage`) and reading goes on from the very row.

    Args:
        shards: the data set.
        seed: of the order of its files.
        notify: told in a line of every wait.
        read: rows of a file from a row on.
        fold: whether characters outside ASCII are folded (`picogpt.folding`).
        patience: seconds of failures after which to give up; None for `picogpt.data.outage.PATIENCE`.
    """

    def __init__(
        self,
        shards: Shards,
        seed: int,
        notify: Notify,
        read: Read | None = None,
        *,
        fold: bool = True,
        patience: float | None = None,
    ) -> None:
        self._shards, self._seed, self._fold = shards, seed, fold
        self._read: Read = read or (lambda file, row: read_rows(shards, file, row))
        self._encoder = TextEncoder(fold=fold)
        self._buffer = _Buffer()
        self._closed = threading.Event()
        self._outage = Outage(notify, self._closed.wait, patience=patience)
        self._thread: threading.Thread | None = None

    @property
    def text(self) -> TextConfig:
        """How the articles become ids, and which ones they can hold; an article of two columns holds special tokens too."""
        specials = [] if len(self._shards.columns) == 1 else [SPECIAL_IDS[token] for token in _QUESTION_TOKENS]
        return TextConfig(fold=self._fold, ids=(*TEXT_IDS, *specials))

    @property
    def tally(self) -> Tally:
        """What encoding changed in the articles that were read so far."""
        return self._encoder.tally

    @property
    def name(self) -> str:
        """The data set, by its files."""
        first, *others = self._shards.files
        return f"{first} and {len(others)} more files" if others else first

    def start(self, cursor: Cursor) -> None:
        """Begin to read at `cursor`."""
        self._thread = threading.Thread(target=self._run, args=(cursor,), name="articles", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; what it has read ahead is forgotten."""
        self._closed.set()
        self._buffer.close()
        if self._thread is not None:
            # A read that hangs ends by itself later, or with the process.
            self._thread.join(timeout=0.3)

    def take(self, stop: Stop) -> Article:
        """The next article.

        Raises:
            WaitInterrupted: `stop` said so.
            DataError: there will be no more.
        """
        item = None
        while item is None:
            # Asked for every article, not only where there is none: a pool can take minutes to fill.
            if stop():
                raise WaitInterrupted
            item = self._buffer.get(timeout=0.2)
        if isinstance(item, Article):
            return item
        raise item

    def from_start(self) -> Generator[Article, None, None]:
        """All articles from the first one on, read in the thread, so that Ctrl-C is heard whatever a library waits for.

        Raises:
            DataError: there will be no more.
        """
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
        except ReaderClosed:
            pass
        except Exception as error:
            with contextlib.suppress(ReaderClosed):
                self._buffer.put(error)

    def articles(self, cursor: Cursor) -> Iterator[Article]:
        """All articles from `cursor` on, pass after pass, without end; waits out failures.

        Raises:
            DataError: the data set holds no text, a file is gone, or patience has run out.
        """
        empty = 0
        found = True
        while not self._closed.is_set():
            if cursor.file == 0 and cursor.row == 0:
                if not found:
                    raise DataError(f"{self._shards.files[0]}: no text in the whole data set; check --text-column")
                found = False
            file = self._file(cursor)
            for row, columns in self._rows(file, cursor.row):
                ids = self._encode(columns)
                if not len(ids):
                    empty += 1
                    continue
                here = cursor._replace(row=row)
                yield Article(here, cursor._replace(row=row + 1), _is_for_validation(file, row), ids, empty)
                empty, found = 0, True
            cursor = Cursor(cursor.epoch, cursor.file + 1, 0)
            if cursor.file == len(self._shards.files):
                cursor = Cursor(cursor.epoch + 1, 0, 0)

    def _file(self, cursor: Cursor) -> str:
        """The file that `cursor` is in."""
        order = stream_generator(self._seed, Stream.SHARD_ORDER, cursor.epoch)
        number = int(order.permutation(len(self._shards.files))[cursor.file])
        return self._shards.files[number]

    def _rows(self, file: str, row: int) -> Iterator[tuple[int, Row]]:
        """Number and columns of each row of `file` from `row` on."""
        rows = self._read(file, row)
        while True:
            try:
                columns = next(rows, None)
            except DataError:
                raise
            except Exception as error:  # the libraries below raise nearly anything when a connection breaks
                if advice := hint(error):
                    raise DataError(f"{file}: cannot be read ({explain(error)}); {advice}") from error
                self._outage.wait(f"{file.rpartition('/')[2]}, row {row:,}", explain(error), damaged=not is_transient(error))
                rows = self._read(file, row)
                continue
            self._outage.over()
            if columns is None:
                return
            yield row, columns
            row += 1

    def _encode(self, columns: Row) -> Ids:
        """One column is a text; two are a question and its answer, wrapped in their tokens."""
        texts = [self._encoder.encode(normalize_newlines(column)) for column in columns]
        if len(texts) == 1:
            return texts[0]
        question, answer = texts
        mark = {token: np.array([SPECIAL_IDS[token]], np.uint8) for token in _QUESTION_TOKENS}
        return np.concatenate((mark["<Q>"], question, mark["</Q>"], _NEWLINE_IDS, mark["<A>"], answer, mark["</A>"]))


class _Buffer:
    """Articles that were read and not yet taken: up to `READ_AHEAD` bytes, or `limit`, and whatever its length one article."""

    def __init__(self, limit: float = math.inf) -> None:
        self._limit = limit
        self._items: deque[Article | Exception] = deque()
        self._size = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: Article | Exception) -> None:
        """Add `item` once there is room.

        Raises:
            ReaderClosed: nobody takes it any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._size < min(READ_AHEAD, self._limit))
            if self._closed:
                raise ReaderClosed
            self._items.append(item)
            self._size += _size(item)
            self._changed.notify()

    def get(self, timeout: float) -> Article | Exception | None:
        """The oldest item, or None if none comes within `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items, timeout):
                return None
            item = self._items.popleft()
            self._size -= _size(item)
            self._changed.notify()
            return item

    def close(self) -> None:
        """Refuse what comes from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _size(item: Article | Exception) -> int:
    return _ARTICLE_OVERHEAD + len(item.ids) if isinstance(item, Article) else 0


def _is_for_validation(file: str, row: int) -> bool:
    """By a hash of file and row, so that an article is always on the same side."""
    digest = hashlib.sha256(f"{file.rpartition('/')[2]}:{row}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") % VALIDATION_DIVISOR == 0


def join_articles(reader: ArticleReader, characters: int, *, for_validation: bool) -> Ids:
    """The first articles of one side, joined, until they have so many characters or the data set is at its end; may be empty."""
    parts: list[Ids] = []
    total = 0
    with contextlib.closing(reader.from_start()) as articles:
        for article in articles:
            if article.cursor.epoch > 0 or total >= characters:
                break
            if article.for_validation is for_validation:
                parts += [article.ids, SEPARATOR]
                total += len(article.ids) + len(SEPARATOR)
    return np.concatenate(parts)[:characters] if parts else np.zeros(0, np.uint8)


def draw_validation(reader: ArticleReader, characters: int | None = None, *, sequence_len: int = 0) -> Ids:
    """The first articles for validation, joined.

    Args:
        reader: where articles come from; not started, and closed afterwards.
        characters: how many to draw; None for `VALIDATION_CHARS`.
        sequence_len: characters in a sequence, of which the other articles must make one at least.

    Raises:
        DataError: there is no article for validation, or the data set is too short to train on.
    """
    wanted = VALIDATION_CHARS if characters is None else characters
    parts: list[Ids] = []
    drawn, left = 0, PassLengthCheck(reader.name, sequence_len, Cursor(0, 0, 0))
    with contextlib.closing(reader.from_start()) as articles:
        for article in articles:
            left.count(article)
            if article.cursor.epoch > 0 or drawn >= wanted:
                break
            if article.for_validation:
                parts += [article.ids, SEPARATOR]
                drawn += len(article.ids) + len(SEPARATOR)
    if drawn < 2:
        raise DataError(f"{reader.name}: too small, not one article in it is for validation; use --text for small texts")
    return np.concatenate(parts)[:wanted]


class PassLengthCheck:
    """Checks that each pass over a data set has text for one sequence at least, so that nobody turns in it for ever.

    Args:
        name: of the data set.
        sequence_len: characters in a sequence.
        begun: the cursor of the first article that is counted.
    """

    def __init__(self, name: str, sequence_len: int, begun: Cursor) -> None:
        self._name, self._sequence_len = name, sequence_len
        self._epoch, self._from_start = begun.epoch, begun[1:] == (0, 0)
        self._chars = 0

    def count(self, article: Article) -> None:
        """Add the next article.

        Raises:
            DataError: it begins a pass, and all of the pass before had too little text to train on.
        """
        if article.cursor.epoch != self._epoch:
            if self._from_start and self._chars <= self._sequence_len:
                raise DataError(
                    f"{self._name}: too short, {self._chars:,} characters to train on where a sequence takes "
                    f"{self._sequence_len + 1:,} (one article in {VALIDATION_DIVISOR} is for validation); give more text, "
                    "smaller --windows or --context-len, or a small text with --text"
                )
            self._epoch, self._from_start, self._chars = article.cursor.epoch, True, 0
        if not article.for_validation:
            self._chars += len(article.ids) + len(SEPARATOR)


_NEWLINE_IDS = CharTokenizer().encode("\n")
SEPARATOR = np.concatenate((_NEWLINE_IDS, _NEWLINE_IDS))
"""What stands between two articles."""
