"""Characters to ids and back: 88 ids, lower case, one table look-up for a text of any length.

| ids   | meaning                                                                                     |
|-------|---------------------------------------------------------------------------------------------|
| 0     | unknown: every character that is none of the others; decodes to `<?>`                         |
| 1-74  | the ASCII characters of Python's `string.printable`, in that order, without the capitals       |
| 75-81 | the special tokens `<P> <S> </S> <Q> </Q> <A> </A>`                                            |
| 82-87 | spare                                                                                        |

A capital A-Z has the id of its small letter. Encoding is one id per character, so lengths and positions agree. Folding, which
may change a text's length, comes before it: `TextEncoder` joins the two. Special tokens are never made from text: `<Q>` in a
text is three characters. Programs use `SPECIAL_IDS`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from picogpt.errors import ConfigError
from picogpt.folding import N_CODE_POINTS, Folding, fold_character, to_code_points

__all__ = [
    "SPECIAL_IDS",
    "TEXT_IDS",
    "UNKNOWN_ID",
    "VOCAB_SIZE",
    "CharTokenizer",
    "Tally",
    "TextEncoder",
    "encode_stop",
    "list_commonest",
]

VOCAB_SIZE: Final = 88
UNKNOWN_ID: Final = 0
_CHARACTERS: Final = "".join(c for c in string.printable if c not in string.ascii_uppercase)
_SPECIALS: Final = ("<P>", "<S>", "</S>", "<Q>", "</Q>", "<A>", "</A>")
SPECIAL_IDS: Final = {token: i for i, token in enumerate(_SPECIALS, start=len(_CHARACTERS) + 1)}
"""Ids of the special tokens, by their spelling."""
TEXT_IDS: Final = range(1, len(_CHARACTERS) + 1)
"""Ids of the characters that a text can hold."""

_CAPITAL: Final = re.compile("[A-Z]")


class CharTokenizer:
    """The table of characters, in both directions."""

    def __init__(self) -> None:
        self._id_of = np.full(N_CODE_POINTS, UNKNOWN_ID, dtype=np.uint8)
        for i, character in enumerate(_CHARACTERS, start=1):
            self._id_of[ord(character)] = i
            if character in string.ascii_lowercase:
                self._id_of[ord(character.upper())] = i
        spare = ["<?>"] * (VOCAB_SIZE - 1 - len(_CHARACTERS) - len(_SPECIALS))
        self._text_of = np.array(["<?>", *_CHARACTERS, *_SPECIALS, *spare], dtype=object)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Spelling to id, for the 82 ids that are in use."""
        used = len(_CHARACTERS) + len(_SPECIALS) + 1
        return {str(text): i for i, text in enumerate(self._text_of[:used])}

    def encode(self, text: str) -> npt.NDArray[np.uint8]:
        """Ids of `text`, one per character, shape (len(text),). Any string will do, lone surrogates too."""
        ids: npt.NDArray[np.uint8] = self._id_of[to_code_points(text)]
        return ids

    def decode(self, ids: npt.ArrayLike) -> str:
        """Text of `ids`, a sequence of ids of any length. Unknown and spare ids become `<?>`.

        Raises:
            IndexError: an id is outside 0..87.
        """
        indices = np.asarray(ids, dtype=np.intp)
        if indices.size and indices.min() < 0:
            raise IndexError(f"token id {indices.min()} is outside 0..{VOCAB_SIZE - 1}")
        return "".join(self._text_of[indices])

    def unknown_characters(self, text: str) -> Counter[str]:
        """How often each character of `text` that has no id occurs."""
        code_points = to_code_points(text)
        unknown, counts = np.unique(code_points[self._id_of[code_points] == UNKNOWN_ID], return_counts=True)
        return Counter({chr(point): int(count) for point, count in zip(unknown, counts, strict=True)})


@dataclass
class Tally:
    """Counts of what encoding changed in a text."""

    characters: int = 0
    """Ids that came out."""
    folded: Counter[str] = field(default_factory=Counter)
    """How often each character occurred that was folded to ASCII."""
    unknown: Counter[str] = field(default_factory=Counter)
    """How often each character occurred that has no id and became `<?>`."""
    capitals: bool = False
    """Whether there were capitals A-Z."""

    @property
    def unknown_share(self) -> float:
        """Share of the ids that are `<?>`, from 0 to 1."""
        return self.unknown.total() / max(1, self.characters)

    def __str__(self) -> str:
        """One line: capitals, characters folded and characters unknown, each with the commonest."""
        parts = [*(["capitals become small letters"] if self.capitals else []), *self.losses()]
        if not self.unknown:
            parts.append("no character unknown" if parts else "every character known")
        return "; ".join(parts)

    def losses(self) -> list[str]:
        """How many characters were folded, and how many are unknown; empty where there are none of either."""
        parts = [f"folded to ASCII: {self.folded.total():,} ({list_commonest(self.folded)})"] if self.folded else []
        if self.unknown:
            share = f"{self.unknown_share:.2%}: {list_commonest(self.unknown)}"
            parts.append(f"unknown, read as <?>: {self.unknown.total():,} ({share})")
        return parts


def list_commonest(counts: Counter[str], most: int = 5) -> str:
    """The commonest characters of `counts`, at most `most`, with their counts."""
    return ", ".join(f"{character!r} {count:,}" for character, count in counts.most_common(most))


class TextEncoder:
    """Encodes the texts of one model: folds them, if its texts are folded, and looks their ids up. For one thread at a time.

    Args:
        fold: whether characters outside ASCII are folded (`picogpt.folding`).

    Attributes:
        tally: counts over all texts so far.
    """

    def __init__(self, *, fold: bool) -> None:
        self.tally = Tally()
        self._tokenizer = CharTokenizer()
        self._folding = Folding() if fold else None

    def fold(self, text: str) -> str:
        """`text` as it is encoded, one id per character."""
        return self._folding(text) if self._folding else text

    def encode(self, text: str) -> npt.NDArray[np.uint8]:
        """Ids of `text` once it is folded, shape (len(fold(text)),)."""
        ids = self._tokenizer.encode(text)
        tally = self.tally
        if not ids.all():
            counts = self._tokenizer.unknown_characters(text)
            if self._folding:
                folded = Counter({c: n for c, n in counts.items() if fold_character(c) != c})
                tally.folded += folded
                counts -= folded
                ids = self._tokenizer.encode(self.fold(text))
            tally.unknown += counts
        tally.characters += len(ids)
        tally.capitals = tally.capitals or _CAPITAL.search(text) is not None
        return ids


def encode_stop(encoder: TextEncoder, text: str) -> list[int]:
    """Return the ids of a stop sequence.

    Raises:
        ConfigError: the model could never generate it.
    """
    ids: list[int] = encoder.encode(text).tolist()
    if UNKNOWN_ID in ids or not ids:
        raise ConfigError(f"stop must be made of characters that the model knows, got {text!r}", "stop")
    return ids
