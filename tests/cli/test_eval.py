"""`picogpt-eval` as a user meets it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from picogpt import plot
from picogpt.cli import eval as evaluation
from picogpt.config import DataConfig, TrainConfig
from picogpt.data import Shards, StreamSpec, articles, read_ahead, read_texts
from picogpt.evaluation import texts as eval_texts
from picogpt.evaluation.report import Report
from picogpt.evaluation.scores import Scores
from picogpt.model.gpt import GPT
from picogpt.runs.folder import RunFolder
from picogpt.runs.settings import RunSettings
from picogpt.schedule import Budget, Schedule
from picogpt.tokenizer import CharTokenizer
from tests.conftest import TINY, needs_any_compiler

Capture = pytest.CaptureFixture[str]
DATA = DataConfig(name="numbers", characters=6000, sha256="")
SETTINGS = RunSettings(
    model=TINY,
    train=TrainConfig(),
    budget=Budget(),
    schedule=Schedule(total_steps=1, steps_per_epoch=1, val_steps=1),
    data=DATA,
    dtype="float32",
    threads=1,
)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is tested with the pictures, and takes longer than all the rest."""
    monkeypatch.setattr(plot, "draw_scores", lambda scores, title, suffix: f"{title} {len(scores.article_of)}".encode())


@pytest.fixture
def run(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run on a text of 6,000 characters, in a folder of its own."""
    monkeypatch.chdir(text_file.parent)
    run = RunFolder(Path("logs/numbers"))
    run.create()
    torch.manual_seed(0)
    run.save_model(GPT(TINY).arrays(), TINY)
    of(run, text=(str(text_file),), sha256=read_texts([str(text_file)], name="x").fingerprint)
    return run


def of(run: RunFolder, **data: Any) -> None:
    """Write what text the run is on."""
    run.write_config(replace(SETTINGS, data=replace(DATA, **data)).to_dict())


def evaluate(*flags: str) -> int:
    """Exit code of the command on short sequences."""
    try:
        return evaluation.main(["-m", "numbers", "--windows", "3", "--threads", "1", *flags])
    except SystemExit as exit_:
        return int(exit_.code or 0)


def test_table(run: RunFolder, capsys: Capture) -> None:
    """The table on stdout; on stderr what was scored; a picture beside the model."""
    assert evaluate() == 0
    out, err = capsys.readouterr()

    for label in (
        "context vector as it is",
        "context vector zeroed",
        "5-gram",
        "bz2 -9",
        "lzma -9e",
        "by window of the sequence",
        "  window  as it is        +-    zeroed   another   no roll    5-gram\n",
    ):
        assert label in out
    assert "Gain from the context roll: " in out
    assert "the last tenth, which the run was not trained on: 24 sequences of 24 characters from 24 of 24 stretches, 576" in err
    assert "the text has no articles, so it is cut into stretches" in err
    assert "n-gram counted on the first nine tenths of numbers: 5,400 characters\n" in err
    assert "picture: logs/numbers/eval.jpg" in err
    assert (run.path / "eval.jpg").read_text() == "numbers on numbers: 576 characters, 24 stretches, with standard errors 24"


def test_few_samples(run: RunFolder, capsys: Capture) -> None:
    """It says so where too little is scored for the printed errors to mean much."""
    for chars, scored in (
        ("48", "48 characters; {}; 2 stretches are few for a standard error\n"),
        ("250", "240 characters; {}\n"),
    ):
        assert evaluate("--chars", chars) == 0
        assert scored.format("the text has no articles, so it is cut into stretches") in capsys.readouterr().err


def test_json(run: RunFolder, capsys: Capture) -> None:
    """One object with all of it; the picture where it was asked for; no more characters than asked for."""
    assert evaluate("--json", "-o", "x.jpg", "--chars", "250") == 0
    content = json.loads(capsys.readouterr().out)

    assert Path("x.jpg").exists()
    assert (content["picture"], content["text"]["characters"], content["text"]["rolls"]) == ("x.jpg", 240, 10)
    assert content["errors_over"] == {"unit": "stretches", "number": 10}
    assert content["scores"].keys() == {"as_is", "zeroed", "other", "sliding", "ngram"}
    assert content["scores"]["as_is"]["nats"] == pytest.approx(np.log(88), abs=0.2)
    assert content["scores"]["as_is"]["bits"] == pytest.approx(np.log2(88), abs=0.3)
    assert len(content["scores"]["ngram"]["by_window"]) == 3
    assert len(content["scores"]["other"]["by_position"]) == 8
    assert content["more_than_as_is"].keys() == {"zeroed", "other", "sliding"}
    assert content["compressors"].keys() == {"bz2", "lzma"}


@needs_any_compiler
def test_what_a_dtype_costs(run: RunFolder, capsys: Capture) -> None:
    """Scores in int8 stand beside those in float32, with the difference paired and its standard error."""
    assert evaluate("--dtype", "int8") == 0
    out, err = capsys.readouterr()
    assert "as it is, in float32" in out
    assert re.search(r"In int8 a character costs 0\.\d{5} \+- 0\.\d{5} (more|less) nats than in float32", " ".join(out.split()))
    assert max(map(len, out.splitlines())) <= 80
    assert "computing in int8 with 1 thread (as requested)\n" in err

    assert evaluate("--dtype", "bfloat16", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    difference = content["scores"]["as_is"]["nats"] - content["scores"]["float32"]["nats"]
    assert content["dtype"] == "bfloat16"
    assert content["more_than_float32"]["nats"] == pytest.approx(difference, abs=1e-9)
    assert 0 < content["more_than_float32"]["nats_error"] < 0.01

    assert evaluate("--json") == 0
    assert json.loads(capsys.readouterr().out)["more_than_float32"] is None


def test_without_a_compiler(run: RunFolder, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one numpy scores in float32 and says so; another type is one line."""
    monkeypatch.setenv("CC", "false")
    assert evaluate() == 0
    assert "numpy computes the model, several times more slowly than C" in capsys.readouterr().err
    assert evaluate("--dtype", "int8") == 2

    assert "--dtype int8 needs the native kernels, which are not available" in capsys.readouterr().err


def test_other_text(run: RunFolder, text_file: Path, capsys: Capture) -> None:
    """All of it; the text that the run was trained on is named; the n-gram is counted on what was asked for."""
    assert evaluate("--text", str(text_file), "--ngram-text", str(text_file)) == 0
    err = capsys.readouterr().err
    assert (
        "warning: numbers.txt: the run was trained on nine tenths of this text; leave out --text to score only the last tenth"
        in err
    )
    assert "numbers.txt, all of it: 249 sequences of 24 characters from 63 of 63 stretches" in err
    assert "n-gram counted on numbers.txt: 6,000 characters" in err

    Path("other.txt").write_text("another text altogether, and some more of it after that: é日\n" * 40)
    Path("third.txt").write_text("a third text, in capitals and small letters\n" * 200)
    assert evaluate("--text", "other.txt", "third.txt") == 0
    err = capsys.readouterr().err
    assert "other.txt and 1 more, all of it" in err
    assert "warning" not in err
    assert "unknown, read as <?>: 80 (" in err
    assert "n-gram counted on the first nine tenths of numbers: 5,400 characters" in err


def test_named_data_set(run: RunFolder, capsys: Capture) -> None:
    """The sample play."""
    assert evaluate("--dataset", "sample", "--chars", "500") == 0

    assert "sample, all of it: 20 sequences of 24 characters from 20 of 1,344 stretches" in capsys.readouterr().err


def test_validation_text_of_a_stream(run: RunFolder, text_file: Path, capsys: Capture) -> None:
    """The run's own, in stretches; its training text is not at hand."""
    of(run, dataset="wikipedia", characters=None)
    run.save_validation(CharTokenizer().encode(text_file.read_text()[:900]))
    assert evaluate() == 0
    out, err = capsys.readouterr()

    assert "numbers, the validation text of the run: 37 sequences of 24 characters from 37 of 37 stretches" in err
    assert "no n-gram: the run's text is a stream; name a text with --ngram-text" in err
    assert "5-gram" not in out


def test_articles_of_a_stream(run: RunFolder, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Articles for validation that are long enough, at the run's commit, until there are enough characters."""
    of(run, dataset="org/name", characters=None, commit="c" * 40, files=("file",), format="parquet", text_column="body")
    asked: list[Shards] = []

    def rows(shards: Shards, file: str, start: int) -> Iterator[tuple[str]]:
        asked.append(shards)
        yield from (("short",) if i % 2 else (f"article {i} " * 10,) for i in range(start, 500))

    monkeypatch.setattr(articles, "read_rows", rows)
    assert evaluate("--dataset", "org/name", "--chars", "300") == 0
    err = capsys.readouterr().err

    assert (
        "org/name: 1 file at commit cccccccccccc; scoring validation articles, the one in twenty that no run is trained on" in err
    )
    assert "name, the first validation articles of over 24 characters: 12 sequences of 24 characters from 4 of 4 articles" in err
    assert "n-gram counted on training articles of name: 80 characters" in err  # a step of 10 windows of 8
    assert {(shards.columns, shards.commit) for shards in asked} == {(("body",), "c" * 40)}
    # Naming the run's own column, or another one, is no reason to leave its commit.
    assert evaluate("--dataset", "org/name", "--chars", "300", "--text-column", "body") == 0
    assert evaluate("--dataset", "org/name", "--chars", "300", "--text-column", "title") == 0
    assert {(shards.columns, shards.commit) for shards in asked} == {(("body",), "c" * 40), (("title",), "c" * 40)}
    capsys.readouterr()
    assert evaluate("--dataset", "org/name", "--chars", "9999") == 0
    found = re.search(r"from (\d+) of", capsys.readouterr().err)
    assert found
    assert int(found[1]) < 60  # one in twenty of all 250


def test_ngram_of_a_stream(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted on the articles that the run reads, in its own order, and on none that is scored."""
    of(run, dataset="org/name", characters=None, commit="c" * 40, files=("one", "two"), format="parquet")
    counted: list[str] = []

    class Counter:
        """In place of the n-gram."""

        def __init__(self, ids: npt.NDArray[np.uint8], _: int) -> None:
            counted.append(CharTokenizer().decode(ids))
            self.n_chars = len(ids)

        def losses(self, ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            """Of the right shape."""
            return np.zeros((len(ids), ids.shape[1] - 1), np.float32)

    monkeypatch.setattr("picogpt.evaluation.run.NGram", Counter)
    monkeypatch.setattr(articles, "read_rows", lambda _shards, file, start: ((f"{file} {i}. " * 9,) for i in range(start, 99)))
    assert evaluate("--dataset", "org/name", "--chars", "100") == 0
    for_training = [i for i in range(99) if not articles._is_for_validation("two", i)]

    assert len(for_training) < 99
    assert counted == ["\n\n".join(f"two {i}. " * 9 for i in for_training)[:80]]


def test_articles_of_another_stream(run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """That the run may have read them elsewhere is said, and its n-gram is not counted on what it has not read."""
    of(run, dataset="org/other", characters=None, commit="d" * 40, files=("x",), format="parquet", text_column="body")
    shards = Shards(files=("one",), format="parquet", columns=("text",), commit="c" * 40)
    asked: list[tuple[str, ...]] = []

    def find(spec: StreamSpec, _: object) -> Shards:
        asked.append(spec.columns)
        return shards

    monkeypatch.setattr("picogpt.evaluation.texts.find_shards", find)
    monkeypatch.setattr(articles, "read_rows", lambda _shards, file, start: ((f"{file} {i}. " * 9,) for i in range(start, 99)))
    assert evaluate("--dataset", "org/name", "--chars", "100") == 0
    err = capsys.readouterr().err

    assert asked == [("text",)]  # the run's own column is of its own stream
    assert "warning: the run was trained on another stream, org/other, which may contain some of these articles" in err
    assert "no n-gram: the run's text is a stream; name a text with --ngram-text" in err


def test_a_stream_of_short_articles(run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """It is not searched without end for articles of enough length."""
    of(run, dataset="org/name", characters=None, commit="c" * 40, files=("one",), format="parquet")
    monkeypatch.setattr(eval_texts, "MAX_CHARS_READ", 1000)
    monkeypatch.setattr(read_ahead, "READ_AHEAD", 2000)
    asked: list[int] = []

    def rows(_shards: Shards, _file: str, start: int) -> Iterator[tuple[str]]:
        for i in range(start, 9999):
            asked.append(i)
            yield ("short",)

    monkeypatch.setattr(articles, "read_rows", rows)

    assert evaluate("--dataset", "org/name") == 1
    assert "too short to evaluate: two articles of at least 25 characters are needed" in capsys.readouterr().err
    assert 200 < len(asked) < 9999


def test_ngram_without_a_text(run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A stream may have not one article for training."""
    of(run, dataset="org/name", characters=None, commit="c" * 40, files=("one",), format="parquet")
    monkeypatch.setattr(articles, "read_rows", lambda _shards, _file, start: ((f"{i} " * 30,) for i in range(start, 9)))
    monkeypatch.setattr(articles, "_is_for_validation", lambda _file, _row: True)

    assert evaluate("--dataset", "org/name", "--chars", "100") == 0
    assert "no n-gram: there is no training article" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"text": ("-",)}, "the run's text came from standard input and was not stored; name it with --text or --ngram-text"),
        ({"dataset": "sample"}, "numbers: the text has changed since the run was trained on it; name a text with --text"),
        ({"dataset": "x/y", "characters": None}, "the run's validation text is missing; name a text with --text"),
    ],
)
def test_own_text_is_gone(run: RunFolder, capsys: Capture, data: dict[str, Any], message: str) -> None:
    """What cannot be scored is said, with what to do."""
    of(run, **data)

    assert evaluate() == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"dataset": "tinyshakespeare"}, "no n-gram: dataset/tinyshakespeare.txt does not exist; name a text with --ngram-text"),
        ({"text": ("gone.txt",)}, "no n-gram: gone.txt: cannot be read (No such file or directory); check the path of --text"),
        ({"dataset": "sample"}, "no n-gram: numbers: the text has changed since the run was trained on it"),
    ],
)
def test_no_ngram(run: RunFolder, text_file: Path, capsys: Capture, data: dict[str, Any], message: str) -> None:
    """Without the run's text the rest is still measured, and why is said."""
    of(run, **data)

    assert evaluate("--text", str(text_file), "--chars", "100") == 0
    assert message in capsys.readouterr().err


def test_model_without_a_run(run: RunFolder, text_file: Path, capsys: Capture) -> None:
    """A model by itself needs a text; a config that is not one is named."""
    (run.path / "config.json").unlink()
    assert evaluate() == 2
    assert "there is no config.json that names the model's text; name a text with --text" in capsys.readouterr().err
    assert evaluate("--text", str(text_file), "--chars", "100") == 0
    assert "no n-gram: the model has no config.json that names its training text" in capsys.readouterr().err
    (run.path / "config.json").write_text('{"format": 1}')
    assert evaluate() == 1
    assert "move it away and name a text with --text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--chars", "0"], 2, "--chars must be a whole number of at least 1, got 0"),
        (["--windows", "1"], 2, "--windows must be a whole number of at least 2, got 1"),
        (["--dtype", "auto"], 2, "argument --dtype: invalid choice: 'auto' (choose from"),
        (["--threads", "0"], 2, "--threads must be from 1 to 1024, got 0"),
        (["-o", "x.gif"], 2, "--output must end in .jpg or .png, got 'x.gif'"),
        (["-o", "nowhere/x.jpg"], 2, "--output: there is no folder nowhere; create it first"),
        (["--text-column", "x"], 2, "--text-column is for a streamed data set; name one with --dataset, or leave it out"),
        (["--model", "nowhere"], 1, "nowhere: no such file, and no run of that name"),
        (["--text", "a", "--dataset", "sample"], 2, "argument --dataset: not allowed with argument --text"),
        (["--dataset", "shakespear"], 2, "--dataset must be auto, sample, tinyshakespeare, wikipedia, "),
        (["--text", "nowhere"], 1, "nowhere: cannot be read"),
        (["--windows", "99"], 1, "too short to evaluate: two articles of at least 793 characters are needed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(run: RunFolder, capsys: Capture, flags: list[str], code: int, message: str) -> None:
    """The right exit code, one line that says so, and nothing on stdout."""
    assert evaluate(*flags) == code
    out, err = capsys.readouterr()

    assert out == ""
    assert message in err.splitlines()[-1]


def test_lines_where_there_is_no_terminal(run: RunFolder, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much is read, how fast, and the time left."""
    monkeypatch.setattr("picogpt.cli.bar.LINE_INTERVAL", 0.0)
    evaluate("--chars", "100")

    assert "100% read, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("zeroed", "meaning"),
    [
        ([2.5, 3.0], "That is 27.27% of the loss."),
        ([2.5, 1.7], "That is within two standard errors of zero: on this text the roll makes no measurable difference."),
        ([1.5, 1.0], "The model does better without its context vector."),
    ],
)
def test_sentence(zeroed: list[float], meaning: str) -> None:
    """It says no more than the errors allow."""
    shape = (2, 2, 3)
    losses = {name: np.full(shape, 2.0, np.float32) for name in ("as_is", "other", "sliding")}
    losses["zeroed"] = np.broadcast_to(np.array(zeroed, np.float32)[:, None, None], shape)
    losses["sliding"] -= np.float32(0.25)
    report = Report(
        model="m",
        text="t",
        part="p",
        unit="articles",
        dtype="float32",
        scores=Scores(losses, np.array([0, 1])),
        compressors={},
        ngram="",
    )

    assert meaning in report.sentence()
    assert report.sentence().endswith(
        "The vector of another article costs 0.00000 +- 0.00000 more than its own, and overlapping windows without a roll "
        "0.25000 +- 0.00000 less."
    )
