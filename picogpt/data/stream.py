"""Batches from a stream of articles that is too long to hold: read beside training, mixed in a pool, resumed exactly.

Articles come in the order of their files, and files in an order made of the seed. Each is added to those before it, an empty
line between them, and cut into sequences of one roll and one character, so that all text is used, short articles joined to
their neighbours. A pool holds a thousand sequences; a batch draws sequences of different articles from it and
the next ones of the stream take their places. One article in twenty, by a hash of where it stands, is for validation only.

What a thread has read ahead is not part of the state: the state is what has been taken from it, so that a run that goes on
reads on at the very article.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from picogpt.data.batches import Batch, Stop, WaitInterrupted, even_rolls
from picogpt.data.hub import Row, Shards, read_rows
from picogpt.errors import DataError
from picogpt.tokenizer import SPECIAL_IDS, CharTokenizer

__all__ = ["Article", "ArticleReader", "Place", "StreamSource", "draw_validation"]

Ids = npt.NDArray[np.uint8]
Notify = Callable[[str], None]
Read = Callable[[str, int], Iterator[Row]]

POOL = 1024
"""Sequences that batches are drawn from."""
VALIDATION_CHARS = 256_000
"""Characters of validation text that are drawn once for a run."""
ONE_IN = 20
"""One article in so many is for validation."""
READ_AHEAD = 512
"""Articles that wait between the reader and training."""
PATIENCE = 86_400.0
"""Seconds without an article after which a run gives up: a day."""
FIRST_WAIT = 1.0
"""Seconds before the first new try; each one after it waits twice as long."""
LONGEST_WAIT = 60.0
"""Seconds between two tries at the most; each is said in a line."""

_STREAM_SHARDS, _STREAM_DRAW = 3, 4
"""Numbers of the random streams that order the files and draw from the pool."""


class Place(NamedTuple):
    """Where an article stands: pass over the data set, file within the pass, row of the file."""

    epoch: int
    file: int
    row: int


@dataclass(frozen=True)
class Article:
    """One article, encoded, with its place and the place after it."""

    place: Place
    after: Place
    for_validation: bool
    ids: Ids


class ArticleReader:
    """Reads articles in order, in a thread of its own, from any place on.

    A failure of the network is waited out: it tries again after 1, 2, 4, ... up to `LONGEST_WAIT` seconds from the very row,
    and gives up after `PATIENCE`.

    Args:
        shards: the data set.
        seed: of the order of its files.
        notify: told in a line of every wait.
        read: rows of a file from a row on.
    """

    def __init__(self, shards: Shards, seed: int, notify: Notify, read: Read | None = None) -> None:
        self._shards, self._seed, self._notify = shards, seed, notify
        self._read: Read = read or (lambda file, row: read_rows(shards, file, row))
        self._tokenizer = CharTokenizer()
        self._queue: queue.Queue[Article | DataError] = queue.Queue(READ_AHEAD)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, place: Place) -> None:
        """Begin to read at `place`."""
        self._thread = threading.Thread(target=self._run, args=(place,), name="articles", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; what it has read ahead is forgotten."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def take(self, stop: Stop) -> Article:
        """The next article.

        Raises:
            WaitInterrupted: `stop` said so while none was there.
            DataError: there will be no more.
        """
        while True:
            try:
                item = self._queue.get(timeout=0.2)
            except queue.Empty:
                if stop():
                    raise WaitInterrupted from None
                continue
            if isinstance(item, DataError):
                raise item
            return item

    def _run(self, place: Place) -> None:
        try:
            for article in self.articles(place):
                self._put(article)
        except DataError as error:
            self._put(error)
        except _Closed:
            pass

    def _put(self, item: Article | DataError) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return
        raise _Closed

    def articles(self, place: Place) -> Iterator[Article]:
        """All articles from `place` on, pass after pass, without end; waits out failures.

        Raises:
            DataError: the data set holds no text, a file is gone, or patience has run out.
        """
        found = True
        while True:
            if place.file == 0 and place.row == 0:
                if not found:
                    raise DataError(f"{self._shards.files[0]}: no text in the whole data set; check --text-column")
                found = False
            for article in self._file(place):
                found = True
                yield article
            place = Place(place.epoch, place.file + 1, 0)
            if place.file == len(self._shards.files):
                place = Place(place.epoch + 1, 0, 0)

    def _file(self, place: Place) -> Iterator[Article]:
        """The articles of one file from `place` on."""
        order = np.random.Generator(np.random.Philox(key=[self._seed, _STREAM_SHARDS], counter=[0, 0, 0, place.epoch]))
        file = self._shards.files[order.permutation(len(self._shards.files))[place.file]]
        wait, failing_since = min(FIRST_WAIT, LONGEST_WAIT), None
        row = place.row
        while True:
            try:
                for columns in self._read(file, row):
                    wait, failing_since = min(FIRST_WAIT, LONGEST_WAIT), None
                    here = Place(place.epoch, place.file, row)
                    row += 1
                    ids = self._encode(columns)
                    if len(ids):
                        yield Article(here, here._replace(row=row), _is_for_validation(file, here.row), ids)
                return
            except Exception as error:  # noqa: PERF203 (once a file) the libraries below raise nearly anything when a connection breaks
                if _is_final(error):
                    raise DataError(f"{file}: cannot be read ({_describe(error)}); it may be gone from the hub") from error
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > PATIENCE:
                    raise DataError(
                        f"{file}: no answer for {PATIENCE:,.0f} s ({_describe(error)}); the same command goes on"
                    ) from error
                self._notify(f"{file.rpartition('/')[2]}, row {row:,}: {_describe(error)}; next try in {wait:.0f} s")
                if self._closed.wait(wait):
                    raise _Closed from error
                wait = min(2 * wait, LONGEST_WAIT)

    def _encode(self, columns: Row) -> Ids:
        """One column is a text; two are a question and its answer, wrapped in their tokens."""
        if len(columns) == 1:
            return self._tokenizer.encode(columns[0])
        question, answer = map(self._tokenizer.encode, columns)
        mark = {token: np.array([i], np.uint8) for token, i in SPECIAL_IDS.items()}
        newline = self._tokenizer.encode("\n")
        return np.concatenate((mark["<Q>"], question, mark["</Q>"], newline, mark["<A>"], answer, mark["</A>"]))


class _Closed(Exception):
    """The reader was closed."""


def _is_final(error: Exception) -> bool:
    """Whether waiting is of no use: a file that is not there, or permission that is not given."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, FileNotFoundError | PermissionError) or status in {401, 403, 404, 410, 416}


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def _is_for_validation(file: str, row: int) -> bool:
    """By a hash of file and row, so that an article is always on the same side."""
    digest = hashlib.sha256(f"{file.rpartition('/')[2]}:{row}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % ONE_IN == 0


def draw_validation(reader: ArticleReader, characters: int = VALIDATION_CHARS) -> Ids:
    """The first articles for validation, joined, until they have so many characters or the data set is at its end.

    Raises:
        DataError: there is none.
    """
    parts: list[Ids] = []
    total = 0
    for article in reader.articles(Place(0, 0, 0)):
        if article.place.epoch > 0 or total >= characters:
            break
        if article.for_validation:
            parts += [article.ids, _SEPARATOR]
            total += len(article.ids) + len(_SEPARATOR)
    if total < 2:
        raise DataError("the data set is too small: not one article in it is for validation; use --text for small texts")
    return np.concatenate(parts)[:characters]


_SEPARATOR = CharTokenizer().encode("\n\n")


class StreamSource:
    """Batches from a stream of articles (`picogpt.data.Source`).

    Args:
        reader: where articles come from; started by `begin` or `restore`.
        val_ids: the validation text.
        roll_len: characters in a roll.
        batch_size: rolls in a batch.
        seed: of the draws from the pool.
    """

    def __init__(self, reader: ArticleReader, val_ids: Ids, *, roll_len: int, batch_size: int, seed: int) -> None:
        self.val_ids = val_ids
        self._reader, self._roll_len, self._batch_size, self._seed = reader, roll_len, batch_size, seed
        size = max(POOL, 2 * batch_size)
        self._pool = np.zeros((size, roll_len + 1), np.uint8)
        self._article_of = np.zeros(size, np.int64)  # number of the article that each sequence of the pool begins in
        self._filled = 0
        self._fresh: list[tuple[Ids, int]] = []  # sequences that are cut and not yet in the pool
        self._carry = np.zeros(0, np.uint8)  # text that is not yet a sequence
        self._place = Place(0, 0, 0)
        self._articles = 0

    def begin(self) -> None:
        """Begin with the data set's first article."""
        self._reader.start(self._place)

    def close(self) -> None:
        """End the reader."""
        self._reader.close()

    def train_batch(self, k: int, stop: Stop = lambda: False) -> Batch:
        """The batch of step k; steps are asked for in order.

        Raises:
            WaitInterrupted: `stop` said so while the stream had nothing; nothing is lost.
            DataError: the stream has ended for good.
        """
        missing = len(self._pool) - self._filled if self._filled < len(self._pool) else self._batch_size
        while len(self._fresh) < missing:
            self._cut_next(stop)
        if self._filled < len(self._pool):
            self._fill()
            return self.train_batch(k, stop)
        rows = self._draw(k)
        batch = self._pool[rows].astype(np.int64)
        for row, (sequence, article) in zip(rows, self._fresh, strict=True):
            self._pool[row], self._article_of[row] = sequence, article
        self._fresh.clear()
        return Batch(batch[:, :-1], batch[:, 1:])

    def _fill(self) -> None:
        for sequence, article in self._fresh:
            self._pool[self._filled], self._article_of[self._filled] = sequence, article
            self._filled += 1
        self._fresh.clear()

    def _draw(self, k: int) -> list[int]:
        """Rows of the pool whose sequences begin in different articles, as far as there are so many."""
        generator = np.random.Generator(np.random.Philox(key=[self._seed, _STREAM_DRAW], counter=[0, 0, 0, k]))
        order = generator.permutation(len(self._pool)).tolist()
        chosen: dict[int, int] = {}
        for row in order:
            chosen.setdefault(int(self._article_of[row]), row)
            if len(chosen) == self._batch_size:
                break
        rows = list(chosen.values())
        taken = set(rows)
        return rows + [row for row in order if row not in taken][: self._batch_size - len(rows)]

    def _cut_next(self, stop: Stop) -> None:
        """Take articles until one more sequence can be cut, and cut it."""
        while len(self._carry) <= self._roll_len:
            article = self._reader.take(stop)
            self._place = article.after
            if article.for_validation:
                continue
            self._articles += 1
            self._carry = np.concatenate((self._carry, article.ids, _SEPARATOR))
        # The last character of one sequence is the first of the next, so that each is predicted once.
        self._fresh.append((self._carry[: self._roll_len + 1].copy(), self._articles))
        self._carry = self._carry[self._roll_len :]

    def val_batches(self, most: int) -> Iterator[Batch]:
        """At most `most` batches of validation rolls, always the same ones."""
        return even_rolls(self.val_ids, self._roll_len, self._batch_size, most)

    def snapshot(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Arrays and plain values to go on from."""
        rows = [sequence for sequence, _ in self._fresh]
        arrays = {
            "pool": self._pool[: self._filled].copy(),
            "article_of": self._article_of[: self._filled].copy(),
            "carry": self._carry.copy(),
            "fresh": np.stack(rows) if rows else np.zeros((0, self._roll_len + 1), np.uint8),
        }
        plain = {"place": list(self._place), "articles": self._articles, "fresh": [article for _, article in self._fresh]}
        return arrays, plain

    def restore(self, arrays: dict[str, npt.NDArray[Any]], plain: dict[str, Any]) -> None:
        """Go on from a snapshot: the reader begins at the article after the last one taken."""
        self._filled = len(arrays["pool"])
        self._pool[: self._filled] = arrays["pool"]
        self._article_of[: self._filled] = arrays["article_of"]
        self._carry = arrays["carry"].copy()
        self._fresh = list(zip(arrays["fresh"].copy(), plain["fresh"], strict=True))
        self._place, self._articles = Place(*plain["place"]), plain["articles"]
        self._reader.start(self._place)
