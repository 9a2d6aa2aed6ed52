"""The learning rate as a table, and who gets weight decay."""

from __future__ import annotations

import pytest

from picogpt.config import TrainConfig
from picogpt.model import GPT
from picogpt.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate
from tests.conftest import TINY

FAST = TrainConfig(lr=1.0, warmup_steps=10)
SEED = TrainConfig.from_recipe("seed", {})


@pytest.mark.parametrize(
    ("config", "step", "total", "expected"),
    [
        (FAST, 0, 1000, 1 / 11),
        (FAST, 9, 1000, 10 / 11),
        (FAST, 10, 1000, 1.0),
        (FAST, 505, 1000, 0.5),
        (FAST, 999, 1000, 1 / 990),
        (FAST, 1000, 1000, 0.0),
        (FAST, 0, 1, 1.0),  # a run of one step has no warm-up
        (FAST, 1, 20, 2 / 3),  # warm-up is at most a tenth: 2 steps of 20
        (SEED, 0, 10, 6e-4 / 2001),
        (SEED, 2000, 10, 6e-4),
        (SEED, 301_000, 10, 3.3e-4),
        (SEED, 600_000, 10, 6e-5),
        (SEED, 900_000, 10, 6e-5),
    ],
)
def test_learning_rate(config: TrainConfig, step: int, total: int, expected: float) -> None:
    """Step, length of the run and rate, worked out by hand."""
    assert learning_rate(step, total, config) == pytest.approx(expected, rel=1e-9)


def test_weight_decay_is_for_matrices() -> None:
    """Matrices and embeddings decay, biases and norms do not, and every parameter is in one group."""
    model = GPT(TINY)
    decayed, others = parameter_groups(model, 0.1)

    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_settings_reach_the_optimizer() -> None:
    """Betas and learning rate of every group."""
    optimizer = build_optimizer(GPT(TINY), TrainConfig(beta1=0.8, beta2=0.9))
    set_learning_rate(optimizer, 0.125)

    assert [(group["betas"], group["lr"]) for group in optimizer.param_groups] == [((0.8, 0.9), 0.125)] * 2
