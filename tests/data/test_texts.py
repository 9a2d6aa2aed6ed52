"""Texts as the commands treat them: folded in training, prompts and evaluation alike, as the run has it; encodings; what is drawn."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picogpt import load, plot
from picogpt.alphabet import PICOGPT
from picogpt.cli import eval as evaluation
from picogpt.cli import export, generate, train
from picogpt.config import GPTConfig, TextConfig
from picogpt.data import ArticleReader, Shards
from picogpt.data.articles import Cursor
from picogpt.errors import RunError
from picogpt.evaluation.texts import TrainedRun
from picogpt.model.gpt import GPT
from picogpt.runs import find
from picogpt.runs.folder import RunFolder
from picogpt.runs.model_file import load_text_config
from picogpt.tokenizer import CharTokenizer
from tests.conftest import TINY_FLAGS

Capture = pytest.CaptureFixture[str]

MODEL = GPTConfig(n_layer=1, n_head=2, n_embd=16, context_len=8)
NOVEL = "“It’s so,” said the café’s owner — and a gull cried…\n"
RUSSIAN = "Всё смешалось в доме Облонских: “да”, — кричала чайка…\n"
LATIN = 'vse smeshalos\' v dome oblonskikh: "da", - krichala chayka...\n'
FOLDED = "\"it's so,\" said the cafe's owner - and a gull cried...\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts in an empty folder, without the models that come with a clone, and draws no pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find, "PRETRAINED", tmp_path / "clone" / "logs")
    monkeypatch.setattr(plot, "draw_scores", lambda *_, **__: b"")


def write(name: str, text: str, encoding: str = "utf-8") -> Path:
    """A text file."""
    Path(name).write_bytes(text.encode(encoding))
    return Path(name)


def begin(*flags: str) -> int:
    """Begin or resume a run of a moment."""
    return train.main([*flags, "--epochs", "1", "--steps-per-epoch", "2", "--val-steps", "1"])


def text_of(run: str) -> TextConfig:
    """The text that the run's model names."""
    text = load_text_config(Path("logs") / run / "model.safetensors")
    assert text is not None
    return text


def data_of(run: str) -> dict[str, Any]:
    """The text that the run's config names."""
    content: dict[str, Any] = json.loads((Path("logs") / run / "config.json").read_text())["data"]
    return content


class TestTraining:
    def test_a_novel_is_folded(self, capsys: Capture) -> None:
        """Nothing of a novel with curly quotes stays unknown; the run and its model keep that it was folded, and its ids."""
        assert begin("--text", str(write("novel.txt", NOVEL * 60)), *TINY_FLAGS) == 0
        said = capsys.readouterr().err

        assert "capitals become small letters; folded to ASCII: 420 (" in said
        assert "; no character unknown" in said
        assert "; short, so soon memorized: better 100,000 characters or more" in said
        assert data_of("novel")["fold"] is True
        assert text_of("novel") == TextConfig(fold=True, ids=tuple(sorted(set(CharTokenizer().encode(FOLDED).tolist()))))

    def test_no_fold(self, capsys: Capture) -> None:
        """With --no-fold it is the original's rule, said with what follows; resuming keeps it, and the other rule is rejected."""
        write("novel.txt", NOVEL * 60)
        assert begin("--text", "novel.txt", *TINY_FLAGS, "--no-fold") == 0
        said = capsys.readouterr().err
        assert "unknown, read as <?>: 420 (13.21%: '’' 120, " in said
        assert "warning: novel: 13.2% of its characters are unknown and read as <?>" in said
        assert text_of("novel").fold is False

        assert train.main(["--run", "novel", "--epochs", "2"]) == 0
        assert train.main(["--text", "novel.txt", "--epochs", "3"]) == 0
        assert data_of("novel")["fold"] is False

    def test_the_other_rule_is_rejected(self, capsys: Capture) -> None:
        """A run that was begun with folding does not resume without it."""
        write("novel.txt", NOVEL * 60)
        begin("--text", "novel.txt", *TINY_FLAGS)

        assert train.main(["--run", "novel", "--epochs", "2", "--no-fold"]) == 1
        assert "run novel: folding is off and was on; choose another --run, or --fresh" in capsys.readouterr().err

    def test_transliterate(self, capsys: Capture) -> None:
        """Other scripts in Latin letters: said with counts, kept with the run and its model, and on resume; prompts and scores too."""
        write("anna.txt", RUSSIAN * 60)
        assert begin("--text", "anna.txt", *TINY_FLAGS, "--transliterate") == 0
        said = capsys.readouterr().err
        assert "folded to ASCII: 240 (" in said
        assert "; transliterated: 2,400 ('" in said
        assert "; no character unknown" in said
        assert data_of("anna")["fold"] == "latin"
        assert text_of("anna") == TextConfig(fold="latin", ids=tuple(sorted(set(CharTokenizer().encode(LATIN).tolist()))))

        assert train.main(["--run", "anna", "--epochs", "2"]) == 0
        assert train.main(["--text", "anna.txt", "--epochs", "3", "--transliterate"]) == 0
        assert data_of("anna")["fold"] == "latin"
        capsys.readouterr()

        assert generate.main(["-m", "anna", "-p", "Чайка é", "-n", "0"]) == 0
        out, err = capsys.readouterr()
        assert out == "chayka e\n"
        assert "prompt: folded to ASCII: 1 ('é' 1); transliterated: 5 (" in err
        assert evaluation.main(["-m", "anna", "--windows", "2", "--threads", "1"]) == 0
        assert evaluation.main(["-m", "anna", "--windows", "2", "--threads", "1", "--text", "anna.txt"]) == 0
        assert "transliterated: 2,400 (" in capsys.readouterr().err
        assert export.main(["-m", "anna", "--format", "pack", "logs/small"]) == 0
        assert text_of("small") == text_of("anna")
        assert load("anna", logs_dir="logs").encode("Да").tolist() == CharTokenizer().encode("da").tolist()

    def test_without_transliterate_other_scripts_are_unknown(self, capsys: Capture) -> None:
        """A text in another script is rejected, and the flag is named."""
        write("anna.txt", RUSSIAN * 60)
        assert begin("--text", "anna.txt", *TINY_FLAGS) == 1
        assert "or --transliterate to write other scripts in Latin letters (docs/texts.md)" in capsys.readouterr().err

        with pytest.raises(SystemExit):
            begin("--text", "anna.txt", "--transliterate", "--no-fold")
        assert "argument --fold/--no-fold: not allowed with argument --transliterate" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("first", "then", "said"),
        [
            ([], "--transliterate", "folding is on with --transliterate and was on;"),
            (["--no-fold"], "--transliterate", "folding is on with --transliterate and was off;"),
            (["--transliterate"], "--no-fold", "folding is off and was on with --transliterate;"),
        ],
        ids=["folded", "not folded", "transliterated"],
    )
    def test_transliteration_does_not_change(self, capsys: Capture, first: list[str], then: str, said: str) -> None:
        """A run does not resume with another rule, in either direction."""
        write("novel.txt", NOVEL * 60)
        begin("--text", "novel.txt", *TINY_FLAGS, *first)

        assert train.main(["--run", "novel", "--epochs", "2", then]) == 1
        assert f"run novel: {said} choose another --run, or --fresh" in capsys.readouterr().err

    def test_a_run_of_before_resumes_as_it_was(self, capsys: Capture) -> None:
        """A run whose config knows no folding, mostly unknown even, resumes on the ids that it began with."""
        write("old.txt", "日本語 " * 500)
        assert begin("--text", "old.txt", *TINY_FLAGS, "--no-fold") == 1
        assert "old: 75% of its characters are unknown ('日' 500, '本' 500, '語' 500), so there is" in capsys.readouterr().err
        write("old.txt", NOVEL * 60)
        begin("--text", "old.txt", *TINY_FLAGS, "--no-fold")
        path = Path("logs/old/config.json")
        content = json.loads(path.read_text())
        del content["data"]["fold"]
        path.write_text(json.dumps(content))

        assert train.main(["--text", "old.txt", "--epochs", "2"]) == 0
        assert "logs/old: resuming from step 2" in capsys.readouterr().err

    def test_folder(self, capsys: Capture) -> None:
        """The number of files is said, and which ones are read in another encoding."""
        Path("notes").mkdir()
        write("notes/a.txt", NOVEL * 30, "cp1252")
        write("notes/b.md", FOLDED * 30, "utf-16")
        write("notes/.hidden.txt", "no")
        assert begin("--text", "notes", *TINY_FLAGS) == 0
        said = capsys.readouterr().err

        assert "files to read: 2 (skipped: 1 hidden)" in said
        assert "notes/a.txt: not UTF-8; read as CP1252 (Western European)" in said
        assert "notes/b.md: read as UTF-16-LE, according to its byte order mark" in said
        assert "no character unknown" in said

    def test_sample_of_an_epoch_draws_what_the_text_holds(
        self, text_file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The sample after an epoch, of a model that has learned nothing yet, has the text's characters alone."""
        monkeypatch.setattr("picogpt.training.sample.SAMPLE_CHARS", 300)
        begin("--text", str(text_file), *TINY_FLAGS, "--lr", "1e-9", "--muon-lr", "1e-9")
        sample = capsys.readouterr().out.split("characters/s")[-1]

        assert set(sample.split("\n", 1)[1]) <= set(text_file.read_text())


def rows(*texts: tuple[str, ...]) -> Any:
    """A file's rows from a row on."""
    return lambda _file, row: iter(texts[row:])


class TestStreams:
    def test_articles_are_folded(self) -> None:
        """Articles are folded and their line ends unified; counts are kept; with fold=False they are as the original has them."""
        shards = Shards(files=("a",), format="parquet", columns=("text",), commit=None)
        article = "\ufeffOne’s café\r\n日"
        reader = ArticleReader(shards, 0, lambda _: None, rows((article,)))
        plain = ArticleReader(shards, 0, lambda _: None, rows((article,)), fold=False)
        decode = CharTokenizer().decode

        assert decode(next(reader.articles(Cursor(0, 0, 0))).ids) == "one's cafe\n<?>"
        assert reader.tally.folded == {"’": 1, "é": 1}
        assert reader.tally.unknown == {"日": 1}
        assert decode(next(plain.articles(Cursor(0, 0, 0))).ids) == "one<?>s caf<?>\n<?>"

    def test_ids_of_a_stream(self) -> None:
        """All characters count as held; of questions and answers the tokens around them too."""
        texts = Shards(files=("a",), format="parquet", columns=("text",), commit=None)
        talks = Shards(files=("a",), format="parquet", columns=("question", "response"), commit=None)

        assert ArticleReader(texts, 0, print).text == TextConfig(fold=True, ids=tuple(PICOGPT.text_ids))
        tokens = [PICOGPT.special_ids[token] for token in ("<Q>", "</Q>", "<A>", "</A>")]
        assert ArticleReader(talks, 0, print, fold=False).text == TextConfig(fold=False, ids=(*PICOGPT.text_ids, *tokens))

    def test_articles_are_transliterated(self) -> None:
        """The articles of a stream too, which the model's file then says."""
        shards = Shards(files=("a",), format="parquet", columns=("text",), commit=None)
        reader = ArticleReader(shards, 0, lambda _: None, rows(("Да, café",)), fold="latin")

        assert CharTokenizer().decode(next(reader.articles(Cursor(0, 0, 0))).ids) == "da, cafe"
        assert reader.tally.transliterated == {"Д": 1, "а": 1}
        assert reader.text.fold == "latin"

    @pytest.mark.parametrize(("word", "code"), [("Привет мир", 1), ("naïve “gulls”", 0)], ids=["unknown", "folded"])
    def test_a_stream_is_judged_when_it_begins(self, capsys: Capture, word: str, code: int) -> None:
        """The articles read for the validation text show what its characters are; mostly unknown ones end the run."""
        Path("d").mkdir()
        lines = (json.dumps({"text": f"{i} {word} " * 30}) for i in range(60))
        write("d/train.jsonl", "\n".join(lines))

        assert begin("--dataset", "d", *TINY_FLAGS) == code
        said = capsys.readouterr().err
        if code:
            assert "% of its characters are unknown ('" in said
        else:
            assert "characters: folded to ASCII: " in said
            assert data_of("d")["fold"] is True


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A model that has learned nothing, in the run `m`."""
    run = RunFolder(Path("logs/m"))
    run.create()
    run.save_model(GPT(MODEL).arrays(), MODEL, TextConfig(fold=True, ids=tuple(PICOGPT.text_ids)))
    return run


def echo(*flags: str) -> int:
    """Have the model read a prompt, and write nothing."""
    return generate.main(["-m", "m", "-n", "0", *flags])


class TestPrompts:
    def test_folded(self, model: RunFolder, capsys: Capture) -> None:
        """A prompt is folded as the texts are, and that is said."""
        assert echo("-p", "“It’s” 日") == 0
        out, err = capsys.readouterr()

        assert out == '"it\'s" <?>\n'
        assert "prompt: folded to ASCII: 3 (" in err
        assert "; unknown, read as <?>: 1 (12.50%: '日' 1)" in err

    @pytest.mark.parametrize(("text", "shown"), [(None, "cafe"), (TextConfig(fold=False, ids=(1,)), "caf<?>")])
    def test_as_the_model_was_trained(self, model: RunFolder, capsys: Capture, text: TextConfig | None, shown: str) -> None:
        """A model that was trained without folding reads <?>; one that says nothing, as older ones, reads folded prompts."""
        model.save_model(GPT(MODEL).arrays(), MODEL, text)
        echo("-p", "café")

        assert capsys.readouterr().out == shown + "\n"

    @pytest.mark.parametrize(
        ("content", "shown"),
        [
            (b"\xef\xbb\xbfa\r\nb\rc\n", "a\nb\nc"),
            ("café".encode("latin-1"), "cafe"),
            ("a\r\né".encode("utf-16"), "a\ne"),
        ],
        ids=["mark and line ends", "Latin-1", "UTF-16"],
    )
    def test_encodings(
        self, model: RunFolder, capsys: Capture, monkeypatch: pytest.MonkeyPatch, content: bytes, shown: str
    ) -> None:
        """A prompt in a file and from a pipe is read as texts are."""
        Path("p").write_bytes(content)
        echo("-f", "p")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        echo("-f", "-")

        assert capsys.readouterr().out == f"{shown}\n{shown}\n"

    @pytest.mark.parametrize(
        ("prompt", "shown"), [("\ufeffa\r\nb", "a\nb"), ("caf\udce9", "cafe")], ids=["mark and line ends", "Latin-1"]
    )
    def test_on_the_command_line(self, model: RunFolder, capsys: Capture, prompt: str, shown: str) -> None:
        """So is one on the command line, where Python stands a surrogate for a byte that is not UTF-8."""
        echo("-p", prompt)

        assert capsys.readouterr().out == shown + "\n"

    def test_stop_texts_are_folded(self, model: RunFolder, capsys: Capture) -> None:
        """A stop text is made of what the model can write."""
        assert echo("-p", "a", "--stop", "é’") == 0
        assert echo("-p", "a", "--stop", "\u00ad") == 2
        assert echo("-p", "a", "--stop", "日") == 2
        assert "--stop must be made of characters that the model knows" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "text", [None, TextConfig(fold=True, ids=tuple(PICOGPT.text_ids))], ids=["nothing known", "no questions"]
    )
    def test_chat_with_a_model_that_has_seen_none(self, model: RunFolder, capsys: Capture, text: TextConfig | None) -> None:
        """`--chat` warns where the model is not known to have seen questions and answers, and does not where it is."""
        model.save_model(GPT(MODEL).arrays(), MODEL, text)
        echo("-p", "a", "--chat")
        assert "warning: --chat: this model is not known to be trained on questions" in capsys.readouterr().err

        model.save_model(GPT(MODEL).arrays(), MODEL, TextConfig(fold=True, ids=(*PICOGPT.text_ids, 80, 81)))
        echo("-p", "a", "--chat")
        assert "warning" not in capsys.readouterr().err

    def test_draws_what_the_text_held(self, model: RunFolder, capsys: Capture) -> None:
        """A model that has learned nothing writes the characters of its text alone."""
        model.save_model(GPT(MODEL).arrays(), MODEL, TextConfig(fold=True, ids=tuple(CharTokenizer().encode("abc").tolist())))
        generate.main(["-m", "m", "-p", "a", "-n", "300", "-t", "5", "--no-echo"])

        assert set(capsys.readouterr().out.strip()) == set("abc")


class TestEvaluation:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (TextConfig(fold=True, ids=(1,)), "folded to ASCII: 420 ("),
            (TextConfig(fold=False, ids=(1,)), "unknown, read as <?>: 420 ("),
            (None, "unknown, read as <?>: 420 ("),
        ],
        ids=["folded", "not folded", "older"],
    )
    def test_as_the_model_was_trained(self, model: RunFolder, capsys: Capture, text: TextConfig | None, said: str) -> None:
        """A text is folded for a model that was trained so; an older one is scored as it always was."""
        model.save_model(GPT(MODEL).arrays(), MODEL, text)
        write("novel.txt", NOVEL * 60)

        assert evaluation.main(["-m", "m", "--windows", "2", "--threads", "1", "--text", "novel.txt"]) == 0
        assert said in capsys.readouterr().err

    def test_a_folded_run_finds_its_text_again(self, capsys: Capture) -> None:
        """The text of a run has the fingerprint that it had in training."""
        begin("--text", str(write("novel.txt", NOVEL * 60)), *TINY_FLAGS)

        assert evaluation.main(["-m", "novel", "--windows", "2", "--threads", "1"]) == 0

    def test_without_a_model_file_nothing_is_folded(self) -> None:
        """A run of before, whose config says nothing either."""
        assert TrainedRun(RunFolder(Path("x")), None).fold is False

    def test_folder_of_the_ids(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ids of a long text go to the model's folder, or to this one if that is read-only, as an installed package's is."""
        trained = TrainedRun(RunFolder(tmp_path), None)
        assert trained.scratch == tmp_path
        monkeypatch.setattr("os.access", lambda *_: False)
        assert trained.scratch == Path()


class TestModelFile:
    @pytest.mark.parametrize(
        "text", ['{"fold": 1}', '{"fold": "greek", "ids": []}', '{"fold": [], "ids": []}'], ids=["no ids", "unknown", "a list"]
    )
    def test_damaged_text_is_said(self, model: RunFolder, text: str) -> None:
        """Metadata that is no text config is damage, not an older file."""
        from safetensors.numpy import save_file

        path = model.path / "model.safetensors"
        save_file({"w": np.zeros(1, np.float32)}, path, {"format": "1", "config": "{}", "text": text})

        with pytest.raises(RunError, match="damaged .the text in its metadata is not valid"):
            load_text_config(path)
