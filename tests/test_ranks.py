"""Several processes that train one model: the same bytes as one, whatever happens to them.

`PICOGPT_TORTURE=20 pytest tests/test_ranks.py` kills twenty times, and stops a rank for ten seconds.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from picogpt.cli import train
from picogpt.config import RunSettings
from picogpt.data import Batch, TextSource, read_texts
from picogpt.optim import learning_rate
from picogpt.run import RunFolder
from picogpt.train import Trainer
from tests.conftest import TINY_FLAGS
from tests.ranks import RankProcesses, run_ranks, said

TIMES = int(os.environ.get("PICOGPT_TORTURE", "1"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path) -> list[str]:
    """A folder of the test's own, and the flags of a short run."""
    monkeypatch.chdir(tmp_path)
    flags = ["--epochs", "4", "--steps-per-epoch", "25", "--val-steps", "4", "--batch-size", "4"]
    return ["--text", str(text_file), *TINY_FLAGS, *flags]


def saved(run: str) -> dict[str, bytes]:
    """The bytes of all that a run has saved to go on from."""
    return {name: array.tobytes() for name, array in load_file(f"logs/{run}/checkpoint.safetensors").items()}


def train_in_two_parts(run: RunFolder) -> Trainer:
    """Train like `run` in this process alone, with the gradients of each step's halves taken one after the other and averaged."""
    settings = RunSettings.from_dict(run.read_config())
    model, config = settings.model, settings.train
    corpus = read_texts(settings.data.text, name="text")
    source = TextSource(corpus, roll_len=config.windows * model.context_len, batch_size=config.batch_size, seed=config.seed)
    trainer = Trainer(model, config, source, getattr(torch, settings.dtype))
    parameters = list(trainer.model.parameters())
    for k in range(settings.schedule.total_steps):
        inputs, targets = source.train_batch(k)
        halves = (slice(None, config.batch_size // 2), slice(config.batch_size // 2, None))
        losses = [trainer.loss(Batch(inputs[half], targets[half])) for half in halves]
        gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
        for parameter, first, second in zip(parameters, *gradients, strict=True):
            parameter.grad = first / 2 + second / 2
        mean = sum(loss.item() for loss in losses) / 2
        trainer.apply_gradient(learning_rate(k, settings.schedule.total_steps, config), mean)
    return trainer


def test_two_ranks_are_two_halves(here: list[str]) -> None:
    """A hundred steps on two ranks and in one process, half by half: the same weights and moments to the bit."""
    assert run_ranks(2, [*here, "--run", "two"]) == [0, 0]
    alone = train_in_two_parts(RunFolder(Path("logs/two")))

    assert alone.step == 100
    assert saved("two") == {name: array.tobytes() for name, array in alone.own_tensors().items()}
