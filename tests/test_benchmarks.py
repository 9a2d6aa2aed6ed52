"""The baselines are the same model, and what is counted is counted right."""

from __future__ import annotations

import argparse
import re
import sys

import pytest
import torch

from benchmarks import common
from benchmarks.common import in_turns, machine
from benchmarks.kernels import comparing
from benchmarks.learn import follow
from benchmarks.plain import PlainLoop
from benchmarks.ranks import launch
from benchmarks.train import flops_per_char
from picogpt.config import GPTConfig, TrainConfig
from picogpt.train import Trainer
from tests.conftest import TINY, needs_compiler, tiny_source

CONFIG = TrainConfig(optimizer="adamw", batch_size=2, windows=3, lr=1e-2)


def test_plain_loop_learns_the_same() -> None:
    """Our loop with AdamW in float32 and the plain one go through the same losses."""
    ours = Trainer(TINY, CONFIG, tiny_source(CONFIG), torch.float32)
    plain = PlainLoop(TINY, CONFIG, tiny_source(CONFIG))

    assert [plain.update(1e-2) for _ in range(4)] == pytest.approx([ours.update(1e-2) for _ in range(4)], abs=1e-4)


def test_flops() -> None:
    """One layer of width 2, windows of 1 and 3 ids: 2 slots a character of 6 x 48 + 12 x 2 x 2, and 36 for the head."""
    shape = GPTConfig(n_layer=1, n_head=1, n_embd=2, context_len=1, vocab_size=3)

    assert flops_per_char(shape) == 2 * (288 + 48) + 36


def test_launch() -> None:
    """Ranks are told who they are, and what rank 0 prints comes back."""
    code = "import os; print([float(os.environ[name]) for name in ('RANK', 'WORLD_SIZE')])"

    assert launch([[sys.executable, "-c", code]] * 2, "127.0.0.1") == [0, 2]


def test_turns() -> None:
    """Calls take turns, and each one's results stand together."""
    order: list[float] = []

    def call(value: float) -> float:
        order.append(value)
        return value

    assert in_turns(lambda: call(1), lambda: call(2)) == [[1] * 5, [2] * 5]
    assert order == [1, 2] * 5


def test_machine_names_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instructions of numpy's matrix products are printed beside those of torch."""
    libraries = [{"internal_api": "openblas", "architecture": "Haswell"}, {"internal_api": "mkl"}, {"internal_api": "openmp"}]
    monkeypatch.setattr(common, "threadpool_info", lambda: libraries)

    assert " (Haswell), torch " in machine()


@pytest.mark.parametrize(("target", "chars", "reached"), [(3.0, 60, True), (0.0, 100, False)])
def test_learning_ends_at_the_target(capsys: pytest.CaptureFixture[str], target: float, chars: int, reached: bool) -> None:
    """It ends at the first loss that is low enough, or at the length it was given; each validation is a line."""
    losses = iter([9.0, 4.0, 3.0, 2.0, 1.0])
    course = follow(lambda: 10, lambda: next(losses), target=target, every=20, most=100, name="x")

    assert (course.chars, course.reached) == (chars, reached)
    assert capsys.readouterr().out.count("characters in 0 s, validation loss") == chars // 20


@needs_compiler
def test_kernels_are_compared(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each direction, with a time for torch and one for C."""
    monkeypatch.setattr("benchmarks.kernels.REPEATS", 1)
    comparing(argparse.Namespace(batch_size=1))

    rows = re.findall(r"^\| ([a-z ]+) \| ([\d.]+) \| ([\d.]+) \|$", capsys.readouterr().out, re.M)
    assert [row[0] for row in rows] == ["forward", "forward and backward"]
