"""File names that are bytes and no text, as a disk from another system has them, work in every command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from picogpt.cli import eval as evaluation
from picogpt.cli import generate, plot, train
from tests.conftest import TINY_FLAGS, write_numbers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")

RUN, TEXT = "caf\udce9-run", "caf\udce9.txt"


@pytest.fixture(autouse=True)
def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run, trained for a moment on a text of such a name and then given such a name itself."""
    monkeypatch.chdir(tmp_path)
    write_numbers(Path(TEXT))
    assert train.main(["--text", TEXT, *TINY_FLAGS, "--epochs", "1", "--steps-per-epoch", "2", "--run", "a"]) == 0
    assert json.loads(Path("logs/a/config.json").read_text())["data"]["text"] == [str(tmp_path / TEXT)]
    assert train.main(["--run", "a", "--epochs", "2"]) == 0
    Path("logs/a").rename(Path("logs") / RUN)
    capsys.readouterr()


def test_train_in_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """The logs folder may have such a name."""
    assert train.main(["--text", TEXT, *TINY_FLAGS, "--epochs", "1", "--steps-per-epoch", "2", "--logs-dir", "l\udce9"]) == 0
    assert (Path("l\udce9") / "caf-" / "model.safetensors").exists()


def test_run_name(capsys: pytest.CaptureFixture[str]) -> None:
    """A new run cannot have such a name, which is one line."""
    assert train.main(["--run", RUN]) == 2
    assert capsys.readouterr().err.startswith("picogpt-train: --run must be 1 to 64 letters")


def test_plot() -> None:
    """The picture is drawn, and its path printed as the system has it."""
    done = subprocess.run([sys.executable, "-m", "picogpt.cli.plot", RUN], capture_output=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, b"logs/caf\xe9-run/log.jpg\n", b"")
    assert plot.main([RUN, f"logs/{RUN}", "-o", "both.png"]) == 0
    assert Path("both.png").exists()


def test_eval(capsys: pytest.CaptureFixture[str]) -> None:
    """A text of such a name is scored, and the picture drawn."""
    assert evaluation.main(["-m", RUN, "--text", TEXT, "--windows", "2", "--threads", "1"]) == 0
    assert (Path("logs") / RUN / "eval.jpg").exists()
    assert evaluation.main(["-m", RUN, "--text", TEXT, "--windows", "2", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["text"]["name"] == TEXT


def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    """Model, prompt file and prompt may be such bytes; missing ones are one line."""
    assert generate.main(["-m", RUN, "-f", TEXT, "-n", "1", "--threads", "1", "--no-echo"]) == 0
    assert generate.main(["-m", RUN, "caf\udce9", "-n", "0", "--threads", "1"]) == 0
    assert capsys.readouterr().out.endswith("cafe\n")
    assert generate.main(["-m", RUN, "-f", "no\udce9"]) == 1
    assert generate.main(["-m", "no\udce9"]) == 1


def test_export() -> None:
    """Run and page may have such names; the page shows the run's name without the bytes that are no text."""
    command = [sys.executable, "-m", "picogpt.cli.export", "-m", RUN, "caf\udce9.html"]
    done = subprocess.run(command, capture_output=True, check=False)

    assert (done.returncode, done.stdout) == (0, b"caf\xe9.html\n"), done.stderr
    assert "<h1>A small writing model: caf?-run</h1>" in Path("caf\udce9.html").read_text("utf-8")
