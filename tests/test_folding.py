"""Folding to ASCII: one example of each rule, and what holds for any text."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picogpt.folding import N_CODE_POINTS, Folding, fold_character, transliterate_character
from picogpt.tokenizer import CharTokenizer, TextEncoder

ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=()))
FOLD = Folding()
TRANSLITERATE = Folding(transliterate_character)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("“It’s ‘so’,” «she» said", "\"It's 'so',\" <<she>> said"),
        ("a—b – c ‐ d − e", "a-b - c - d - e"),
        ("wait…", "wait..."),
        ("a\u00a0b\u2009c\u3000d\u2028e\x85f", "a b c d\ne\nf"),
        ("ﬁne ﬀ Ǆ", "fine ff DZ"),
        ("ＡＢｃ１！", "ABc1!"),
        ("café naïve Ångström ñ Ş ő", "cafe naive Angstrom n S o"),
        ("cafe\u0301 n\u0303", "cafe n"),
        ("Straße æther Øre łódź þing ðæt œuvre ı", "Strasse aether Ore lodz thing daet oeuvre i"),
        ("co\u00adop\u200b\ufeff\u200e er", "coop er"),
        ("½ ² ™ № ⅷ ①", "1/2 2 TM No viii 1"),
        ("3 × 4 ≤ 5 → · • †", "3 * 4 <= 5 > - * +"),
        ("€5 20 °C ©", "EUR5 20 degC (C)"),
        ("´ ¨", "' \""),
        ("ʼ", "'"),
    ],
    ids=[
        "quotes", "dashes", "ellipsis", "spaces", "ligatures", "full width", "accents", "combining accents", "Latin letters",
        "invisible", "compatibility", "symbols", "spelled with letters", "accents alone", "modifier letter",
    ],
)  # fmt: skip
def test_folded(text: str, expected: str) -> None:
    """Each rule of the module's table, by example."""
    assert FOLD(text) == expected


@pytest.mark.parametrize("text", ["Привет", "日本語", "λ", "שלום", "한국어", "😀", "µ", "\ufffd", "\x80", "\x07", "०"])
def test_not_folded(text: str) -> None:
    """Other scripts, pictures, damage and control characters stay as they are."""
    assert FOLD(text) == text


@given(ANY_TEXT)
def test_ascii_is_untouched_and_folding_is_idempotent(text: str) -> None:
    """Whatever is folded comes out as ASCII, what is ASCII stays, and folding again changes nothing."""
    folded = FOLD(text)

    assert FOLD(folded) == folded
    assert folded == "".join(map(fold_character, text))
    assert all(fold_character(c) == c or fold_character(c).isascii() for c in text)
    if text.isascii():
        assert folded == text


@given(ANY_TEXT)
def test_any_text_encodes(text: str) -> None:
    """One id per character of the folded text, a small letter's for a capital, and every character counted once."""
    encoder, tokenizer = TextEncoder(fold=True), CharTokenizer()
    ids = encoder.encode(text)
    folded = encoder.fold(text)

    assert len(ids) == len(folded) == encoder.tally.characters
    assert ids.tolist() == tokenizer.encode(folded).tolist()
    if folded.isascii():
        assert ids.tolist() == tokenizer.encode(folded.lower()).tolist()
    assert encoder.tally.unknown.total() == (ids == 0).sum()
    assert encoder.tally.folded.total() == sum(fold_character(c) != c for c in text)


@given(ANY_TEXT)
def test_no_fold_is_the_plain_table(text: str) -> None:
    """Without folding the ids are the tokenizer's own."""
    encoder = TextEncoder(fold=False)

    assert encoder.encode(text).tolist() == CharTokenizer().encode(text).tolist()
    assert encoder.fold(text) == text
    assert not encoder.tally.folded


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Съешь ещё этих булок, да выпей чаю.", "S'esh' eshche etikh bulok, da vypey chayu."),
        ("Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.", "Xeskepazo tin psychofthora vdelygmia."),
        ("আমার সোনার বাংলা।", "amar sonar bamla,"),
        ("नमस्ते दुनिया १२", "nmste duniya 12"),
        ("שלום", "slvm"),
        ("القمر", "lqmr"),
        ("모든 인간", "MoDeun InGan"),
        ("世界 かな", "ShiJie kana"),
        ("“café” — Straße ½", '"cafe" - Strasse 1/2'),
    ],
    ids=["Russian", "Greek", "Bengali", "Hindi", "Hebrew", "Arabic", "Korean", "Chinese and kana", "folded"],
)
def test_transliterated(text: str, expected: str) -> None:
    """A sentence of each script; what folding spells keeps that spelling."""
    assert TRANSLITERATE(text) == expected


@pytest.mark.parametrize("text", ["😀", "∑", "\U00012000", "\U0002b820", "\ufffd", "\x07", "\ue000"])
def test_not_transliterated(text: str) -> None:
    """Pictures, signs, characters that the library cannot spell, and what is no character stay as they are."""
    assert TRANSLITERATE(text) == text


def test_every_code_point_is_transliterated() -> None:
    """Each one becomes ASCII or stays; whatever folds is spelled as folding has it; a second time changes nothing."""
    for point in range(N_CODE_POINTS):
        character = chr(point)
        spelling, folded = transliterate_character(character), fold_character(character)
        assert spelling == character or spelling.isascii(), hex(point)
        assert folded in {character, spelling}, hex(point)
        assert len(spelling) < 256, hex(point)  # a table of bytes holds the lengths
    everything = "".join(map(chr, range(N_CODE_POINTS)))
    once = TRANSLITERATE(everything)

    assert TRANSLITERATE(once) == once


@given(ANY_TEXT)
def test_any_text_encodes_transliterated(text: str) -> None:
    """One id per character of the transliterated text, and every character counted once: folded, transliterated or unknown."""
    encoder = TextEncoder(fold="latin")
    ids = encoder.encode(text)
    tally = encoder.tally

    assert encoder.fold(text) == "".join(map(transliterate_character, text))
    assert ids.tolist() == CharTokenizer().encode(encoder.fold(text)).tolist()
    assert tally.unknown.total() == (ids == 0).sum()
    assert tally.folded.total() == sum(fold_character(c) != c for c in text)
    assert tally.transliterated.total() == sum(transliterate_character(c) != fold_character(c) for c in text)


def test_long_texts_are_folded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a text is cut into pieces makes no difference."""
    text = "“naïve”—ﬃ 日本 " * 50
    whole = Folding()(text)
    monkeypatch.setattr("picogpt.folding._CHUNK", 7)

    assert Folding()(text) == whole


@pytest.mark.timing
@pytest.mark.parametrize(
    ("text", "megabytes"),
    [
        ("To be, or not to be: that is the question.\n" * 50_000, 50),
        ("“To be,” or ‘not’ to be — that’s the question…\n" * 40_000, 5),
        ("éàüßæøłñçïöâ“”’—" * 60_000, 5),
        ("".join(chr(random.Random(0).randrange(0x4E00, 0x9000)) for _ in range(50_000)) * 10, 5),
    ],
    ids=["ASCII", "curly quotes", "accents", "Chinese"],
)
def test_speed(text: str, megabytes: float) -> None:
    """The promise of 50 MB/s on ASCII and 5 MB/s on other texts, folding and counting included, at its best of five."""
    encoder = TextEncoder(fold=True)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        encoder.encode(text)
        seconds.append(time.perf_counter() - start)

    assert len(text.encode()) / min(seconds) > megabytes * 1e6
