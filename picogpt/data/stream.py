"""Batches from a stream of articles that is too long to hold: mixed in a pool, resumed exactly.

Each article is added to those before it, an empty line between them, and cut into sequences of one roll and one character, so
that all text is used, short articles joined to their neighbours. A pool holds a thousand sequences; a batch draws sequences of
different articles from it and the next ones of the stream take their places.

What the reader has read ahead is not part of the state: the state is what has been taken from it, so that a run that goes on
reads on at the very article.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.config import TextConfig
from picogpt.data.articles import READ_AHEAD, SEPARATOR, VALIDATION_DIVISOR, Article, ArticleReader, Cursor, Ids, PassLengthCheck
from picogpt.data.batches import Batch, Stop, ValidationStore, evenly_spaced_batches
from picogpt.rng import Stream, stream_generator
from picogpt.wording import plural

__all__ = ["StreamSource", "Usage", "download_bytes"]

POOL = 1024
"""Sequences that batches are drawn from."""


@dataclass
class Usage:
    """What became of the articles that were read, over all starts of a run."""

    train_articles: int = 0
    train_chars: int = 0
    val_articles: int = 0
    val_chars: int = 0
    empty_articles: int = 0

    def count(self, article: Article) -> None:
        """Add one article, and the empty ones before it."""
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


def download_bytes(characters: int) -> int:
    """About how many bytes of a data set's files training on so many characters fetches, at a byte a character.

    What is for validation is fetched too, and what is read ahead. Compressed files take fewer, by what they are compressed.
    """
    return round(characters / (1 - 1 / VALIDATION_DIVISOR)) + READ_AHEAD


class StreamSource:
    """Batches from a stream of articles (`picogpt.data.Source`).

    Args:
        reader: where articles come from; started by `begin` or `restore`.
        val_ids: the validation text.
        sequence_len: characters in a roll.
        batch_size: rolls in a batch.
        seed: of the draws from the pool.
    """

    def __init__(self, reader: ArticleReader, val_ids: Ids, *, sequence_len: int, batch_size: int, seed: int) -> None:
        self.val_ids = val_ids
        self._reader, self._sequence_len, self._batch_size, self._seed = reader, sequence_len, batch_size, seed
        size = max(POOL, 2 * batch_size)
        self._pool = np.zeros((size, sequence_len + 1), np.uint8)
        self._article_of = np.zeros(size, np.int64)  # number of the article that each sequence of the pool begins in
        self._filled = 0
        self._fresh: list[tuple[Ids, int]] = []  # sequences that are cut and not yet in the pool
        self._carry = np.zeros(0, np.uint8)  # text that is not yet a sequence
        self._cursor = Cursor(0, 0, 0)
        self._usage = Usage()

    @property
    def text(self) -> TextConfig:
        """How the articles become ids, and which ones they can hold."""
        return self._reader.text

    @property
    def train_chars(self) -> int | None:
        """None: a stream has no end."""
        return None

    def begin(self, run: ValidationStore) -> None:
        """Begin with the data set's first article; `run` keeps the validation text."""
        run.save_validation(self.val_ids)
        self._start_reading()

    def _start_reading(self) -> None:
        self._pass = PassLengthCheck(self._reader.name, self._sequence_len, self._cursor)
        self._reader.start(self._cursor)

    def close(self) -> None:
        """End the reader."""
        self._reader.close()

    def train_batch(self, k: int, stop: Stop = lambda: False) -> Batch:
        """The batch of step k; steps are asked for in order.

        Raises:
            WaitInterrupted: `stop` said so before the batch was whole; nothing is lost.
            DataError: the stream has ended for good, or is too short to train on.
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
        generator = stream_generator(self._seed, Stream.POOL_DRAW, k)
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
        while len(self._carry) <= self._sequence_len:
            article = self._reader.take(stop)
            self._pass.count(article)
            self._cursor = article.next_cursor
            self._usage.count(article)
            if not article.for_validation:
                self._carry = np.concatenate((self._carry, article.ids, SEPARATOR))
        # The last character of one sequence is the first of the next, so that each is predicted once.
        self._fresh.append((self._carry[: self._sequence_len + 1].copy(), self._usage.train_articles))
        self._carry = self._carry[self._sequence_len :]

    def val_batches(self, most: int) -> Iterator[Batch]:
        """At most `most` batches of validation rolls, always the same ones."""
        return evenly_spaced_batches(self.val_ids, self._sequence_len, self._batch_size, most)

    def summary(self) -> str:
        """How much text was read, and what for."""
        return str(self._usage)

    def snapshot(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Arrays and plain values to go on from."""
        rows = [sequence for sequence, _ in self._fresh]
        arrays = {
            "pool": self._pool[: self._filled].copy(),
            "article_of": self._article_of[: self._filled].copy(),
            "carry": self._carry.copy(),
            "fresh": np.stack(rows) if rows else np.zeros((0, self._sequence_len + 1), np.uint8),
        }
        plain = {
            "place": list(self._cursor),
            "usage": asdict(self._usage),
            "fresh": [article for _, article in self._fresh],
        }
        return arrays, plain

    def restore(self, arrays: dict[str, npt.NDArray[Any]], plain: dict[str, Any]) -> None:
        """Go on from a snapshot: the reader begins at the article after the last one taken."""
        self._filled = len(arrays["pool"])
        self._pool[: self._filled] = arrays["pool"]
        self._article_of[: self._filled] = arrays["article_of"]
        self._carry = arrays["carry"].copy()
        self._fresh = list(zip(arrays["fresh"].copy(), plain["fresh"], strict=True))
        self._cursor, self._usage = Cursor(*plain["place"]), Usage(**plain["usage"])
        self._start_reading()
