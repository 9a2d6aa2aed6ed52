"""The alphabet of a text's own characters: how many are chosen, from files, standard input and streams."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picogpt.data import ArticleReader, Shards, read_texts
from picogpt.data.alphabets import COVERAGE, TextCharacters, count_characters
from picogpt.data.articles import Cursor
from picogpt.data.batches import RandomSource, TextSource
from picogpt.data.first_articles import count_first_articles
from picogpt.folding import to_code_points
from picogpt.tokenizer import CharTokenizer

SHARDS = Shards(files=("a",), format="json", columns=("text",), commit=None)


def choose(text: str) -> TextCharacters:
    """The characters of a text."""
    return TextCharacters.of(count_characters(to_code_points(text)))


def write(path: Path, text: str) -> str:
    """Write a file and return its path."""
    path.write_text(text, encoding="utf-8")
    return str(path)


class TestChoice:
    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1))
    def test_short_texts_keep_all(self, text: str) -> None:
        """Where each character is more than the share that may be lost, none is."""
        chosen = choose(text)

        assert set(chosen.alphabet.characters) == {*text, "\n"}
        assert (chosen.share, chosen.left_out) == (1.0, 0)

    @given(st.lists(st.integers(1, 3000), min_size=2, max_size=40), st.integers(0, 5))
    def test_rule(self, counts: list[int], seed: int) -> None:
        """The commonest, as few as reach the share; equally common ones by code point."""
        points = np.random.default_rng(seed).permutation(np.arange(100, 100 + len(counts)))
        all_counts = np.zeros(0x110000, np.int64)
        all_counts[points] = counts
        chosen, total = TextCharacters.of(all_counts), sum(counts)
        ranked = sorted(zip(counts, points.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
        n = len(chosen.alphabet.characters) - 1  # without the newline, which the text lacks

        assert set(chosen.alphabet.characters) == {"\n", *(chr(point) for _, point in ranked[:n])}
        assert sum(count for count, _ in ranked[:n]) >= COVERAGE * total
        assert sum(count for count, _ in ranked[: n - 1]) < COVERAGE * total
        assert chosen.left_out == len(counts) - n

    def test_by_hand(self) -> None:
        """Of 20,000 characters two may be lost: b and c, each there once, and not a."""
        chosen = choose("a" * 5 + "b" + "c" + "\n" * 19_993)

        assert chosen.alphabet.characters == "\na"
        assert chosen.describe() == (
            "alphabet: 2 characters, which cover 99.990% of the text; 2 rarer ones are left out; a vocabulary of 16 ids"
        )

    def test_no_characters(self) -> None:
        """Lone surrogates, and what stands for damage, are never part of it; control characters are."""
        chosen = choose("\ud800\ud800\udfff\ufffd\x00\x1b\tx")

        assert chosen.alphabet.characters == "\x00\t\n\x1bx"
        assert chosen.left_out == 3
        assert chosen.share == 0.5


class TestTexts:
    def test_files(self, tmp_path: Path) -> None:
        """Of all files together, with a line that says it; nothing is lower-cased or folded unless asked for."""
        paths = [write(tmp_path / "a", "Жили “были”\n"), write(tmp_path / "b", "Ἡ Ἑλλὰς")]
        notices: list[str] = []
        corpus = read_texts(paths, name="x", fold=False, alphabet=None, notify=notices.append)

        assert CharTokenizer(corpus.alphabet).decode(corpus.ids) == "Жили “были”\n\nἩ Ἑλλὰς"
        assert corpus.alphabet.characters == "".join(sorted(set("Жили “были”\nἩ Ἑλλὰς")))
        assert notices[-1].startswith("x: alphabet: 14 characters, which cover 100.000% of the text; 0 rarer ones")
        assert str(corpus.tally) == "every character known"

    def test_standard_input_is_read_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pipe can be read once, so it is kept."""
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Привет\r\n".encode())))
        corpus = read_texts(["-"], name="x", alphabet=None)

        assert CharTokenizer(corpus.alphabet).decode(corpus.ids) == "Привет\n"

    def test_long_text_of_many_characters(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ids of two bytes are mapped from a file like others, and counted."""
        text = "".join(map(chr, range(0x4E00, 0x4E00 + 400))) * 30
        path = write(tmp_path / "a", text)
        whole = read_texts([path], name="x", alphabet=None)
        monkeypatch.setattr("picogpt.data.text.MAX_CHARS_IN_MEMORY", 1000)
        monkeypatch.setattr("picogpt.data.text._BLOCK_BYTES", 300)
        mapped = read_texts([path], name="x", scratch=tmp_path, alphabet=None)
        source = TextSource(mapped, sequence_len=50, batch_size=3, seed=0)

        assert mapped.mapped is not None
        assert mapped.ids.dtype == np.uint16
        assert mapped.fingerprint == whole.fingerprint
        assert CharTokenizer(mapped.alphabet).decode(mapped.ids) == text
        assert source.text.alphabet == mapped.alphabet
        assert source.text.ids == tuple(range(2, 402))  # id 1 is the newline, which the text lacks

    def test_random_batches(self) -> None:
        """Batches for timing have ids of the alphabet alone."""
        alphabet = choose("abc").alphabet
        batch = RandomSource(sequence_len=40, batch_size=2, alphabet=alphabet).train_batch(0)

        assert set(np.unique(batch.inputs).tolist()) == {*alphabet.text_ids}


class TestStreams:
    def test_first_articles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stream's alphabet comes from its first articles, so many characters of them, question and answer alike."""
        articles = [("Αα", "Бб"), ("\r\nγ", ""), ("zz", "z")]
        monkeypatch.setattr("picogpt.data.first_articles.ALPHABET_CHARS", 6)
        reader = ArticleReader(SHARDS, 0, lambda _: None, lambda _, row: iter(articles[row:]), alphabet=None)

        assert TextCharacters.of(count_first_articles(reader)).alphabet.characters == "\nΑαγБб"

    def test_one_pass_is_enough(self) -> None:
        """A stream with fewer characters is counted once."""
        reader = ArticleReader(SHARDS, 0, lambda _: None, lambda _, row: iter([("abc",)][row:]), alphabet=None)

        assert count_first_articles(reader).sum() == 3

    def test_articles(self) -> None:
        """Articles, their special tokens and the empty line between them have the ids of the alphabet."""
        alphabet = choose("АБ" + "".join(map(chr, range(0x4E00, 0x4E00 + 300)))).alphabet
        shards = Shards(files=("a",), format="json", columns=("question", "answer"), commit=None)
        reader = ArticleReader(shards, 0, lambda _: None, lambda *_: iter([("А?", "Б")]), fold=False, alphabet=alphabet)
        article = next(reader.articles(Cursor(0, 0, 0)))

        assert article.ids.dtype == reader.separator.dtype == np.uint16
        assert CharTokenizer(alphabet).decode(article.ids) == "<Q>А<?></Q>\n<A>Б</A>"
        assert CharTokenizer(alphabet).decode(reader.separator) == "\n\n"
        assert reader.text.alphabet == alphabet
        assert reader.text.ids[-4:] == tuple(list(alphabet.special_ids.values())[3:])
