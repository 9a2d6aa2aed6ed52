"""Sequences on threads of their own: the same gradient, in a fixed order, and when it is done so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from picogpt.config import TrainConfig
from picogpt.training.concurrent import count_thread_groups, parallel_backward
from picogpt.training.state import TrainState
from picogpt.training.trainer import Trainer
from tests.conftest import TINY, tiny_source

CONFIG = TrainConfig(batch_size=4, windows=3)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trainer(dropout: float = 0.0) -> Trainer:
    """Training of a tiny model by torch's functions."""
    return Trainer(replace(TINY, dropout=dropout), CONFIG, tiny_source(CONFIG), torch.float32)


FULL = 129 * 256
"""Activations of one sequence's window in PicoGPT."""


@pytest.fixture
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model counts as large enough."""
    monkeypatch.setattr("picogpt.training.concurrent._MIN_ACTIVATIONS", 1)


@pytest.mark.parametrize(("sequences", "threads", "groups"), [(2, 2, 2), (2, 4, 2), (8, 2, 2), (1, 2, 1), (3, 2, 1), (2, 1, 1)])
def test_groups(sequences: int, threads: int, groups: int) -> None:
    """Every group has as many sequences as the others, and as many threads."""
    assert count_thread_groups(sequences, threads, FULL) == groups


def test_no_groups_for_a_small_model() -> None:
    """Its operations are too short to be worth a thread of Python each."""
    assert count_thread_groups(2, 2, 129 * 128) == 1


def test_no_groups_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's other kinds of threads are the whole process's."""
    monkeypatch.setattr(torch.__config__, "parallel_info", lambda: "ATen parallel backend: native thread pool")

    assert count_thread_groups(2, 2, FULL) == 1


def test_gradient_is_that_of_the_batch() -> None:
    """Loss and gradient of two halves on two threads are the whole batch's, and torch's threads are as before."""
    replica = TrainState(TINY, CONFIG, torch.float32)
    batch = tiny_source(CONFIG).train_batch(0)
    parameters = list(replica.model.parameters())
    expected = replica.loss(batch)
    gradients = torch.autograd.grad(expected, parameters)
    loss = parallel_backward(replica.loss, parameters, batch, 2)

    assert loss == pytest.approx(expected.item())
    assert torch.get_num_threads() == 2
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_every_thread_has_its_share() -> None:
    """Each group computes with its part of torch's threads, and on its part of the sequences."""
    seen: list[tuple[int, int]] = []
    weight = torch.ones((), requires_grad=True)

    def loss_of(batch: object) -> torch.Tensor:
        seen.append((torch.get_num_threads(), len(batch.inputs)))  # type: ignore[attr-defined]
        return weight * 3

    assert parallel_backward(loss_of, [weight], tiny_source(CONFIG).train_batch(0), 2) == 3.0
    assert seen == [(1, 2), (1, 2)]


def test_an_error_of_a_thread_is_raised() -> None:
    """What fails on a thread fails the step, and torch's threads are as before."""

    def loss_of(batch: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        parallel_backward(loss_of, [torch.ones(())], tiny_source(CONFIG).train_batch(0), 2)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("_any_size")
def test_training_is_reproducible() -> None:
    """Two runs have the same weights to the bit, and the losses of one that takes each step as a whole."""
    runs = [trainer(), trainer()]
    losses = [[run.train_step(1e-3) for _ in range(5)] for run in runs]
    whole = trainer()
    whole._compiled = True  # keeps it from threads, and is not looked at elsewhere in a step
    expected = [whole.train_step(1e-3) for _ in range(5)]

    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*(run.model.parameters() for run in runs), strict=True))
    assert losses[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("_any_size")
@pytest.mark.parametrize(("dropout", "threads", "used"), [(0.0, 2, True), (0.1, 2, False), (0.0, 1, False)])
def test_when(monkeypatch: pytest.MonkeyPatch, dropout: float, threads: int, used: bool) -> None:
    """Dropout draws in one order, so its steps are taken as a whole; so are those of a single thread."""
    calls: list[int] = []

    def watched(*given: object) -> float:
        calls.append(1)
        return parallel_backward(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("picogpt.training.state.parallel_backward", watched)
    torch.set_num_threads(threads)
    trainer(dropout=dropout).train_step(1e-3)

    assert bool(calls) == used
