"""Characters to ids and back: 88 ids, lower case, one table look-up for a text of any length.

| ids   | meaning                                                                                     |
|-------|---------------------------------------------------------------------------------------------|
| 0     | unknown: every character that is none of the others; decodes to `<?>`                         |
| 1-74  | the ASCII characters of Python's `string.printable`, in that order, without the capitals       |
| 75-81 | the special tokens `<P> <S> </S> <Q> </Q> <A> </A>`                                            |
| 82-87 | spare                                                                                        |

A capital A-Z has the id of its small letter. Encoding is one id per character, so lengths and positions agree.
Special tokens are never made from text: `<Q>` in a text is three characters. Programs use `SPECIAL_IDS`.
"""

from __future__ import annotations

import string
from collections import Counter
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["SPECIAL_IDS", "TEXT_IDS", "UNKNOWN_ID", "VOCAB_SIZE", "CharTokenizer"]

VOCAB_SIZE: Final = 88
UNKNOWN_ID: Final = 0
_CHARACTERS: Final = "".join(c for c in string.printable if c not in string.ascii_uppercase)
_SPECIALS: Final = ("<P>", "<S>", "</S>", "<Q>", "</Q>", "<A>", "</A>")
SPECIAL_IDS: Final = {token: i for i, token in enumerate(_SPECIALS, start=len(_CHARACTERS) + 1)}
"""Ids of the special tokens, by their spelling."""
TEXT_IDS: Final = range(1, len(_CHARACTERS) + 1)
"""Ids of the characters that a text can hold."""

_N_CODE_POINTS: Final = 0x110000


class CharTokenizer:
    """The table of characters, in both directions."""

    def __init__(self) -> None:
        self._id_of = np.full(_N_CODE_POINTS, UNKNOWN_ID, dtype=np.uint8)
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
        code_points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
        ids: npt.NDArray[np.uint8] = self._id_of[code_points]
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
        code_points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
        unknown, counts = np.unique(code_points[self._id_of[code_points] == UNKNOWN_ID], return_counts=True)
        return Counter({chr(point): int(count) for point, count in zip(unknown, counts, strict=True)})
