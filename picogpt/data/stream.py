"""Batches from a stream of articles that does not fit into memory: shuffled in a pool, resumed exactly.

Articles are concatenated, separated by empty lines, and cut into sequences of T + 1 characters, so all text is used and short
articles share a sequence. Each batch draws sequences of different articles from a pool, and the next sequences of the stream take
their places. The pool starts with about a thousand sequences, so that the first step comes soon, and grows to eight times as
many: five million characters with the default's sequences, in another order in every pass.

The state covers the articles taken from the reader, not those it has read ahead: a resumed run continues at the exact article.

Dimension letters: B sequences in a batch, T characters in a sequence, P sequences the pool has room for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.config import TextConfig
from picogpt.data.articles import VALIDATION_DIVISOR, Article, ArticleReader, Cursor
from picogpt.data.batches import Batch, Stop, ValidationStore, evenly_spaced_batches
from picogpt.data.first_articles import PassLengthCheck
from picogpt.data.read_ahead import READ_AHEAD
from picogpt.ids import Ids, id_dtype
from picogpt.rng import Stream, stream_generator
from picogpt.wording import plural

__all__ = ["StreamSource", "Usage", "download_bytes"]

POOL = 1024
"""Sequences in the pool at the first batch, unless a batch needs more."""
POOL_GROWTH = 8
"""Factor by which the pool grows: while it does, each batch is replaced by twice as many sequences."""


@dataclass
class Usage:
    """Counts of the articles read, over all starts of a run."""

    train_articles: int = 0
    train_chars: int = 0
    val_articles: int = 0
    val_chars: int = 0
    empty_articles: int = 0

    def count(self, article: Article) -> None:
        """Count one article, and the empty articles before it."""
        self.empty_articles += article.empty_before
        if article.for_validation:
            self.val_articles += 1
            self.val_chars += len(article.ids)
        else:
            self.train_articles += 1
            self.train_chars += len(article.ids)

    def __str__(self) -> str:
        share = self.train_chars / max(1, self.train_chars + self.val_chars)
        return (
            f"read so far: {plural(self.train_articles, 'article')} with {plural(self.train_chars, 'character')} to train on, "
            f"{self.val_articles:,} with {self.val_chars:,} for validation, {self.empty_articles:,} empty ones; "
            f"{share:.1%} of the text is trained on"
        )


def download_bytes(characters: int, sequence_len: int) -> int:
    """Estimate the bytes downloaded to train on `characters` characters in sequences of `sequence_len`, one byte per character.

    Includes the pool, validation articles and read-ahead. Compressed files need fewer.
    """
    first_fill = POOL * sequence_len
    # The pool grows by a character for each one trained on.
    read = characters + first_fill + min(characters, (POOL_GROWTH - 1) * first_fill)
    return round(read / (1 - 1 / VALIDATION_DIVISOR)) + READ_AHEAD


class StreamSource:
    """Batches from a stream of articles (`picogpt.data.Source`).

    Args:
        reader: source of the articles; started by `begin` or `restore`.
        val_ids: the validation text.
        sequence_len: T, characters in a sequence.
        batch_size: B, sequences in a batch.
        seed: seed of the draws from the pool.
        train_chars: characters to train on in a pass, where that is known; a restored source takes those of the snapshot.
    """

    def __init__(
        self,
        reader: ArticleReader,
        val_ids: Ids,
        *,
        sequence_len: int,
        batch_size: int,
        seed: int,
        train_chars: int | None = None,
    ) -> None:
        self.val_ids, self._train_chars = val_ids, train_chars
        self._reader, self._sequence_len, self._batch_size, self._seed = reader, sequence_len, batch_size, seed
        self._first_fill = max(POOL, 2 * batch_size)  # at least two batches, or there would be little to shuffle
        size = POOL_GROWTH * self._first_fill
        self._dtype = id_dtype(reader.alphabet.vocab_size)
        self._pool = np.zeros((size, sequence_len + 1), self._dtype)  # (P, T + 1)
        self._article_of = np.zeros(size, np.int64)  # (P,) number of the article in which each sequence starts
        self._filled = 0  # rows of the pool in use, from its start
        self._fresh: list[tuple[Ids, int]] = []  # sequences cut, but not yet in the pool
        self._carry: Ids = np.zeros(0, self._dtype)  # rest of the text, too short for a sequence
        self._cursor = Cursor(0, 0, 0)  # where a resumed run starts to read
        self._usage = Usage()

    @property
    def text(self) -> TextConfig:
        """Encoding of the articles and the ids they can contain."""
        return self._reader.text

    @property
    def train_chars(self) -> int | None:
        """Characters to train on in a pass over a short data set; None for a longer one, which is not read to its end first."""
        return self._train_chars

    def begin(self, run: ValidationStore) -> None:
        """Start at the first article of the data set, and save the validation text in `run`."""
        run.save_validation(self.val_ids)
        self._start_reading()

    def _start_reading(self) -> None:
        """Start the reader at the cursor, with a new check of the passes' length."""
        self._pass = PassLengthCheck(self._reader.name, self._sequence_len, self._cursor)
        self._reader.start(self._cursor)

    def close(self) -> None:
        """Stop the reader."""
        self._reader.close()

    def train_batch(self, k: int, stop: Stop = lambda: False) -> Batch:
        """Return the batch of step k, (B, T); called with consecutive k.

        Raises:
            WaitInterrupted: `stop` returned True before the batch was complete; no text is lost.
            DataError: the stream has failed for good, or is too short to train on.
        """
        if self._filled < self._first_fill:
            self._cut(self._first_fill - self._filled, stop)
            self._put(range(self._filled, self._first_fill))
        # B new sequences take the places of those drawn, and up to B more the free rows behind them.
        free = range(self._filled, min(self._filled + self._batch_size, len(self._pool)))
        # The pool changes only once all are there, so an interruption leaves a state that can be saved.
        self._cut(self._batch_size + len(free), stop)
        rows = self._draw(k)
        batch = self._pool[rows].astype(np.int64)  # (B, T + 1), a copy
        self._put([*rows, *free])
        return Batch(batch[:, :-1], batch[:, 1:])  # (B, T) each

    def _cut(self, count: int, stop: Stop) -> None:
        """Cut sequences from the stream until there are `count` that are not in the pool yet."""
        while len(self._fresh) < count:
            self._cut_next(stop)

    def _put(self, rows: Sequence[int]) -> None:
        """Move the sequences that were cut into `rows` of the pool."""
        for row, (sequence, article) in zip(rows, self._fresh, strict=True):
            self._pool[row], self._article_of[row] = sequence, article
        self._filled = max(self._filled, *(row + 1 for row in rows))
        self._fresh.clear()

    def _draw(self, k: int) -> list[int]:
        """Draw B rows of the pool whose sequences start in different articles, if there are enough of them."""
        # A pure function of (seed, k) and the pool, so that a resumed run draws the same rows.
        generator = stream_generator(self._seed, Stream.POOL_DRAW, k)
        order = generator.permutation(self._filled).tolist()
        # Walk through the pool in random order; keep the first row of each article until B are found.
        chosen: dict[int, int] = {}
        for row in order:
            chosen.setdefault(int(self._article_of[row]), row)
            if len(chosen) == self._batch_size:
                break
        # With fewer than B articles in the pool, fill up with further rows in the same order.
        rows = list(chosen.values())
        taken = set(rows)
        return rows + [row for row in order if row not in taken][: self._batch_size - len(rows)]

    def _cut_next(self, stop: Stop) -> None:
        """Take articles from the reader until one more sequence can be cut, and cut it."""
        while len(self._carry) <= self._sequence_len:
            article = self._reader.take(stop)
            self._pass.count(article)
            # From here on the article counts as taken: a resumed run starts after it.
            self._cursor = article.next_cursor
            self._usage.count(article)
            # Validation articles are counted above, and skipped.
            if not article.for_validation:
                self._carry = np.concatenate((self._carry, article.ids, self._reader.separator))
        # Sequences overlap by one character: the last target of one is the first input of the next, so each is predicted once.
        self._fresh.append((self._carry[: self._sequence_len + 1].copy(), self._usage.train_articles))
        self._carry = self._carry[self._sequence_len :]

    def val_batches(self, most: int) -> Iterator[Batch]:
        """Yield at most `most` batches of validation sequences, the same ones every time."""
        return evenly_spaced_batches(self.val_ids, self._sequence_len, self._batch_size, most)

    def summary(self) -> str:
        """Return a line about how much text was read, for training and for validation."""
        return str(self._usage)

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of the full pool, and of sequences that are not in it yet."""
        fresh = 2 * self._batch_size * int(self._pool[0].nbytes)
        return int(self._pool.nbytes) + int(self._article_of.nbytes) + fresh

    def snapshot(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the pool, the text not yet in it, the cursor and the counts."""
        # Copies: the caller may write them while training changes the pool.
        rows = [sequence for sequence, _ in self._fresh]
        arrays = {
            "pool": self._pool[: self._filled].copy(),
            "article_of": self._article_of[: self._filled].copy(),
            "carry": self._carry.copy(),
            "fresh": np.stack(rows) if rows else np.zeros((0, self._sequence_len + 1), self._dtype),
        }
        # The keys are a file format: "place" is the cursor.
        plain = {
            "place": list(self._cursor),
            "usage": asdict(self._usage),
            "fresh": [article for _, article in self._fresh],
            "train_chars": self._train_chars,
        }
        return arrays, plain

    def restore(self, arrays: dict[str, npt.NDArray[Any]], plain: dict[str, Any]) -> None:
        """Continue from a snapshot; the reader starts at the article after the last one taken."""
        self._filled = len(arrays["pool"])
        self._pool[: self._filled] = arrays["pool"]
        self._article_of[: self._filled] = arrays["article_of"]
        self._carry = arrays["carry"].copy()
        self._fresh = list(zip(arrays["fresh"].copy(), plain["fresh"], strict=True))
        self._cursor, self._usage = Cursor(*plain["place"]), Usage(**plain["usage"])
        # Snapshots of earlier versions have no length of a pass.
        self._train_chars = plain.get("train_chars")
        self._start_reading()
