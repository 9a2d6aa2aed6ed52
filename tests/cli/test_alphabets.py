"""`--alphabet` as a user meets it: a model of three scripts with more than 256 ids, from training to each export."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import picogpt
from picogpt import plot
from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.cli import eval as evaluation
from picogpt.cli import export, generate, train
from picogpt.cli.shades import shade
from picogpt.config import GenerateConfig, SampleConfig
from picogpt.export.gpt2 import Gpt2Model
from picogpt.inference import Engine
from picogpt.inference.prompts import TextGenerator
from picogpt.runs import find
from picogpt.runs.folder import RunFolder
from picogpt.runs.model_file import load_model, load_text_config
from picogpt.tokenizer import CharTokenizer
from tests.conftest import TINY_FLAGS
from tests.export.page_model import content_of

Capture = pytest.CaptureFixture[str]

LINES = ["Жили-были старик", "Ἡ Ἑλλὰς", "ABC abc", *("".join(map(chr, range(0x4E00 + i, 0x4E0A + i))) for i in range(0, 300, 10))]
TEXT = "\n".join(LINES * 20)
ALPHABET = Alphabet.of(TEXT, "text")
SMALL_STEPS = ["--epochs", "1", "--steps-per-epoch", "2", "--val-steps", "1"]

STILL = ["--lr", "1e-9", "--muon-lr", "1e-9"]
"""So small a learning rate that the weights are those that a run starts from."""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and the run `han` on it with the text's own characters."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "han.txt").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(["--text", "han.txt", "--alphabet", "text", *TINY_FLAGS, *SMALL_STEPS]) == 0
    return folder


@pytest.fixture(autouse=True)
def _in_a_copy(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a copy of it, without the models that come with a clone, and draws no pictures."""
    shutil.copytree(house, tmp_path / "house")
    # The config names the text by its absolute path.
    monkeypatch.chdir(tmp_path / "house")
    monkeypatch.setattr(find, "PRETRAINED", tmp_path / "clone" / "logs")
    monkeypatch.setattr(plot, "draw_scores", lambda *_, **__: b"")


MODEL = Path("logs/han/model.safetensors")


def begin(*flags: str) -> int:
    """Begin or resume a run of a moment."""
    return train.main([*flags, *SMALL_STEPS])


def config_of(run: str) -> dict[str, Any]:
    """Content of a run's config.json."""
    content: dict[str, Any] = json.loads((Path("logs") / run / "config.json").read_text())
    return content


class TestTraining:
    def test_what_is_stored(self) -> None:
        """Config and model have the characters, and the size of the vocabulary follows from them."""
        model = load_model(MODEL)

        assert len(ALPHABET.characters) > 256
        assert model.text is not None
        assert model.alphabet == ALPHABET
        assert model.text.fold is False
        assert config_of("han")["data"]["alphabet"] == {"name": "text", "characters": ALPHABET.characters}
        assert config_of("han")["model"]["vocab_size"] == model.config.vocab_size == ALPHABET.vocab_size
        assert model.weights["transformer.wte.weight"].shape[0] == ALPHABET.vocab_size

    def test_the_page_shows_it(self) -> None:
        """The run's page has the excerpt as it is written, and a bar for the n-gram."""
        history = json.loads(Path("logs/han/epochs.json").read_text())

        assert "".join(history["excerpt"]) == TEXT[int(0.9 * len(TEXT)) :][:401]
        assert set(history["marks"]) == {"lzma", "5-gram"}
        assert set(history["epochs"][0]["sample"]) <= set(ALPHABET.characters)

    def test_the_default_stays(self, text_file: Path) -> None:
        """Without the flag config.json has one entry more than before, which is empty, and the model file none."""
        assert begin("--text", str(text_file), "--run", "plain", *TINY_FLAGS) == 0
        plain = Path("logs/plain/model.safetensors")

        assert config_of("plain")["data"]["alphabet"] is None
        assert load_model(plain).alphabet == PICOGPT
        assert b"alphabet" not in plain.read_bytes()[:4000]

    def test_resume(self, capsys: Capture) -> None:
        """A resumed run keeps its alphabet, with the flag or without it."""
        for epochs, flags in (("2", []), ("3", ["--alphabet", "text"])):
            assert train.main(["--run", "han", *flags, "--epochs", epochs]) == 0
            assert f"resuming from step {2 * (int(epochs) - 1)}" in capsys.readouterr().err
        assert load_model(MODEL).alphabet == ALPHABET

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (
                ["--alphabet", "picogpt"],
                "run han: alphabet is picogpt (74 characters) and was text (324 characters); choose another",
            ),
            (
                ["--alphabet", "letters"],
                "run han: alphabet is letters (4 characters) and was text (324 characters); choose another",
            ),
            (["--fold"], "run han: folding is on and was off; choose another --run"),
            (["--alphabet", "letter"], "--alphabet must be picogpt, text or a file of characters, got 'letter'"),
        ],
        ids=["picogpt", "file", "folding", "missing"],
    )
    def test_another_alphabet(self, flags: list[str], message: str, capsys: Capture) -> None:
        """A run does not change its alphabet."""
        Path("letters").write_text("abc")
        assert train.main(["--run", "han", "--epochs", "2", *flags]) in {1, 2}
        assert message in capsys.readouterr().err

    def test_a_file_that_changes(self, capsys: Capture) -> None:
        """The characters of a file are stored, so that the file can be edited; naming it again is then another alphabet."""
        Path("letters").write_text("Жилбыстархк -")
        assert begin("--text", "han.txt", "--run", "few", "--alphabet", "letters", *TINY_FLAGS) == 1
        said = capsys.readouterr().err
        assert "the model knows the alphabet letters (14 characters). Use --alphabet text for the text's own characters" in said
        Path("short.txt").write_text("Жили-были, старик!\n" * 50)
        assert begin("--text", "short.txt", "--run", "few", "--alphabet", "letters", *TINY_FLAGS) == 0
        assert "unknown, read as <?>: 100 (10.53%: '!' 50, ',' 50)" in capsys.readouterr().err
        stored = config_of("few")["data"]["alphabet"]
        assert stored == {"name": "letters", "characters": "\n -Жабиклрстхы"}
        assert train.main(["--run", "few", "--epochs", "2", "--alphabet", "letters"]) == 0
        Path("letters").write_text("abc")
        assert train.main(["--run", "few", "--epochs", "3"]) == 0
        assert config_of("few")["data"]["alphabet"] == stored
        for asked, name in (("letters", "letters (4 characters)"), ("text", "text (the text's own characters)")):
            assert train.main(["--run", "few", "--epochs", "4", "--alphabet", asked]) == 1
            assert f"alphabet is {name} and was letters (14 characters)" in capsys.readouterr().err

    def test_fold_to_an_alphabet(self, capsys: Capture) -> None:
        """With --fold only what the alphabet lacks is folded to it."""
        Path("letters").write_text("Cafeé'")
        Path("cafe.txt").write_text("Café’â\n" * 100)
        assert begin("--text", "cafe.txt", "--alphabet", "letters", "--fold", *TINY_FLAGS) == 0

        assert "folded to ASCII: 200 ('â' 100, '’' 100); no character unknown" in capsys.readouterr().err
        assert picogpt.load("cafe").decode(picogpt.load("cafe").encode("Café’â")) == "Café'a"

    def test_a_model_of_another_alphabet(self, capsys: Capture) -> None:
        """A model file of another run, or a config that names another vocabulary, is rejected by name."""
        Path("short.txt").write_text("Жили-были, старик!\n" * 50)
        assert begin("--text", "short.txt", "--alphabet", "text", *TINY_FLAGS) == 0
        shutil.copy("logs/short/model.safetensors", MODEL)
        capsys.readouterr()

        assert train.main(["--run", "han", "--epochs", "2"]) == 1
        assert (
            "model.safetensors: a model with the alphabet text (15 characters), and the run has text (324 characters); move"
            in (capsys.readouterr().err)
        )
        assert evaluation.main(["-m", "han"]) == 1
        assert (
            "the model has the alphabet text (15 characters), and its run text (324 characters); put" in capsys.readouterr().err
        )
        content = config_of("han")
        content["model"]["vocab_size"] = 88
        RunFolder(Path("logs/han")).write_config(content)
        assert train.main(["--run", "han", "--epochs", "2"]) == 1
        assert "vocab_size must be 336, that of the alphabet, got 88" in capsys.readouterr().err

    def test_damaged_models_do_not_stop_a_run(self) -> None:
        """A run resumes from its checkpoint whatever became of its model."""
        MODEL.write_bytes(b"nothing")

        assert train.main(["--run", "han", "--epochs", "2"]) == 0

    def test_import_original(self, capsys: Capture) -> None:
        """The original project has one alphabet."""
        assert train.main(["--import-original", "log.pkl", "--alphabet", "text", "--run", "x", "--epochs", "0"]) == 2
        assert "--alphabet must be picogpt with --import-original, as the original project has no other, got text (the" in (
            capsys.readouterr().err
        )

    def test_stream(self, capsys: Capture) -> None:
        """A stream's first articles give the alphabet; its pool and validation text come back in a resumed run."""
        rows = [json.dumps({"text": "\n".join(LINES)}) for _ in range(60)]
        Path("rows.jsonl").write_text("\n".join(rows))
        assert begin("--dataset", "rows.jsonl", "--alphabet", "text", *TINY_FLAGS) == 0
        assert "rows.jsonl: of its first 21,720 characters: alphabet: 324 characters" in capsys.readouterr().err
        ids = RunFolder(Path("logs/rows")).load_validation()
        assert ids.dtype == np.uint16
        assert CharTokenizer(load_model(Path("logs/rows/model.safetensors")).alphabet).decode(ids).startswith(LINES[0])

        assert train.main(["--run", "rows", "--epochs", "2"]) == 0
        assert "resuming from step 2" in capsys.readouterr().err

    def test_dry_run(self, capsys: Capture) -> None:
        """A forecast computes with the alphabet's vocabulary."""
        assert (
            train.main(["--text", "han.txt", "--run", "new", "--alphabet", "text", *TINY_FLAGS, "--minutes", "1", "--dry-run"])
            == 0
        )
        assert "a vocabulary of 336 ids" in capsys.readouterr().err


class TestInitFrom:
    def test_same_alphabet(self, capsys: Capture) -> None:
        """Without the flag it is the alphabet of the model to start from."""
        assert begin("--text", "han.txt", "--run", "more", "--init-from", "han") == 0

        assert load_model(Path("logs/more/model.safetensors")).alphabet == ALPHABET
        assert "starting from the weights of" in (said := capsys.readouterr().err)
        assert "start from embeddings" not in said

    def test_to_another(self, capsys: Capture) -> None:
        """Characters that both have keep their rows, special tokens and unknown too; the others begin anew."""
        Path("short.txt").write_text("Жили-были, старик? Zz\n" * 50)
        assert begin("--text", "short.txt", "--alphabet", "text", "--init-from", "han", "--run", "new", *STILL) == 0
        said = capsys.readouterr().err
        assert "; alphabet text (17 characters): 13 of its 17 characters start from embeddings of that model\n" in said
        old, new = (load_model(Path(f"logs/{run}/model.safetensors")).weights for run in ("han", "new"))
        alphabet = load_model(Path("logs/new/model.safetensors")).alphabet
        before, after = old["transformer.wte.weight"], new["transformer.wte.weight"]
        for character, i in zip(alphabet.characters, alphabet.text_ids, strict=True):
            at = int(CharTokenizer(ALPHABET).encode(character)[0])
            assert np.allclose(after[i], before[at], atol=1e-6) is (at != 0), character
        for token, i in alphabet.special_ids.items():
            np.testing.assert_allclose(after[i], before[ALPHABET.special_ids[token]], atol=1e-6)
        np.testing.assert_allclose(after[0], before[0], atol=1e-6)
        matrix = "transformer.h.0.mlp.c_fc.weight"
        np.testing.assert_allclose(new[matrix], old[matrix], atol=1e-6)

    def test_capitals(self, text_file: Path, capsys: Capture) -> None:
        """From the original's alphabet a capital starts as its small letter, and that is said."""
        begin("--text", str(text_file), "--run", "plain", *TINY_FLAGS)
        Path("short.txt").write_text("Ab aB Ж\n" * 100)
        assert begin("--text", "short.txt", "--alphabet", "text", "--init-from", "plain", "--run", "new", *STILL) == 0
        said = capsys.readouterr().err
        assert "6 of its 7 characters start from embeddings of that model, 2 capitals as their small letters\n" in said
        embedding = load_model(Path("logs/new/model.safetensors")).weights["transformer.wte.weight"]
        ids = CharTokenizer(load_model(Path("logs/new/model.safetensors")).alphabet).encode("ABab")

        np.testing.assert_allclose(embedding[ids[:2]], embedding[ids[2:]], atol=1e-6)


class TestGenerate:
    @pytest.mark.parametrize(
        "flags", [[], ["-k", "40", "--top-p", "0.9"], ["-t", "0"], ["--num-samples", "3", "--dtype", "float32"]]
    )
    def test_text(self, flags: list[str], capsys: Capture) -> None:
        """The prompt keeps its capitals, and what follows is made of the text's characters."""
        assert generate.main(["-m", "han", "-p", "Жили Ἡ AB", "-n", "50", "-s", "1", *flags]) == 0
        out, _ = capsys.readouterr()

        assert out.startswith("Жили Ἡ AB")
        assert set(out) <= set(ALPHABET.characters) | set("---\n")

    def test_unknown_characters_of_a_prompt(self, capsys: Capture) -> None:
        """They are said, and read as <?>."""
        assert generate.main(["-m", "han", "-p", "Жили Qx", "-n", "0", "-s", "1"]) == 0
        out, err = capsys.readouterr()

        assert out == "Жили <?><?>\n"
        assert "prompt: unknown, read as <?>: 2 (28.57%: 'Q' 1, 'x' 1)" in err

    def test_probabilities(self, capsys: Capture) -> None:
        """Each character has its probability, beside the ten likeliest characters of the alphabet; so do shades."""
        assert generate.main(["-m", "han", "-p", "Жили", "-n", "20", "-s", "1", "--json", "--show-probs"]) == 0
        sample = json.loads(capsys.readouterr().out)

        assert len(sample["text"]) == len(sample["probabilities"]) == 20
        for character, probability, top in zip(sample["text"], sample["probabilities"], sample["top"], strict=True):
            assert len(top) == 10
            assert dict(map(tuple, top)).get(character, probability) == probability
        generator = TextGenerator(
            Engine.load(MODEL), load_text_config(MODEL), SampleConfig(seed=1), GenerateConfig(max_new_tokens=5)
        )
        assert "\x1b[" in "".join(map(shade, generator.stream_characters("Жили")))

    def test_stop(self, capsys: Capture) -> None:
        """A stop sequence is read in the model's alphabet."""
        assert generate.main(["-m", "han", "-p", "Ж", "--stop", "Q", "-s", "1"]) == 2
        assert "--stop must be made of characters that the model knows, got 'Q'" in capsys.readouterr().err
        assert generate.main(["-m", "han", "-p", "Ж", "--stop", "ABC", "-s", "1", "-n", "5"]) == 0

    def test_python(self) -> None:
        """The interface of Python encodes, scores and generates in the model's alphabet."""
        model = picogpt.load("han", dtype="float32")
        ids = model.encode("Жили-были ABC")

        assert model.alphabet == ALPHABET
        assert model.decode(ids) == "Жили-были ABC"
        assert model.logits("Жили").shape == (4, ALPHABET.vocab_size)
        assert model.score("Жили-были").losses.shape == (8,)
        assert set(model.generate("Жили", max_new_tokens=30, seed=1)) <= set(ALPHABET.characters)


class TestEvaluation:
    def test_own_text(self, capsys: Capture) -> None:
        """The last tenth, a compressor and the n-gram, all on the same characters."""
        assert evaluation.main(["-m", "han", "--json", "--windows", "2"]) == 0
        report = json.loads(capsys.readouterr().out)

        assert report["scores"]["as_is"]["nats"] < np.log(ALPHABET.vocab_size) + 1
        assert report["scores"]["ngram"]["nats"] < report["scores"]["as_is"]["nats"]
        assert report["compressors"]["lzma"]["bits"] > 0

    def test_another_text(self, capsys: Capture) -> None:
        """Another text is read with the model's characters."""
        Path("other.txt").write_text("Жили-были Q\n" * 50)
        assert evaluation.main(["-m", "han", "--text", "other.txt", "--json", "--windows", "2"]) == 0
        assert "unknown, read as <?>: 50 (8.33%: 'Q' 50)" in capsys.readouterr().err


class TestExport:
    def test_pack(self, capsys: Capture) -> None:
        """A packed run generates in the same alphabet, and its embeddings are bfloat16 still."""
        assert export.main(["-m", "han", "--format", "pack", "packed"]) == 0
        text = load_text_config(Path("packed/model.safetensors"))
        assert text == load_text_config(MODEL)
        assert Path("packed/model.safetensors").stat().st_size < 0.6 * MODEL.stat().st_size
        capsys.readouterr()

        assert generate.main(["-m", "packed", "-p", "Жили", "-n", "5", "-s", "1"]) == 0
        assert capsys.readouterr().out.startswith("Жили")

    def test_page(self) -> None:
        """The page has the table of characters, lower-cases nothing, and never draws what the text lacks."""
        assert export.main(["-m", "han", "han.html"]) == 0
        header, _ = content_of(Path("han.html").read_text(encoding="utf-8"))
        text = load_text_config(MODEL)
        assert text is not None

        assert header["characters"] == [CharTokenizer(ALPHABET).decode([i]) for i in range(ALPHABET.vocab_size)]
        assert (header["lowercase"], header["folding"], header["vocab_size"]) == (False, {}, 336)
        assert set(header["never"]) == {*range(336)} - {*text.ids}
        assert 'max="336"' in Path("han.html").read_text(encoding="utf-8")

    def test_gpt2(self) -> None:
        """Tokenizer and suppressed ids are those of the alphabet, and one spare id is the context slot."""
        assert export.main(["-m", "han", "--format", "gpt2", "gpt2"]) == 0
        content, text = (json.loads(Path(f"gpt2/{name}.json").read_text()) for name in ("tokenizer", "generation_config"))
        vocabulary, special = content["model"]["vocab"], ALPHABET.spare_ids[0]

        assert sorted(vocabulary.values()) == [*range(336)]
        assert all(vocabulary[c] == i for c, i in zip(ALPHABET.characters, ALPHABET.text_ids, strict=True))
        assert content["normalizer"]["normalizers"] == []
        assert content["added_tokens"][0]["id"] == text["bos_token_id"] == special
        assert special in text["suppress_tokens"]
        assert "It knows 324 characters; all others are unknown." in Path("gpt2/README.md").read_text()

    def test_gpt2_in_transformers(self) -> None:
        """The library encodes as we do."""
        transformers = pytest.importorskip("transformers")
        assert export.main(["-m", "han", "--format", "gpt2", "gpt2"]) == 0
        tokenizer = transformers.AutoTokenizer.from_pretrained("gpt2")
        text = "Жили Ἡ <Q> AB\nQ"
        ids = tokenizer(text)["input_ids"]
        stored = load_model(MODEL)
        model = Gpt2Model("han", stored.config, stored.weights, stored.text)

        assert ids == [model.bos_id, *picogpt.load("han").encode(text).tolist()]


def test_generation_with_an_alphabet_of_one(tmp_path: Path) -> None:
    """The smallest alphabet trains and generates: newlines and one letter."""
    Path("one.txt").write_text("a\n" * 500)
    assert begin("--text", "one.txt", "--alphabet", "text", *TINY_FLAGS) == 0
    model = picogpt.load("one")

    assert model.config == dataclasses.replace(model.config, vocab_size=16)
    assert set(model.generate("a", max_new_tokens=20, seed=1)) <= {"a", "\n"}
