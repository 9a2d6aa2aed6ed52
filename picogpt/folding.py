"""Folding of characters outside ASCII to their nearest ASCII spelling, for a model whose vocabulary is ASCII.

Folding maps text to text before the tokenizer, like lowercasing, and can change the length.
The first rule that applies decides; a character without a rule stays unchanged:

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
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from anyascii import anyascii

__all__ = ["N_CODE_POINTS", "Folding", "fold_character", "to_code_points"]

N_CODE_POINTS = 0x110000
"""Number of Unicode code points."""

CodePoints = npt.NDArray[np.uint32]

_SPELLED_WITH_LETTERS = frozenset("\u00a9\u00ae\u2117\u00b0")
_LINE_ENDS = frozenset("\x85\u2028\u2029")
_REPLACEMENT_CHARACTER = "\ufffd"
_INVISIBLE = frozenset({"BN", "LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"})
"""Bidirectional classes of invisible format characters; the visible ones, like the Arabic number sign, have other classes."""
# Invisible too, but in the same bidirectional classes as visible characters.
_DIRECTION_MARKS = frozenset("\u061c\u200e\u200f")
_CHUNK = 1 << 18
"""Characters folded at a time, so that the arrays stay in the cache."""


def to_code_points(text: str) -> CodePoints:
    """Return the code points of `text`, shape (len(text),); lone surrogates are allowed."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


@functools.cache
def fold_character(character: str) -> str:
    """Return the ASCII spelling of `character` by the table above, or `character` itself if there is none."""
    if character.isascii() or character == _REPLACEMENT_CHARACTER:
        return character
    # Rows of the table above, in order: spaces and line ends first.
    category = unicodedata.category(character)
    if category in {"Zs", "Zl", "Zp", "Cc"}:
        return " " if category == "Zs" else "\n" if character in _LINE_ENDS else character
    if _is_invisible(character, category):
        return ""
    spelling = anyascii(character)
    if category[0] in "PS" and _is_faithful(character, category, spelling):
        return spelling
    # Decompose: é is e and an accent, which folds to nothing; the ligature fi is f and i. Every part must fold.
    parts = unicodedata.normalize("NFKD", character)
    if parts != character and (folded := "".join(map(fold_character, parts))).isascii():
        return folded
    # Only Latin letters are transliterated: anyascii would spell Greek and Chinese, too.
    is_latin = category[0] == "L" and unicodedata.name(character, "").startswith(("LATIN ", "MODIFIER LETTER "))
    return spelling if is_latin and spelling else character


def _is_faithful(character: str, category: str, spelling: str) -> bool:
    """Whether the spelling stands for the same mark: currency codes and signs without letters do, `:grinning:` does not."""
    if category == "Sc" or character in _SPELLED_WITH_LETTERS:
        return True
    return bool(spelling) and not any(c.isalnum() for c in spelling)


def _is_invisible(character: str, category: str) -> bool:
    """Whether `character` is a combining accent or an invisible format character."""
    if category == "Cf":
        return unicodedata.bidirectional(character) in _INVISIBLE or character in _DIRECTION_MARKS
    return category in {"Mn", "Me"} and unicodedata.name(character, "").startswith(("COMBINING ", "VARIATION SELECTOR"))


class Folding:
    """Folding of whole texts, by lookup tables that are filled when a character first occurs. Not thread-safe.

    Args:
        fold: folds one character; it must not change ASCII.
    """

    def __init__(self, fold: Callable[[str], str] = fold_character) -> None:
        self._fold = fold
        # One entry per code point. Untouched zero pages take no memory, so the tables cost only what the text uses.
        self._length = np.zeros(N_CODE_POINTS, np.uint8)  # length of the replacement
        self._start = np.zeros(N_CODE_POINTS, np.int32)  # where it starts in the pool
        self._known = np.zeros(N_CODE_POINTS, np.bool_)
        self._pool = np.zeros(0, np.uint32)  # all replacements, concatenated
        self._learn("".join(map(chr, range(128))))

    def __call__(self, text: str) -> str:
        """Fold any string; ASCII text is returned unchanged."""
        if text.isascii():
            return text
        return "".join(self._fold_chunk(text[start : start + _CHUNK]) for start in range(0, len(text), _CHUNK))

    def _fold_chunk(self, text: str) -> str:
        """Fold one chunk by gathering replacements from the pool."""
        points = to_code_points(text)
        # Learn the characters of this chunk that have not occurred before.
        new = points[~self._known[points]]
        if new.size:
            self._learn("".join(map(chr, np.unique(new).tolist())))
        lengths, starts = self._length[points], self._start[points]
        # Common case: one character in, one out, and `starts` already is the gather index.
        if not (lengths == 1).all():
            # Character i fills lengths[i] output positions, from first[i] on; output position j of it takes the pool at
            # starts[i] + (j - first[i]).
            first = np.cumsum(lengths, dtype=np.int32) - lengths
            starts = np.repeat(starts - first, lengths)
            starts += np.arange(len(starts), dtype=np.int32)
        return self._pool[starts].tobytes().decode("utf-32-le", errors="surrogatepass")

    def _learn(self, characters: str) -> None:
        """Add `characters`, all distinct and new, to the tables."""
        replacements = [self._fold(character) for character in characters]
        lengths = np.array([len(replacement) for replacement in replacements])
        points = to_code_points(characters)
        self._length[points] = lengths
        self._start[points] = len(self._pool) + np.cumsum(lengths) - lengths
        self._known[points] = True
        self._pool = np.concatenate((self._pool, to_code_points("".join(replacements))))
