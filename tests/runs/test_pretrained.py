"""The trained models that come with a clone."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from picogpt.inference import Engine
from picogpt.inference.decoder import RollingDecoder
from picogpt.runs.find import PRETRAINED, find_model
from picogpt.runs.folder import RunFolder
from picogpt.tokenizer import CharTokenizer

RUNS = [RunFolder(path.parent) for path in sorted(PRETRAINED.glob("*/README.md"))]
"""Those with a card."""


def test_which_there_are(tmp_path: Path) -> None:
    """Two, of which the Wikipedia model is what a newcomer writes with; together they are small."""
    assert {run.name for run in RUNS} == {"tinyshakespeare", "wikipedia"}
    assert find_model(None, tmp_path)[0] == PRETRAINED / "wikipedia" / "model.safetensors"
    assert sum(path.stat().st_size for run in RUNS for path in run.path.glob("model*")) < 26e6


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_model(run: RunFolder) -> None:
    """It knows English, has nothing to resume, and its card has the loss of its log."""
    engine = Engine.load(run.path / "model.safetensors")
    ids = CharTokenizer().encode("the king and his brother went down to the sea, and there they found that the ship was gone.")
    logits = RollingDecoder(engine, engine.config.context_len).prefill_all_logits(ids[None, :-1])[0].astype(np.float64)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]

    assert (np.log(np.exp(logits).sum(axis=1)) - chosen).mean() < 1.7
    assert run.is_weights_only()
    losses = re.findall(r"\d\.\d{4}", (run.path / "README.md").read_text())
    assert f"{run.read_log().best_loss:.4f}" in losses
