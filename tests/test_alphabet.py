"""Alphabets: ids, order, files, and the tokenizer of any alphabet on any Unicode."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picogpt.alphabet import (
    MAX_CHARACTERS,
    PICOGPT,
    UNKNOWN_ID,
    Alphabet,
    parse_alphabet,
    read_alphabet,
)
from picogpt.errors import ConfigError
from picogpt.folding import N_CODE_POINTS, fold_character
from picogpt.ids import id_dtype
from picogpt.tokenizer import CharTokenizer, TextEncoder, replacement

GREEK = Alphabet.of("αβγδ ΑΒΓΔ,.", "greek")
LARGE = Alphabet.of(map(chr, range(0x4E00, 0x4E00 + 3000)), "large")
MIXED = Alphabet.of("AaBbZzЖж\x00\t\u0301\U0001f600\U0010ffff", "mixed")
ALPHABETS = [PICOGPT, GREEK, LARGE, MIXED]
TOKENIZERS = [CharTokenizer(alphabet) for alphabet in ALPHABETS]
ANY_CHARACTER = st.characters(exclude_categories=())
CHARACTERS = st.characters(exclude_categories=["Cs"])
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.alphabet.name)


class TestIds:
    def test_by_hand(self) -> None:
        """Twelve characters with the newline, after the unknown id; seven special tokens; four spare ids up to 24."""
        assert GREEK.characters == "\n ,.ΑΒΓΔαβγδ"
        assert GREEK.text_ids == range(1, 13)
        assert GREEK.newline_id == 1
        assert list(GREEK.special_ids.values()) == [*range(13, 20)]
        assert GREEK.spare_ids == range(20, 24)
        assert GREEK.vocab_size == 24

    @pytest.mark.parametrize(("count", "vocab_size"), [(7, 16), (8, 24), (15, 24), (247, 256), (248, 264)])
    def test_rounding(self, count: int, vocab_size: int) -> None:
        """A multiple of 8, with at least one spare id."""
        assert Alphabet.of(map(chr, range(10, 10 + count)), "x").vocab_size == vocab_size

    def test_picogpt(self) -> None:
        """The original's ids are what they were."""
        assert (PICOGPT.vocab_size, PICOGPT.text_ids, PICOGPT.spare_ids) == (88, range(1, 75), range(82, 88))
        assert list(PICOGPT.special_ids.items())[::6] == [("<P>", 75), ("</A>", 81)]

    @given(st.sets(CHARACTERS, max_size=300))
    def test_every_id_has_one_meaning(self, characters: set[str]) -> None:
        """Unknown, characters, special and spare ids follow one another without a gap, whatever order they were given in."""
        alphabet = Alphabet.of(sorted(characters, reverse=True), "x")
        ids = [UNKNOWN_ID, *alphabet.text_ids, *alphabet.special_ids.values(), *alphabet.spare_ids]

        assert ids == [*range(alphabet.vocab_size)]
        assert alphabet.vocab_size % 8 == 0
        assert 1 <= len(alphabet.spare_ids) <= 8
        assert alphabet.characters == "".join(sorted({*characters, "\n"}))

    def test_type_of_ids(self) -> None:
        """A byte each as long as they fit."""
        assert [id_dtype(size).itemsize for size in (88, 256, 257, 65_016)] == [1, 1, 2, 2]
        assert CharTokenizer(LARGE).encode("a").dtype == np.uint16

    @given(st.sets(CHARACTERS))
    def test_json(self, characters: set[str]) -> None:
        """An alphabet comes back from what is stored, with its name; that of the original project stores nothing."""
        alphabet = Alphabet.of(characters, "some name")
        again = Alphabet.from_json(alphabet.to_json())

        assert again == alphabet
        assert again.name == "some name"
        assert PICOGPT.to_json() is None
        assert Alphabet.from_json(None) == PICOGPT

    @pytest.mark.parametrize(
        ("characters", "message"),
        [
            ("aba\n", "alphabet must be without repetitions"),
            ("ab", "alphabet must be with a newline"),
            ("\n" + "".join(map(chr, range(0xE000, 0xE000 + MAX_CHARACTERS))), "at most 65,000 characters, got '65,001'"),
        ],
        ids=["twice", "no newline", "too many"],
    )
    def test_invalid(self, characters: str, message: str) -> None:
        """What cannot be an alphabet is one line."""
        with pytest.raises(ConfigError, match=message):
            Alphabet(characters, "x")


class TestTokenizer:
    @each_tokenizer
    def test_every_code_point(self, tokenizer: CharTokenizer) -> None:
        """All code points, lone surrogates included, have exactly one id; only the alphabet's own are known."""
        alphabet = tokenizer.alphabet
        ids = tokenizer.encode("".join(map(chr, range(N_CODE_POINTS))))
        capitals = 26 if alphabet.lowercase else 0

        assert ids.shape == (N_CODE_POINTS,)
        assert set(np.unique(ids).tolist()) == {UNKNOWN_ID, *alphabet.text_ids}
        assert np.count_nonzero(ids) == len(alphabet.characters) + capitals

    @each_tokenizer
    @given(text=st.text(ANY_CHARACTER))
    def test_any_text(self, tokenizer: CharTokenizer, text: str) -> None:
        """One id per character; what is not the alphabet's is <?> when it is decoded."""
        known = set(tokenizer.alphabet.characters)
        ids = tokenizer.encode(text)

        assert len(ids) == len(text)
        if not tokenizer.alphabet.lowercase:
            assert tokenizer.decode(ids) == "".join(c if c in known else "<?>" for c in text)

    @each_tokenizer
    def test_round_trip(self, tokenizer: CharTokenizer) -> None:
        """The alphabet's own characters come back, and each stands in the place of its id."""
        characters = tokenizer.alphabet.characters
        ids = tokenizer.encode(characters)

        assert ids.tolist() == [*tokenizer.alphabet.text_ids]
        assert tokenizer.decode(ids) == characters

    def test_capitals_are_characters(self) -> None:
        """Nothing is lower-cased but in the original's alphabet."""
        assert CharTokenizer(GREEK).encode("Αα").tolist() == [5, 9]
        assert CharTokenizer(MIXED).encode("Aa").tolist() == [4, 7]
        assert CharTokenizer(PICOGPT).encode("Aa").tolist() == [11, 11]


class TestFolding:
    @pytest.mark.parametrize("alphabet", ALPHABETS, ids=lambda alphabet: alphabet.name)
    @given(text=st.text(ANY_CHARACTER))
    def test_only_what_is_outside(self, alphabet: Alphabet, text: str) -> None:
        """A character of the alphabet stays, and no other becomes one that is unknown; all are counted."""
        encoder, fold = TextEncoder(fold=True, alphabet=alphabet), replacement(alphabet, True)
        ids = encoder.encode(text)
        folded = encoder.fold(text)

        assert folded == "".join(map(fold, text))
        assert len(ids) == len(folded) == encoder.tally.characters
        assert all(fold(c) == c for c in alphabet.characters)
        assert encoder.tally.unknown.total() == np.count_nonzero(ids == UNKNOWN_ID)
        assert encoder.tally.folded.total() == sum(fold(c) != c for c in text)

    def test_by_hand(self) -> None:
        """The accent of an alphabet without it is dropped; quotes that it cannot spell stay unknown; é that it has stays."""
        fold = replacement(Alphabet.of("aeé", "x"), True)

        assert [fold(c) for c in "éâ“a"] == ["é", "a", "“", "a"]
        assert replacement(PICOGPT, True)("“") == fold_character("“") == '"'

    def test_tally(self) -> None:
        """Capitals are only said to become small letters where they do."""
        encoder = TextEncoder(fold=False, alphabet=Alphabet.of(string.ascii_letters, "x"))
        encoder.encode("Capital")

        assert str(encoder.tally) == "every character known"


class TestFiles:
    def test_characters_of_a_file(self, tmp_path: Path) -> None:
        """Its distinct characters, by code point, without a byte order mark and carriage returns; the file's name is kept."""
        path = tmp_path / "letters.txt"
        path.write_bytes("\ufeffбa\r\nBba😀".encode())
        alphabet = read_alphabet(str(path))

        assert alphabet.characters == "\nBabб😀"
        assert alphabet.name == "letters.txt"
        assert alphabet.describe() == "letters.txt (6 characters)"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "alphabet: .*letters is empty; write the characters into it"),
            (b"\xef\xbb\xbf\n\r\n", "alphabet: .*letters is empty"),
            (b"ab\xffc", r"alphabet: .*letters is not UTF-8 \(byte 2\); save it as UTF-8"),
            ("".join(map(chr, range(0xE000, 0xE000 + 65_001))).encode(), "letters has 65,001 characters; at most 65,000 are"),
        ],
        ids=["empty", "blank", "not UTF-8", "too many"],
    )
    def test_faults(self, content: bytes, message: str, tmp_path: Path) -> None:
        """A file that is no alphabet is one line."""
        path = tmp_path / "letters"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as raised:
            read_alphabet(str(path))

        assert raised.value.field == "alphabet"

    def test_missing(self, tmp_path: Path) -> None:
        """A mistyped name is answered with what is possible; a folder cannot be read."""
        with pytest.raises(ConfigError, match="alphabet must be picogpt, text or a file of characters, got 'txet'"):
            parse_alphabet("txet")
        with pytest.raises(ConfigError, match="cannot be read .*directory"):
            parse_alphabet(str(tmp_path))

    def test_names(self, tmp_path: Path) -> None:
        """Three kinds of alphabet."""
        path = tmp_path / "letters"
        path.write_text("αβγδ ΑΒΓΔ,.", encoding="utf-8")

        assert parse_alphabet("picogpt") == PICOGPT
        assert parse_alphabet("text") == "text"
        assert parse_alphabet(str(path)) == GREEK
