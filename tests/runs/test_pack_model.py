"""The script that makes a run small enough to be given away."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from picogpt.cli import train
from picogpt.errors import RunError
from picogpt.runs.folder import MODEL_FILE, RunFolder, load_model
from tests.conftest import TINY_FLAGS

pack = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "pack_model.py"))["pack"]


def test_pack(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the size, weights rounded, log and settings as they were; nothing is written over."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--text", str(text_file), "--run", "a", *TINY_FLAGS, "--epochs", "1", "--steps-per-epoch", "2"]) == 0
    source, target = RunFolder(Path("logs/a")), RunFolder(Path("given/b"))
    pack(source, target)

    config, weights = load_model(source.path / MODEL_FILE)
    packed_config, packed = load_model(target.path / MODEL_FILE)
    assert packed_config == config
    assert packed.keys() == weights.keys()
    for name, weight in weights.items():
        assert np.array_equal(packed[name], torch.from_numpy(weight).bfloat16().float().numpy())
    assert target.read_config() == source.read_config()
    assert target.read_log() == source.read_log()
    names = sorted(path.name for path in target.path.iterdir())
    assert names == ["config.json", "log.csv", "log.jpg", "log.pkl", "model.safetensors"]
    with pytest.raises(FileExistsError):
        pack(source, target)
    (source.path / MODEL_FILE).unlink()
    with pytest.raises(RunError, match="safetensors: no such file"):
        pack(source, RunFolder(Path("c")))
    assert not Path("c").exists()
