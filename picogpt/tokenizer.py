"""The character tokenizer of an alphabet, encoding by one table lookup for a text of any length.

The ids of the original project's alphabet, 88 in all; `picogpt.alphabet` has the rule for any other:

| ids   | meaning                                                                                     |
|-------|---------------------------------------------------------------------------------------------|
| 0     | unknown: every other character; decodes to `<?>`                                               |
| 1-74  | the ASCII characters of Python's `string.printable`, in that order, without the capitals       |
| 75-81 | the special tokens `<P> <S> </S> <Q> </Q> <A> </A>`                                            |
| 82-87 | spare                                                                                        |

There a capital A-Z has the id of its small letter. Encoding gives one id per character, so lengths and positions agree. Folding,
which may change a text's length, comes first: `TextEncoder` does both. Special tokens are never parsed from text: `<Q>` in a text
is three characters, so a text cannot fake a question. Programs use `Alphabet.special_ids`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from picogpt.alphabet import PICOGPT, UNKNOWN_ID, Alphabet
from picogpt.config import Fold, TextConfig, alphabet_of, fold_of
from picogpt.errors import ConfigError
from picogpt.folding import N_CODE_POINTS, Folding, fold_character, to_code_points, transliterate_character
from picogpt.ids import Ids, id_dtype

__all__ = [
    "CharTokenizer",
    "Tally",
    "TextEncoder",
    "encode_stop",
    "list_commonest",
    "replacement",
]

_CAPITAL: Final = re.compile("[A-Z]")


class CharTokenizer:
    """The table of an alphabet's characters, in both directions."""

    def __init__(self, alphabet: Alphabet = PICOGPT) -> None:
        self.alphabet = alphabet
        # One entry per code point, so that encoding is a single gather without a branch. Untouched zero pages take no memory.
        assert UNKNOWN_ID == 0
        self._id_of = np.zeros(N_CODE_POINTS, id_dtype(alphabet.vocab_size))
        self._id_of[to_code_points(alphabet.characters)] = alphabet.text_ids
        if alphabet.lowercase:
            # Lower-casing is part of the table, so that it costs nothing.
            small = to_code_points(string.ascii_lowercase)
            self._id_of[to_code_points(string.ascii_uppercase)] = self._id_of[small]
        # A model may sample a spare id before it has learned not to; it decodes like an unknown character.
        spare = ["<?>"] * len(alphabet.spare_ids)
        self._text_of = np.array(["<?>", *alphabet.characters, *alphabet.special_ids, *spare], dtype=object)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The ids in use, by their spelling: all but the spare ones."""
        return {str(text): i for i, text in enumerate(self._text_of[: self.alphabet.spare_ids.start])}

    def encode(self, text: str) -> Ids:
        """Return the ids of `text`, one per character, shape (len(text),). Any string is valid, also with lone surrogates."""
        ids: Ids = self._id_of[to_code_points(text)]
        return ids

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of a sequence of ids. Unknown and spare ids become `<?>`.

        Raises:
            IndexError: an id is outside the vocabulary.
        """
        indices = np.asarray(ids, dtype=np.intp)
        # numpy would count a negative index from the end, silently; a large one raises by itself.
        if indices.size and indices.min() < 0:
            raise IndexError(f"token id {indices.min()} is outside 0..{self.alphabet.vocab_size - 1}")
        return "".join(self._text_of[indices])

    def unknown_characters(self, text: str) -> Counter[str]:
        """Count the characters of `text` that have no id."""
        # Counted with numpy: a text may be gigabytes long, and has few distinct unknown characters.
        code_points = to_code_points(text)
        unknown, counts = np.unique(code_points[self._id_of[code_points] == UNKNOWN_ID], return_counts=True)
        return Counter({chr(point): int(count) for point, count in zip(unknown, counts, strict=True)})


@dataclass
class Tally:
    """Counts of the characters that encoding changed."""

    characters: int = 0
    """Number of ids."""
    folded: Counter[str] = field(default_factory=Counter)
    """Counts of the characters that were folded to ASCII."""
    transliterated: Counter[str] = field(default_factory=Counter)
    """Counts of the characters of other scripts that were written in Latin letters."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Counts of the characters without an id, which became `<?>`."""
    capitals: bool = False
    """Whether capitals A-Z were read as small letters."""

    @property
    def unknown_share(self) -> float:
        """Fraction of the ids that are `<?>`."""
        return self.unknown.total() / max(1, self.characters)  # an empty text has none

    def __str__(self) -> str:
        """Return one line: capitals, folded, transliterated and unknown characters, with the most common ones."""
        parts = [*(["capitals become small letters"] if self.capitals else []), *self.losses()]
        # Said explicitly: a missing phrase could also mean that nothing was checked.
        if not self.unknown:
            parts.append("no character unknown" if parts else "every character known")
        return "; ".join(parts)

    def losses(self) -> list[str]:
        """Return phrases about folded, transliterated and unknown characters; empty if there are none."""
        replaced = {"folded to ASCII": self.folded, "transliterated": self.transliterated}
        parts = [f"{name}: {counts.total():,} ({list_commonest(counts)})" for name, counts in replaced.items() if counts]
        if self.unknown:
            share = f"{self.unknown_share:.2%}: {list_commonest(self.unknown)}"
            parts.append(f"unknown, read as <?>: {self.unknown.total():,} ({share})")
        return parts


def list_commonest(counts: Counter[str], most: int = 5) -> str:
    """Format the `most` most common characters of `counts` with their counts."""
    # With repr, as many of them are invisible or combine with their neighbours.
    return ", ".join(f"{character!r} {count:,}" for character, count in counts.most_common(most))


def replacement(alphabet: Alphabet, fold: Fold) -> Callable[[str], str]:
    """Return the replacement of one character for an alphabet: a character that the alphabet has, or cannot spell, stays."""
    replace = transliterate_character if fold == "latin" else fold_character
    if alphabet == PICOGPT:
        return replace
    known = frozenset(alphabet.characters)

    def replace_unknown(character: str) -> str:
        spelling = character if character in known else replace(character)
        return spelling if known.issuperset(spelling) else character

    return replace_unknown


class TextEncoder:
    """Encoder for the texts of one model: folds them as the model's texts are, and looks up the ids. Not thread-safe.

    Args:
        fold: replacement of characters outside the alphabet.
        alphabet: the model's alphabet.

    Attributes:
        tally: counts over all texts so far.
    """

    def __init__(self, *, fold: Fold, alphabet: Alphabet = PICOGPT) -> None:
        self.tally = Tally()
        self.alphabet = alphabet
        self._tokenizer = CharTokenizer(alphabet)
        self._fold_character = replacement(alphabet, True)
        self._replace = replacement(alphabet, fold)
        self._folding = Folding(self._replace) if fold else None

    @classmethod
    def for_model(cls, text: TextConfig | None) -> TextEncoder:
        """Return the encoder of a model's texts, given the properties of its training text as far as its file has them."""
        return cls(fold=fold_of(text), alphabet=alphabet_of(text))

    def fold(self, text: str) -> str:
        """Return the text to which `encode` assigns one id per character."""
        return self._folding(text) if self._folding else text

    def encode(self, text: str) -> Ids:
        """Return the ids of the folded text, shape (len(fold(text)),)."""
        ids = self._tokenizer.encode(text)
        tally = self.tally
        # Only unknown characters can be folded, so a text without any, which is the common case, is encoded once.
        if not ids.all():
            counts = self._tokenizer.unknown_characters(text)
            if self._folding:
                # Folding leaves a character that it does not know; those stay unknown.
                folded = Counter({c: n for c, n in counts.items() if self._fold_character(c) != c})
                transliterated = Counter({c: n for c, n in (counts - folded).items() if self._replace(c) != c})
                tally.folded += folded
                tally.transliterated += transliterated
                counts -= folded + transliterated
                ids = self._tokenizer.encode(self.fold(text))
            tally.unknown += counts  # those that folding does not know
        tally.characters += len(ids)
        # Searched only until the first capital of all texts is found.
        tally.capitals = tally.capitals or (self.alphabet.lowercase and _CAPITAL.search(text) is not None)
        return ids


def encode_stop(encoder: TextEncoder, text: str) -> list[int]:
    """Return the ids of a stop sequence.

    Raises:
        ConfigError: the text is empty or has an unknown character, so the model cannot generate it.
    """
    # Special tokens need no check: they are never parsed from text.
    ids: list[int] = encoder.encode(text).tolist()
    if UNKNOWN_ID in ids or not ids:
        raise ConfigError(f"stop must be made of characters that the model knows, got {text!r}", "stop")
    return ids
