"""The n-gram against one of dictionaries, and the compressors against their own count."""

from __future__ import annotations

import bz2
import lzma
import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.evaluation import baselines
from picogpt.evaluation.baselines import NGram, compressed_bits, ngram_order
from picogpt.tokenizer import CharTokenizer

TEXT = CharTokenizer().encode("the cat sat on the mat, and that is that; the hat of the cat is flat.\n" * 3)


def plain_probability(text: list[int], context: tuple[int, ...], character: int) -> float:
    """Witten and Bell's formula, recursively, counting where four characters stand before."""
    p = plain_probability(text, context[1:], character) if context else 1 / PICOGPT.vocab_size
    after = Counter(text[i] for i in range(4, len(text)) if tuple(text[i - len(context) : i]) == context)
    return (after[character] + len(after) * p) / (after.total() + len(after)) if after else p


def test_equals_the_plain_way() -> None:
    """Every character of rows of known, shuffled and unknown text, from the first one of a row on."""
    rng = np.random.Generator(np.random.Philox(2))
    rows = np.stack([TEXT[:20], rng.permutation(TEXT)[:20], rng.integers(0, 88, 20, dtype=np.uint8)])
    counted = np.where(np.arange(len(TEXT)) % 5 < 4, TEXT, 0).astype(np.uint8)  # an unknown id is no beginning of a row
    losses = NGram(counted).losses(rows)
    text = counted.tolist()
    plain = [
        [-math.log(plain_probability(text, tuple(row[max(0, i - 4) : i]), row[i])) for i in range(1, 20)] for row in rows.tolist()
    ]

    np.testing.assert_allclose(losses, plain, rtol=1e-5)


def test_probabilities_add_up() -> None:
    """After any context, over all 88 ids."""
    for context in (TEXT[:4], TEXT[7:9], np.array([0, 87, 3, 3, 1], np.uint8)):
        rows = np.stack([np.append(context, np.uint8(i)) for i in range(PICOGPT.vocab_size)])

        assert np.exp(-NGram(TEXT).losses(rows)[:, -1].astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text counted in blocks has the same counts."""
    whole = NGram(TEXT).losses(TEXT[None])
    monkeypatch.setattr(baselines, "_BLOCK_CHARS", 17)

    np.testing.assert_array_equal(NGram(TEXT).losses(TEXT[None]), whole)


def test_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a longer text the beginning is counted."""
    monkeypatch.setattr(baselines, "NGRAM_CHARS", 50)
    capped = NGram(TEXT)

    assert capped.n_chars == 50
    np.testing.assert_array_equal(capped.losses(TEXT[None]), NGram(TEXT[:50]).losses(TEXT[None]))


@pytest.mark.parametrize("n", [1, 4])
def test_nothing_to_count(n: int) -> None:
    """A text without one gram says nothing."""
    np.testing.assert_allclose(NGram(TEXT[:n]).losses(TEXT[None, :9]), math.log(PICOGPT.vocab_size), rtol=1e-6)


def test_compressors() -> None:
    """The bytes of the text in small letters, over its characters; an unknown one is spelt <?>."""
    text = "Once Upon A Time é " * 20
    ids: npt.NDArray[np.uint8] = CharTokenizer().encode(text)
    spelt = text.lower().replace("é", "<?>").encode()
    bits = compressed_bits(ids)

    assert bits["lzma"] == 8 * len(lzma.compress(spelt, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert 0 < bits["bz2"] < 8
    assert bits.keys() == baselines.COMPRESSORS.keys()


@pytest.mark.parametrize(("vocab_size", "order"), [(16, 5), (88, 5), (4096, 5), (4104, 4), (32_768, 4), (65_016, 3)])
def test_order(vocab_size: int, order: int) -> None:
    """As many characters as fit in an integer."""
    assert ngram_order(vocab_size) == order


def test_many_ids() -> None:
    """A shorter gram has probabilities over all ids too, and ids of two bytes are not mixed up."""
    text = (TEXT.astype(np.uint16) + 4000)[:200]
    rows = np.stack([np.append(text[:4], np.uint16(i)) for i in range(4104)])
    losses = NGram(text, 4104).losses(rows)[:, -1].astype(np.float64)

    assert np.exp(-losses).sum() == pytest.approx(1, abs=1e-4)
    assert losses.argmin() > 4000


def test_compressors_of_an_alphabet() -> None:
    """The text is compressed as UTF-8, with its capitals."""
    alphabet = Alphabet.of("Жили-Бы ", "x")
    text = "Жили-Были " * 50
    ids = CharTokenizer(alphabet).encode(text)

    assert compressed_bits(ids, alphabet)["bz2"] == 8 * len(bz2.compress(text.encode(), 9)) / len(ids)
