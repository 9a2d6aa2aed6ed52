"""`picogpt-export --format pack`: a run small enough to be given away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from picogpt.cli import export, train
from picogpt.runs.folder import RunFolder
from picogpt.runs.model_file import load_model
from picogpt.runs.names import MODEL_FILE
from tests.conftest import TINY_FLAGS


def test_pack(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Half the size, weights rounded, log and settings as they were; nothing is written over."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--text", str(text_file), "--run", "a", *TINY_FLAGS, "--epochs", "1", "--steps-per-epoch", "2"]) == 0
    source, target = RunFolder(Path("logs/a")), RunFolder(Path("b"))
    names = ["config.json", "log.csv", "log.jpg", "log.pkl", "model.safetensors"]
    capsys.readouterr()
    assert export.main(["-m", "a", "--format", "pack", "b"]) == 0

    out, err = capsys.readouterr()
    assert out == "b\n"
    assert err.startswith(f"model logs/a/model.safetensors: {', '.join(names)} (")
    model, packed = load_model(source.path / MODEL_FILE), load_model(target.path / MODEL_FILE)
    assert (packed.config, packed.text) == (model.config, model.text)
    assert packed.weights.keys() == model.weights.keys()
    for name, weight in model.weights.items():
        assert np.array_equal(packed.weights[name], torch.from_numpy(weight).bfloat16().float().numpy())
    assert target.read_config() == source.read_config()
    assert target.read_log() == source.read_log()
    assert sorted(path.name for path in target.path.iterdir()) == names
    assert export.main(["-m", "a", "--format", "pack", "b"]) == 2
    assert capsys.readouterr().err == "picogpt-export: FOLDER: b exists and is not an empty folder; choose another name\n"


def test_half_a_run(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that lacks its log is one line, and nothing is left of the folder."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--text", str(text_file), "--run", "a", *TINY_FLAGS, "--epochs", "1", "--steps-per-epoch", "2"]) == 0
    Path("logs/a/log.pkl").unlink()
    before = sorted(Path().iterdir())
    capsys.readouterr()

    assert export.main(["-m", "a", "--format", "pack", "c"]) == 1
    assert "log.pkl: cannot be read" in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: {**content, "dtype": "fp16"}, "dtype must be one of auto, float32, bfloat16, got 'fp16'"),
        (lambda _: {"format": 1}, "the run's config is not valid (KeyError: 'data')"),
    ],
)
def test_damaged_settings(
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    edit: Callable[[dict[str, Any]], dict[str, Any]],
    message: str,
) -> None:
    """Settings that no run can have are one line that names their file and gives no advice for training."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--text", str(text_file), "--run", "a", *TINY_FLAGS, "--epochs", "1", "--steps-per-epoch", "2"]) == 0
    config = Path("logs/a/config.json")
    config.write_text(json.dumps(edit(json.loads(config.read_text()))))
    capsys.readouterr()

    assert export.main(["-m", "a", "--format", "pack", "c"]) == 1
    expected = f"picogpt-export: logs/a/config.json: {message}; only a run can be packed, and its config.json is part of it\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("name", ["pack", "gpt2"])
@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_damaged_weights(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    """Weights that no engine would run are not given away."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--text", str(text_file), "--run", "a", *TINY_FLAGS, "--epochs", "1", "--steps-per-epoch", "2"]) == 0
    model = load_model(Path("logs/a") / MODEL_FILE)
    weights, broken = dict(model.weights), "transformer.wte.weight"
    if damage == "missing":
        del weights[broken]
    else:
        weights[broken] = weights[broken][:1] if damage == "shape" else np.full_like(weights[broken], np.nan)
    RunFolder(Path("logs/a")).save_model(weights, model.config, model.text)
    capsys.readouterr()

    assert export.main(["-m", "a", "--format", name, "c"]) == 1
    err = capsys.readouterr().err
    assert "the weights are" in err
    assert broken in err
    assert not Path("c").exists()
