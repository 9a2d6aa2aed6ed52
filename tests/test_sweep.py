"""The comparison of settings: arms are read, runs are paired by sequence and by seed, weights are averaged."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.learn import open_source, suitable_config
from benchmarks.sweep import Outcome, paired, parse_arm, read_outcomes, report, train_arm
from picogpt.config import TrainConfig
from picogpt.data import Batch
from picogpt.schedule import REPEATED_TEXT_DECAY
from picogpt.training.trainer import Trainer
from tests.conftest import TINY, tiny_source


def outcome(arm: str, seed: int, losses: list[float], averaged: list[float] | None = None) -> Outcome:
    """What a run of 1,000 characters in two seconds came to."""
    return Outcome(arm, seed, losses, averaged or [], seconds=2.0, chars=1000)


def test_arm_is_read() -> None:
    """Words become settings of the type that they have."""
    assert parse_arm("batch_size=1 muon_lr=0.01 decay=cosine") == {"batch_size": 1, "muon_lr": 0.01, "decay": "cosine"}
    assert parse_arm("") == {}


@pytest.mark.parametrize("word", ["muon", "rate=1"])
def test_arm_without_a_setting(word: str) -> None:
    """A word that names none is an error that lists them."""
    with pytest.raises(ValueError, match=rf"'{word}' is no setting; write NAME=VALUE with a name of recipe, batch_size"):
        parse_arm(word)


def test_paired_by_sequence() -> None:
    """With one seed: differences 1, 3 of the sequences have mean 2 and a standard error of 1."""
    assert paired([outcome("b", 1, [2.0, 5.0])], [outcome("a", 1, [1.0, 2.0])]) == pytest.approx((2.0, 1.0))


def test_paired_by_seed() -> None:
    """With two seeds: differences 2 and 4 of their means have mean 3 and a standard error of 1."""
    first = [outcome("a", 1, [0.0, 0.0]), outcome("a", 2, [0.0, 0.0])]
    second = [outcome("b", 1, [1.0, 3.0]), outcome("b", 2, [4.0, 4.0])]

    assert paired(second, first) == pytest.approx((3.0, 1.0))


def test_table() -> None:
    """The first arm has no difference; the averaged loss stands where there is one."""
    first, second = [outcome("", 1, [1.0, 2.0])], [outcome("lr=1", 1, [2.0, 3.0], [1.5, 2.5])]

    assert report([first, second]).splitlines()[3:] == [
        "| as it is | 1.5000 |  |  | 500 |",
        "| lr=1 | 2.5000 | +1.0000 ± 0.0000 | 2.0000 | 500 |",
    ]


def test_results_are_kept(tmp_path: Path) -> None:
    """A file of earlier outcomes is read by arm and seed."""
    file, kept = tmp_path / "results", outcome("lr=1", 2, [1.0])
    file.write_text(json.dumps(dataclasses.asdict(kept)) + "\n")

    assert read_outcomes(file) == {("lr=1", 2): kept}
    assert read_outcomes(tmp_path / "none") == read_outcomes(None) == {}


def test_same_validation_text_for_all_arms(tmp_path: Path) -> None:
    """Arms with sequences of other lengths are scored on the same sequences."""
    (tmp_path / "x.txt").write_text("one two three four five six seven\n" * 1500)
    arguments = argparse.Namespace(text=[str(tmp_path / "x.txt")], folder=None, val_sequences=4)
    short, long = (open_source(arguments, TrainConfig(windows=windows))[1] for windows in (5, 10))

    assert sum(len(batch.inputs) for batch in short) > 1
    assert all(np.array_equal(a.targets, b.targets) for a, b in zip(short, long, strict=True))


def test_settings_suit_the_length() -> None:
    """A run has the settings that picogpt-train gives one of its length, but for those that its arm names."""
    source = tiny_source(TrainConfig())
    config = suitable_config({"seed": 5}, 2_000_000, source)

    assert config.muon_lr < TrainConfig().muon_lr
    assert (config.seed, config.weight_decay) == (5, REPEATED_TEXT_DECAY)
    assert suitable_config({"muon_lr": 0.03}, 2_000_000, source).muon_lr == 0.03


def test_run_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes its steps with its settings; its averaged weights lie between those of its last tenth, and score otherwise."""
    made: list[Trainer] = []

    def tiny_trainer(config: TrainConfig, source: Any) -> Trainer:
        made.append(Trainer(TINY, config, source, torch.float32))
        return made[-1]

    def tiny_text(_: argparse.Namespace, config: TrainConfig) -> tuple[Any, list[Batch]]:
        source = tiny_source(config)
        return source, list(source.val_batches(2))

    monkeypatch.setattr("benchmarks.sweep.full_trainer", tiny_trainer)
    monkeypatch.setattr("benchmarks.sweep.open_source", tiny_text)
    monkeypatch.setattr("benchmarks.sweep.AVERAGE_EVERY", 1)
    found = train_arm(argparse.Namespace(chars=1300, average=True), "batch_size=2 windows=3 lr=0.01", 5, 1)

    (trainer,) = made
    assert (trainer.config.lr, trainer.config.seed, trainer.config.windows) == (0.01, 5, 3)
    assert trainer.step == -(-1300 // trainer.chars_per_step)
    assert len(found.losses) == len(found.averaged) > 1
    assert 0 < abs(np.mean(found.losses) - np.mean(found.averaged)) < 0.5
