"""What the first articles of a stream tell: a run's validation text, its alphabet, and how much text there is in a pass."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import numpy as np

from picogpt.data.alphabets import Counts, count_characters
from picogpt.data.articles import SEPARATOR_CHARS, VALIDATION_DIVISOR, Article, ArticleReader, Cursor
from picogpt.errors import DataError
from picogpt.ids import Ids, id_dtype

__all__ = ["PassLengthCheck", "Validation", "count_first_articles", "draw_validation", "join_articles"]

VALIDATION_CHARS = 256_000
"""Characters of validation text, drawn once per run."""
ALPHABET_CHARS = 2_000_000
"""Characters of the first articles that a stream's own alphabet is taken from."""


def join_articles(reader: ArticleReader, characters: int, *, for_validation: bool) -> Ids:
    """Join the first articles of one side of the split, up to `characters` characters or the end of the data set.

    The result can be empty.
    """
    parts: list[Ids] = []
    total = 0
    with contextlib.closing(reader.from_start()) as articles:
        for article in articles:
            # Stop after one pass: the second would repeat the same articles.
            if article.cursor.pass_number > 0 or total >= characters:
                break
            if article.for_validation is for_validation:
                parts += [article.ids, reader.separator]
                total += len(article.ids) + SEPARATOR_CHARS
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
            if article.cursor.pass_number > 0 or total >= ALPHABET_CHARS:
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
            if article.cursor.pass_number > 0 or drawn >= wanted:
                break
            if article.for_validation:
                # Articles keep their stream order, so the same seed gives the same validation text.
                parts += [article.ids, reader.separator]
                drawn += len(article.ids) + SEPARATOR_CHARS
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
        self._pass, self._from_start = begun.pass_number, begun[1:] == (0, 0)
        self._chars = 0
        self.whole_pass: int | None = None
        """Characters to train on in the last whole pass; None before one has ended."""

    def count(self, article: Article) -> None:
        """Count the next article.

        Raises:
            DataError: the article begins a new pass, and the whole pass before had too little text to train on.
        """
        # The first article of a new pass closes the account of the pass before.
        if article.cursor.pass_number != self._pass:
            if self._from_start and self._chars <= self._sequence_len:
                raise DataError(
                    f"{self._name}: too short, {self._chars:,} characters to train on where a sequence needs "
                    f"{self._sequence_len + 1:,} (one article in {VALIDATION_DIVISOR} is held out for validation); "
                    "give more text, smaller --windows or --context-len, or a small text with --text"
                )
            if self._from_start:
                self.whole_pass = self._chars
            self._pass, self._from_start, self._chars = article.cursor.pass_number, True, 0
        if not article.for_validation:
            self._chars += len(article.ids) + SEPARATOR_CHARS
