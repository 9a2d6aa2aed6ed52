"""Alphabets: the characters that a model knows, and the token ids that follow from them.

| ids            | meaning                                                                          |
|----------------|----------------------------------------------------------------------------------|
| 0              | unknown: every other character                                                   |
| 1 to n         | the alphabet's characters, in its order                                          |
| the next seven | the special tokens `<P> <S> </S> <Q> </Q> <A> </A>`                              |
| the rest       | spare, at least one; the vocabulary is a multiple of 8                           |

`PICOGPT` is the original project's alphabet: 74 characters, 88 ids. The characters of any other alphabet are sorted by code
point, so that the same characters always have the same ids.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from picogpt.checks import require
from picogpt.encodings import normalize_newlines
from picogpt.errors import ConfigError

__all__ = ["MAX_CHARACTERS", "PICOGPT", "TEXT", "UNKNOWN_ID", "Alphabet", "parse_alphabet", "read_alphabet"]

UNKNOWN_ID: Final = 0
TEXT: Final = "text"
"""Name of the alphabet of a text's own characters (`picogpt.data.alphabets`)."""
MAX_CHARACTERS: Final = 65_000
"""Largest alphabet: its ids fit in two bytes."""

# Special tokens of the original project's vocabulary; training texts with questions and answers use the last four.
_SPECIALS: Final = ("<P>", "<S>", "</S>", "<Q>", "</Q>", "<A>", "</A>")
_MULTIPLE: Final = 8  # the GEMMs' vectors hold a multiple of 8


@dataclass(frozen=True)
class Alphabet:
    """The characters that a model knows.

    Raises:
        ConfigError: a character occurs twice, there is no newline, or there are more than `MAX_CHARACTERS`.
    """

    characters: str
    """The characters in the order of their ids, which start at 1."""
    name: str = field(compare=False)
    """Name for messages: `picogpt`, `text`, or the name of a file. Alphabets with the same characters are equal."""
    lowercase: bool = False
    """Whether a capital A-Z has the id of its small letter."""

    def __post_init__(self) -> None:
        require(len(set(self.characters)) == len(self.characters), "alphabet", "without repetitions", self.characters)
        # Texts are joined by newlines, and a text without a prompt starts after one.
        require("\n" in self.characters, "alphabet", "with a newline", self.characters)
        count = len(self.characters)
        require(count <= MAX_CHARACTERS, "alphabet", f"at most {MAX_CHARACTERS:,} characters", f"{count:,}")

    @classmethod
    def of(cls, characters: Iterable[str], name: str) -> Alphabet:
        """Return the alphabet of `characters` and newline, sorted by code point; repetitions do not matter.

        Raises:
            ConfigError: there are more than `MAX_CHARACTERS`.
        """
        return cls("".join(sorted({*characters, "\n"})), name)

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> Alphabet:
        """Return the alphabet that `to_json` turned into `content`.

        Raises:
            ConfigError, KeyError, TypeError: `content` has another form.
        """
        return PICOGPT if content is None else cls(str(content["characters"]), str(content["name"]))

    def to_json(self) -> dict[str, str] | None:
        """Return plain values; None for `PICOGPT`, which older files do not name."""
        return None if self == PICOGPT else {"name": self.name, "characters": self.characters}

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids."""
        used = 1 + len(self.characters) + len(_SPECIALS)
        # One more: GPT-2's layout needs a spare id.
        return -(-(used + 1) // _MULTIPLE) * _MULTIPLE

    @property
    def text_ids(self) -> range:
        """Ids of the characters that a text can contain."""
        return range(1, len(self.characters) + 1)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Ids of the special tokens, by their spelling."""
        return {token: i for i, token in enumerate(_SPECIALS, start=len(self.characters) + 1)}

    @property
    def spare_ids(self) -> range:
        """Ids that stand for nothing; at least one."""
        return range(1 + len(self.characters) + len(_SPECIALS), self.vocab_size)

    @property
    def newline_id(self) -> int:
        """Id of the newline."""
        return 1 + self.characters.index("\n")

    def describe(self) -> str:
        """Return name and size as a phrase for messages."""
        return f"{self.name} ({len(self.characters):,} characters)"


# Ids follow from the order of these characters and are part of every model on disk: never change it.
PICOGPT: Final = Alphabet("".join(c for c in string.printable if c not in string.ascii_uppercase), "picogpt", lowercase=True)
"""The original project's alphabet: the ASCII characters of Python's `string.printable` without capitals."""


def parse_alphabet(name: str) -> Alphabet | Literal["text"]:
    """Return the alphabet that `--alphabet` names; `TEXT` stays, as the text has not been read yet.

    Raises:
        ConfigError: it is a file that is missing, empty, not UTF-8 or too large.
    """
    if name == PICOGPT.name:
        return PICOGPT
    return TEXT if name == TEXT else read_alphabet(name)


def read_alphabet(path: str) -> Alphabet:
    """Return the alphabet of a UTF-8 file: its distinct characters and newline, sorted by code point.

    Raises:
        ConfigError: the file is missing, empty, not UTF-8, or has more than `MAX_CHARACTERS` characters.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"alphabet must be picogpt, text or a file of characters, got {path!r}", "alphabet") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"alphabet: {path} cannot be read ({error})", "alphabet") from error
    try:
        characters = set(normalize_newlines(content.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise ConfigError(f"alphabet: {path} is not UTF-8 (byte {error.start:,}); save it as UTF-8", "alphabet") from error
    if not characters - {"\n"}:
        raise ConfigError(f"alphabet: {path} is empty; write the characters into it", "alphabet")
    if len(characters) > MAX_CHARACTERS:
        raise ConfigError(
            f"alphabet: {path} has {len(characters):,} characters; at most {MAX_CHARACTERS:,} are possible", "alphabet"
        )
    return Alphabet.of(characters, Path(path).name)
