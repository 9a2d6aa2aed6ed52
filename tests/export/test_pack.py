"""`picogpt-export --format pack`: a run small enough to be given away."""

from __future__ import annotations

from pathlib import Path

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
