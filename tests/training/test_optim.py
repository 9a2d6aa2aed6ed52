"""The learning rate as a table, who gets which optimizer, and Muon from its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from picogpt.config import TrainConfig
from picogpt.errors import ConfigError
from picogpt.model.gpt import GPT
from picogpt.schedule import fraction_of_peak, learning_rate
from picogpt.training.optim import Muon, build_optimizers, orthogonalize, set_learning_rate
from picogpt.training.trainer import Trainer
from tests.conftest import TINY, tiny_source

FAST = TrainConfig(lr=0.1, warmup_steps=10)
SEED = TrainConfig.from_recipe("seed", {})


@pytest.mark.parametrize(
    ("config", "step", "total", "expected"),
    [
        (FAST, 0, 1000, 0.1 / 11),
        (FAST, 9, 1000, 1 / 11),
        (FAST, 10, 1000, 0.1),
        (FAST, 505, 1000, 0.05),
        (FAST, 999, 1000, 0.1 / 990),
        (FAST, 1000, 1000, 0.0),
        (FAST, 0, 1, 0.1),  # a run of one step has no warm-up
        (FAST, 1, 20, 0.2 / 3),  # warm-up is at most a tenth: 2 steps of 20
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


@pytest.mark.parametrize(
    ("step", "start", "done", "expected"),
    [
        (20, 20, 0.25, 0.075),  # a quarter of the decay was done by step 20
        (60, 20, 0.25, 0.0375),  # half way from there to step 100
        (99, 20, 0.25, 0.1 * 0.75 / 80),
        (100, 20, 0.25, 0.0),
        (4, 9, 0.0, 0.05),  # the warm-up of a plan that was changed during it
        (9, 9, 0.0, 0.1),
    ],
)
def test_learning_rate_of_a_changed_plan(step: int, start: int, done: float, expected: float) -> None:
    """From where the plan was changed the rate falls in a straight line to zero at step 100."""
    assert learning_rate(step, 100, FAST, decay_start=start, decay_done=done) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rate", [1.0, 3.1e-3, -1e-9, math.nan, math.inf])
def test_a_share_is_no_rate(rate: float) -> None:
    """A rate above the highest one, such as a share of it, is rejected before it reaches the weights."""
    config = TrainConfig(batch_size=2, windows=3)
    trainer = Trainer(TINY, config, tiny_source(config), torch.float32)
    before = {name: array.copy() for name, array in trainer.model.arrays().items()}

    with pytest.raises(
        ConfigError, match=r"learning rate of a step must be from 0 to the config's lr \(0.003\), got .* not a fraction"
    ):
        trainer.train_step(rate)
    assert all((before[name] == array).all() for name, array in trainer.model.arrays().items())


def test_share_of_peak() -> None:
    """Half of the highest rate is half of every group's; the highest one is all of it."""
    assert fraction_of_peak(1.5e-3, TrainConfig()) == 0.5
    assert fraction_of_peak(3e-3, TrainConfig()) == 1.0


def test_every_parameter_has_one_optimizer() -> None:
    """Muon holds the blocks' matrices, AdamW the rest; matrices and embeddings decay, biases and norms do not."""
    model = GPT(TINY)
    adamw, muon = build_optimizers(model, TrainConfig(weight_decay=0.1, muon_interval=2), torch.float32)
    embeddings, others = (group["params"] for group in adamw.param_groups)
    turns = [group["params"] for group in muon.param_groups]
    matrices = [*turns[0], *turns[1]]

    assert [group["weight_decay"] for optimizer in (adamw, muon) for group in optimizer.param_groups] == [0.1, 0.0, 0.1, 0.1]
    assert [len(turn) for turn in turns] == [4, 4]
    assert [(group["interval"], group["phase"]) for group in muon.param_groups] == [(2, 0), (2, 1)]
    assert turns[1][0] is dict(model.named_parameters())["transformer.h.1.attn.c_attn.weight"]
    assert len(matrices) == 4 * TINY.n_layer
    assert len(embeddings) == 2
    assert all(p.dim() == 1 for p in others)
    assert {id(p) for p in (*matrices, *embeddings, *others)} == {id(p) for p in model.parameters()}
    assert len(matrices) + len(embeddings) + len(others) == len(list(model.parameters()))


def test_adamw_alone() -> None:
    """With `adamw` there is one optimizer, and it holds everything."""
    model = GPT(TINY)
    (adamw,) = build_optimizers(model, TrainConfig(optimizer="adamw"), torch.float32)

    assert isinstance(adamw, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(list(model.parameters()))


def test_settings_reach_the_optimizers() -> None:
    """Betas, momentum, and a learning rate that is the same share of each peak."""
    config = TrainConfig(beta1=0.8, beta2=0.9, momentum=0.7, muon_interval=3)
    optimizers = build_optimizers(GPT(TINY), config, torch.float32)
    set_learning_rate(optimizers, 0.5)
    (embeddings, others), (matrices, *_) = (optimizer.param_groups for optimizer in optimizers)

    assert embeddings["betas"] == others["betas"] == (0.8, 0.9)
    assert (matrices["momentum"], matrices["interval"]) == (0.7, 3)
    assert [group["lr"] for group in (embeddings, others, matrices)] == [1.5e-3, 1.5e-3, 0.01]


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 24, 96)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.bfloat16, 0.15)])
def test_orthogonalize(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """Singular values become about 1 and singular vectors stay, whatever the scale and however the values differ."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -2, 24)
    matrices = 1e-3 * u * values @ v
    found = u.mT @ orthogonalize(matrices, dtype).float() @ v.mT

    diagonal = found.diagonal(dim1=1, dim2=2)
    assert orthogonalize(matrices, dtype).dtype == dtype
    assert 0.8 - tolerance < diagonal.min()
    assert diagonal.max() < 1.2 + tolerance
    assert (found - torch.diag_embed(diagonal)).abs().max() < 1e-3 + tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_one_direction_above_all(dtype: torch.dtype) -> None:
    """Entries of one sign: a singular value fifty times the others, whose product with itself rounds theirs away in bfloat16."""
    torch.manual_seed(0)

    assert torch.linalg.svdvals(orthogonalize(torch.rand(2, 256, 1024), dtype).float()).max() < 1.2


@pytest.mark.parametrize("smallest", [-3, -2, -1, 0])
@pytest.mark.parametrize("shape", [(8, 24, 24), (8, 24, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_never_runs_away(smallest: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """However small some singular values are, none comes out far above 1."""
    for seed in range(5):
        torch.manual_seed(seed)
        u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        values = torch.linalg.svdvals(orthogonalize(u * torch.logspace(0, smallest, 24) @ v, dtype).float())
        assert values.max() < 1.25


def test_a_gradient_of_zero() -> None:
    """It gives no update, and no division by zero."""
    assert not orthogonalize(torch.zeros(1, 4, 8), torch.float32).any()
    assert torch.equal(muon_step(torch.ones(4, 8), [torch.zeros(4, 8)]), torch.ones(4, 8))


def muon_step(weight: torch.Tensor, gradients: list[torch.Tensor], **settings: Any) -> torch.Tensor:
    """What a weight becomes over some steps of Muon."""
    parameter = torch.nn.Parameter(weight.clone())
    muon = Muon([parameter], lr=0.1, dtype=torch.float32, **settings)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        muon.step()
    return parameter.detach()


def test_muon_by_hand() -> None:
    """Two steps from the definition: mean gradient with a look ahead, orthogonal, evened out by rows, decayed."""
    torch.manual_seed(1)
    weight, gradients = torch.randn(12, 6), [torch.randn(12, 6) for _ in range(2)]
    found = muon_step(weight, gradients, momentum=0.9, beta2=0.8, weight_decay=0.5)
    expected, mean, square = weight.clone(), torch.zeros(12, 6), torch.zeros(12, 1)
    for gradient in gradients:
        mean = 0.9 * mean + 0.1 * gradient
        update = orthogonalize((0.1 * gradient + 0.9 * mean).T[None], torch.float32)[0].T * math.sqrt(2)
        square = 0.8 * square + 0.2 * update.square().mean(1, keepdim=True)
        even = update / square.sqrt()
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * even * update.norm() / even.norm()

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_muon_in_every_second_step() -> None:
    """A matrix out of turn only takes up its gradient; in turn it goes twice as far, and decays twice."""
    torch.manual_seed(4)
    weight, gradients = torch.randn(6, 6), [torch.randn(6, 6) for _ in range(3)]
    first, second = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    groups = [{"params": [first], "phase": 0}, {"params": [second], "phase": 1}]
    muon = Muon(groups, lr=0.1, momentum=0.9, weight_decay=0.5, interval=2, dtype=torch.float32)
    found = []
    for gradient in gradients:
        first.grad, second.grad = gradient.clone(), gradient.clone()
        muon.step()
        found.append((first.detach().clone(), second.detach().clone()))
    mean = 0.9 * 0.1 * gradients[0] + 0.1 * gradients[1]
    update = orthogonalize((0.1 * gradients[1] + 0.9 * mean)[None], torch.float32)[0]
    even = update / update.square().mean(1, keepdim=True).sqrt()
    expected = (1 - 0.2 * 0.5) * weight - 0.2 * even * update.norm() / even.norm()

    assert torch.equal(found[0][0], weight)
    torch.testing.assert_close(found[1][0], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[2][0], found[1][0])
    assert not torch.equal(found[0][1], weight)
    assert torch.equal(found[1][1], found[0][1])
    assert not torch.equal(found[2][1], found[1][1])


def test_muon_takes_qkv_for_three() -> None:
    """A matrix for queries, keys and values becomes what each part would become by itself."""
    torch.manual_seed(2)
    weight, gradients = torch.randn(18, 6), [torch.randn(18, 6) for _ in range(2)]
    alone = [
        muon_step(part, list(of_part)) for part, *of_part in zip(weight.chunk(3), *(g.chunk(3) for g in gradients), strict=True)
    ]

    torch.testing.assert_close(muon_step(weight, gradients), torch.cat(alone))


def test_muon_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many matrices are updated together changes nothing."""
    results = []
    for at_once in (1, 2**20):
        monkeypatch.setattr("picogpt.training.optim._MAX_BATCH_ELEMENTS", at_once)
        torch.manual_seed(3)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 6), (6, 6), (12, 6), (6, 12), (18, 6))]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        Muon(parameters, lr=0.1, dtype=torch.float32).step()
        results.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))

    torch.testing.assert_close(*results)
