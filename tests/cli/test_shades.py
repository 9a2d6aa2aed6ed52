"""`--show-probs`: text shaded on a terminal, and nothing but text elsewhere."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from picogpt.cli import generate
from picogpt.cli.shades import LEGEND, can_shade, shade
from picogpt.inference.prompts import Character
from picogpt.model.gpt import GPT
from picogpt.runs.folder import RunFolder
from tests.conftest import TINY, Terminal, type_lines


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Flags that name a tiny model and a seed."""
    torch.manual_seed(4)
    folder = RunFolder(tmp_path / "tiny")
    folder.create()
    folder.save_model(GPT(TINY).arrays(), TINY)
    return ["-m", str(folder.path), "-s", "2", "-n", "30"]


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], str]:
    """Runs the command with a terminal as stdout, whose user has no wish about colours, and returns what is written there."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def run(flags: list[str]) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal := Terminal())
            assert generate.main(flags) == 0
        return terminal.getvalue()

    return run


def plain(text: str) -> str:
    """The text without escape sequences."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_shades() -> None:
    """Five styles by probability, shared by neighbours, each ended where it ends; a newline has none."""
    pairs = [("a", 1.0), ("b", 0.75), ("c", 0.74), ("d", 0.3), ("\n", 0.9), ("e", 0.05), ("f", 0.049), (" ", 0.0)]
    shaded = shade(Character(text, probability, ()) for text, probability in pairs)

    assert shaded == (
        "\x1b[48;5;25;38;5;231mab\x1b[0m\x1b[48;5;68;38;5;16mc\x1b[0m\x1b[48;5;111;38;5;16md\x1b[0m\n"
        "\x1b[48;5;153;38;5;16me\x1b[0m\x1b[4mf \x1b[0m"
    )
    assert shade([]) == ""


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [("TERM", "xterm", True), ("NO_COLOR", "", True), ("NO_COLOR", "1", False), ("TERM", "dumb", False)],
)
def test_who_gets_shades(variable: str, value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that can show them, unless NO_COLOR is set; a file or a pipe never."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(variable, value)

    assert can_shade(Terminal()) is expected
    assert not can_shade(io.StringIO())


@pytest.mark.parametrize("more", [[], ["--num-samples", "3"]])
def test_text_on_a_terminal(
    flags: list[str],
    more: list[str],
    on_terminal: Callable[[list[str]], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only new characters are shaded, a line explains how, and the text is that without the flag; NO_COLOR gives text alone."""
    command = [*flags, *more, "-p", "one"]
    expected = on_terminal(command)
    assert LEGEND not in capsys.readouterr().err
    shaded = on_terminal([*command, "--show-probs"])

    assert LEGEND in capsys.readouterr().err
    assert expected.startswith("one")
    assert "\x1b" not in expected
    assert re.fullmatch(r"one\n?\x1b.*", shaded, re.DOTALL)
    assert plain(shaded) == expected
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_terminal([*command, "--show-probs"]) == expected


def test_text_in_a_pipe(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal the text is the same with the flag, and no line explains shades."""
    assert generate.main([*flags, "-p", "one"]) == 0
    expected = capsys.readouterr()
    assert generate.main([*flags, "-p", "one", "--show-probs"]) == 0

    assert capsys.readouterr() == expected


def test_loop(flags: list[str], on_terminal: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed prompts are answered with shades too, and each answer has the text that it has without."""

    def answers(command: list[str]) -> str:
        type_lines(monkeypatch, "one", "two")
        return on_terminal(command)

    shaded, expected = answers([*flags, "--show-probs"]), answers(flags)

    assert shaded.count("\x1b[0m") > 2
    assert plain(shaded) == expected
    assert len(expected) > 60


def test_json(flags: list[str], on_terminal: Callable[[list[str]], str], capsys: pytest.CaptureFixture[str]) -> None:
    """Two more fields with an entry for each character, on a terminal too, where nothing is shaded."""
    command = [*flags, "-p", "one", "--num-samples", "2", "--json"]
    expected = [json.loads(line) for line in on_terminal(command).splitlines()]
    samples = [json.loads(line) for line in on_terminal([*command, "--show-probs"]).splitlines()]

    assert LEGEND not in capsys.readouterr().err
    assert len(samples) == 2
    for sample in samples:
        probabilities, top = sample.pop("probabilities"), sample.pop("top")
        assert len(probabilities) == len(top) == 30
        assert all(0 <= probability <= 1 for probability in probabilities)
        for character, probability, likeliest in zip(sample["text"], probabilities, top, strict=True):
            values = [value for _, value in likeliest]
            assert len(values) == 10
            assert values == sorted(values, reverse=True)
            assert dict(likeliest).get(character, probability) == probability
    assert samples == expected
