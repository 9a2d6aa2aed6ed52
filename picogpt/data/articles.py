"""Articles of a streamed data set, read and encoded in a background thread, from any cursor.

Files are shuffled once per pass with the run's seed; rows within a file keep their order. A hash of file name and row holds out
one article in twenty for validation. Articles read ahead are not part of the state: a resumed run names the cursor to start from.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.config import Fold, TextConfig
from picogpt.data.batches import Stop, WaitInterrupted
from picogpt.data.hub import read_rows
from picogpt.data.network import explain, hint, is_transient
from picogpt.data.outage import Outage, ReaderClosed
from picogpt.data.read_ahead import ReadAhead
from picogpt.data.shards import Row, Shards
from picogpt.encodings import normalize_newlines
from picogpt.errors import DataError
from picogpt.folding import to_code_points
from picogpt.ids import Ids, id_dtype
from picogpt.rng import Stream, stream_generator
from picogpt.tokenizer import Tally, TextEncoder
from picogpt.wording import Notify

__all__ = ["SEPARATOR_CHARS", "VALIDATION_DIVISOR", "Article", "ArticleReader", "Cursor"]

Read = Callable[[str, int], Iterator[Row]]

VALIDATION_DIVISOR = 20
"""One article in this many is held out for validation."""
SEPARATOR_CHARS = 2
"""Newlines between two articles: an empty line."""

_QUESTION_TOKENS = ("<Q>", "</Q>", "<A>", "</A>")
"""Special tokens that wrap a question and its answer."""
_ARTICLE_OVERHEAD = 500
"""Bytes charged per article for its Python objects; without it, millions of tiny articles would fit into the buffer."""
_SHORT_READ_AHEAD = 1 << 20
"""Bytes read ahead where only the first articles are needed."""


class Cursor(NamedTuple):
    """Position of an article in the stream: pass over the data set, file within the pass, row of the file.

    A tuple, so that cursors compare in stream order.
    """

    pass_number: int
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
        self._buffer: ReadAhead[Article | Exception] = ReadAhead()
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
        return np.full(SEPARATOR_CHARS, self.alphabet.newline_id, id_dtype(self.alphabet.vocab_size))

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
        # A validation text needs far less than the usual read-ahead, which would be downloaded in vain.
        self._buffer = ReadAhead(_SHORT_READ_AHEAD)
        self.start(Cursor(0, 0, 0))
        try:
            while True:
                yield self.take(lambda: False)
        finally:
            self.close()

    def _run(self, cursor: Cursor) -> None:
        try:
            for article in self.articles(cursor):
                self._buffer.put(article, _ARTICLE_OVERHEAD + article.ids.nbytes)
        # `close` was called while `put` or a retry waited: end without a word.
        except ReaderClosed:
            pass
        # Anything else belongs to the consumer: `take` raises it.
        except Exception as error:
            with contextlib.suppress(ReaderClosed):
                self._buffer.put(error, 0)

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
            cursor = Cursor(cursor.pass_number, cursor.file + 1, 0)
            if cursor.file == len(self._shards.files):
                cursor = Cursor(cursor.pass_number + 1, 0, 0)

    def _file(self, cursor: Cursor) -> str:
        """Return the address of the file that `cursor` points into."""
        # The permutation is a pure function of (seed, epoch): a resumed run recomputes it.
        order = stream_generator(self._seed, Stream.SHARD_ORDER, cursor.pass_number)
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


def _is_for_validation(file: str, row: int) -> bool:
    """Decide by a hash of file and row, so that an article is on the same side of the split in every pass and every run."""
    # Only the file's base name is hashed: moving a folder does not change the split.
    digest = hashlib.sha256(f"{file.rpartition('/')[2]}:{row}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") % VALIDATION_DIVISOR == 0
