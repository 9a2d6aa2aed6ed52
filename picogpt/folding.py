"""Characters outside ASCII to their nearest ASCII spelling, so that a model that knows ASCII alone reads them as a person would.

Folding is a step from text to text ahead of the tokenizer, as small letters for capitals are. It may change the length.
A character is folded by the first of these rules that applies; one that none applies to stays as it is:

| character                                                        | folded                     | for instance              |
|------------------------------------------------------------------|----------------------------|---------------------------|
| space of any width; line or paragraph separator, next line       | space; newline             | no-break space            |
| accent that combines with a letter, invisible format character   | nothing                    | soft hyphen               |
| punctuation or symbol that `anyascii` spells without letters     | that spelling              | curly quotes, dashes, ... |
| currency sign; copyright, trade mark, phonogram, degree          | the spelling of `anyascii` | EUR, (C), deg             |
| whose compatibility decomposition (Unicode's NFKD) can be folded | its parts, folded          | é, ligatures, full width  |
| other Latin letter, modifier letter                              | the spelling of `anyascii` | ß ss, æ ae, ø o, þ th     |

Other scripts are not transliterated: Greek, Cyrillic and Chinese letters stay. So does U+FFFD, which stands for damage.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np
import numpy.typing as npt
from anyascii import anyascii

__all__ = ["N_CODE_POINTS", "Folding", "fold_character", "to_code_points"]

N_CODE_POINTS = 0x110000
"""Code points of Unicode."""

CodePoints = npt.NDArray[np.uint32]

_SPELLED_WITH_LETTERS = frozenset("\u00a9\u00ae\u2117\u00b0")
_LINE_ENDS = frozenset("\x85\u2028\u2029")
_REPLACEMENT_CHARACTER = "\ufffd"
_INVISIBLE = frozenset({"BN", "LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"})
"""Bidirectional classes of format characters that show nothing, unlike the Arabic number sign; three marks are listed apart."""
_DIRECTION_MARKS = frozenset("\u061c\u200e\u200f")
_CHUNK = 1 << 18
"""Characters that are folded at once, so that the arrays stay in the cache."""


def to_code_points(text: str) -> CodePoints:
    """Code points of `text`, shape (len(text),). Any string will do, lone surrogates too."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


@functools.cache
def fold_character(character: str) -> str:
    """ASCII spelling of `character` by the table above, or `character` itself where there is none."""
    if character.isascii() or character == _REPLACEMENT_CHARACTER:
        return character
    category = unicodedata.category(character)
    if category in {"Zs", "Zl", "Zp", "Cc"}:
        return " " if category == "Zs" else "\n" if character in _LINE_ENDS else character
    if _is_invisible(character, category):
        return ""
    spelling = anyascii(character)
    if category[0] in "PS" and _is_faithful(character, category, spelling):
        return spelling
    parts = unicodedata.normalize("NFKD", character)
    if parts != character and (folded := "".join(map(fold_character, parts))).isascii():
        return folded
    is_latin = category[0] == "L" and unicodedata.name(character, "").startswith(("LATIN ", "MODIFIER LETTER "))
    return spelling if is_latin and spelling else character


def _is_faithful(character: str, category: str, spelling: str) -> bool:
    """Whether the spelling of a punctuation mark or symbol says what it is: `:grinning:` does not."""
    if category == "Sc" or character in _SPELLED_WITH_LETTERS:
        return True
    return bool(spelling) and not any(c.isalnum() for c in spelling)


def _is_invisible(character: str, category: str) -> bool:
    """Whether it is an accent by itself, or a format character that cannot be seen."""
    if category == "Cf":
        return unicodedata.bidirectional(character) in _INVISIBLE or character in _DIRECTION_MARKS
    return category in {"Mn", "Me"} and unicodedata.name(character, "").startswith(("COMBINING ", "VARIATION SELECTOR"))


class Folding:
    """`fold_character` for whole texts, by tables that learn a character when they first meet it. For one thread at a time."""

    def __init__(self) -> None:
        # Zeros that were never written take no memory, so the tables cost as much as the text has different characters.
        self._length = np.zeros(N_CODE_POINTS, np.uint8)
        self._start = np.zeros(N_CODE_POINTS, np.int32)
        self._known = np.zeros(N_CODE_POINTS, np.bool_)
        self._pool = np.zeros(0, np.uint32)  # all replacements, one after the other
        self._learn("".join(map(chr, range(128))))

    def __call__(self, text: str) -> str:
        """Fold `text`, any string; ASCII comes back as it is."""
        if text.isascii():
            return text
        return "".join(self._fold_chunk(text[start : start + _CHUNK]) for start in range(0, len(text), _CHUNK))

    def _fold_chunk(self, text: str) -> str:
        points = to_code_points(text)
        new = points[~self._known[points]]
        if new.size:
            self._learn("".join(map(chr, np.unique(new).tolist())))
        lengths, starts = self._length[points], self._start[points]
        if not (lengths == 1).all():
            # Character i has lengths[i] places in the result; `first` is the place of its first one.
            first = np.cumsum(lengths, dtype=np.int32) - lengths
            starts = np.repeat(starts - first, lengths)
            starts += np.arange(len(starts), dtype=np.int32)
        return self._pool[starts].tobytes().decode("utf-32-le", errors="surrogatepass")

    def _learn(self, characters: str) -> None:
        """Enter `characters`, all different and none of them known, into the tables."""
        replacements = [fold_character(character) for character in characters]
        lengths = np.array([len(replacement) for replacement in replacements])
        points = to_code_points(characters)
        self._length[points] = lengths
        self._start[points] = len(self._pool) + np.cumsum(lengths) - lengths
        self._known[points] = True
        self._pool = np.concatenate((self._pool, to_code_points("".join(replacements))))
