"""The tokenizer: table, ids and decoding against the vectors, any Unicode, and speed."""

from __future__ import annotations

import json
import string
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picogpt.alphabet import PICOGPT, UNKNOWN_ID
from picogpt.tokenizer import CharTokenizer
from tests.conftest import VECTORS

TOKENIZER = CharTokenizer()


@pytest.fixture(scope="module")
def vector() -> dict[str, Any]:
    """A text, its ids, their decoding and the whole table."""
    content: dict[str, Any] = json.loads((VECTORS / "tokenizer.json").read_text())
    return content


def test_vocabulary(vector: dict[str, Any]) -> None:
    """The table is the original's, id by id."""
    assert TOKENIZER.vocabulary == vector["vocabulary"]


def test_encode_vector(vector: dict[str, Any]) -> None:
    """The example's ids come out exactly."""
    assert TOKENIZER.encode(vector["text"]).tolist() == vector["ids"]


def test_decode_vector(vector: dict[str, Any]) -> None:
    """The example's ids decode to its text, with <?> for what is unknown."""
    assert TOKENIZER.decode(vector["ids"]) == vector["decoded"]


def test_by_hand() -> None:
    """`Ab 1!` by hand: a is 10 digits + 1 = 11, b 12, space 69 (after 10 + 26 + 32), 1 is 2, ! is 37."""
    assert TOKENIZER.encode("Ab 1!").tolist() == [11, 12, 69, 2, 37]


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_any_unicode_encodes(text: str) -> None:
    """Any string, lone surrogates included, gives one id per character, and only ids of text or unknown."""
    ids = TOKENIZER.encode(text)

    assert len(ids) == len(text)
    assert set(ids.tolist()) <= {UNKNOWN_ID, *PICOGPT.text_ids}


@given(st.text(alphabet="".join(c for c in string.printable if c not in string.ascii_uppercase)))
def test_round_trip(text: str) -> None:
    """A text of known characters comes back as it was."""
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_capitals_share_the_ids_of_small_letters() -> None:
    """Only A-Z are folded: other letters whose small form is ASCII stay unknown."""
    assert TOKENIZER.encode(string.ascii_uppercase).tolist() == TOKENIZER.encode(string.ascii_lowercase).tolist()
    assert TOKENIZER.encode("\u212a\u0130").tolist() == [UNKNOWN_ID, UNKNOWN_ID]  # Kelvin sign, dotted capital I


def test_specials_are_not_made_from_text() -> None:
    """`<Q>` in a text is three characters; the special token has an id of its own."""
    assert len(TOKENIZER.encode("<Q>")) == 3
    assert TOKENIZER.decode([PICOGPT.special_ids["<Q>"]]) == "<Q>"


def test_spare_ids_decode_as_unknown() -> None:
    """The six spare ids stand for nothing."""
    assert TOKENIZER.decode(range(82, PICOGPT.vocab_size)) == "<?>" * 6


@pytest.mark.parametrize("bad", [-1, PICOGPT.vocab_size], ids=["negative", "beyond"])
def test_decode_refuses_other_ids(bad: int) -> None:
    """An id outside the vocabulary is an error, a negative one too."""
    with pytest.raises(IndexError, match=str(bad)):
        TOKENIZER.decode([1, bad])


def test_unknown_characters() -> None:
    """Unknown characters are counted by character."""
    assert TOKENIZER.unknown_characters("caf\u00e9 \u00e9\u65e5") == {"\u00e9": 2, "\u65e5": 1}


@pytest.mark.timing
def test_encodes_fifty_megabytes_a_second() -> None:
    """The promise of 50 MB/s, at its best of five on a text of two million characters (several times that in practice)."""
    text = "To be, or not to be: that is the question.\n" * 50_000
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        TOKENIZER.encode(text)
        seconds.append(time.perf_counter() - start)

    assert len(text) / min(seconds) > 50e6


def test_ids_are_bytes() -> None:
    """A text of any size takes one byte a character."""
    assert TOKENIZER.encode("abc").dtype == np.uint8
