"""Each condition against the model called in its plainest way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from picogpt.config import GPTConfig
from picogpt.evaluate import chars_to_read, evaluate
from picogpt.model import GPT
from picogpt.scores import CONDITIONS, Losses, Rolls
from tests.conftest import TINY

WINDOWS = 3
N = TINY.context_len


@pytest.fixture(scope="module")
def model() -> GPT:
    """A model whose weights are large enough that its context vector matters."""
    torch.manual_seed(0)
    model = GPT(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model.eval()


@pytest.fixture(scope="module")
def rolls() -> Rolls:
    """Five rolls of two articles."""
    ids = np.random.Generator(np.random.Philox(1)).integers(1, 75, (5, WINDOWS * N + 1), dtype=np.uint8)
    return Rolls(ids, np.array([0, 0, 1, 1, 1]))


@pytest.fixture(scope="module")
def losses(model: GPT, rolls: Rolls) -> dict[str, Losses]:
    """What is tested."""
    return evaluate(model, rolls, batch_size=2, advance=lambda _: None)


def nats(logits: Tensor, targets: Tensor) -> Losses:
    """Losses (n,) of logits (n, V)."""
    return np.asarray(F.cross_entropy(logits, targets, reduction="none").detach().numpy(), np.float32)


def row(rolls: Rolls, i: int) -> Tensor:
    """Ids (1, T + 1) of one roll."""
    return torch.from_numpy(rolls.ids[i : i + 1].astype(np.int64))


def test_as_is_is_the_loss_of_training(model: GPT, rolls: Rolls, losses: dict[str, Losses]) -> None:
    """Character by character, what the model gives for the whole roll."""
    for i in range(5):
        idx = row(rolls, i)
        logits, loss = model(idx[:, :-1], idx[:, 1:])

        np.testing.assert_allclose(losses["as_is"][i].reshape(-1), nats(logits[0], idx[0, 1:]), atol=1e-5)
        assert loss is not None
        assert losses["as_is"][i].mean() == pytest.approx(loss.item(), abs=1e-5)


def test_zeroed_is_each_window_alone(model: GPT, rolls: Rolls, losses: dict[str, Losses]) -> None:
    """A text of one window starts from the zero vector."""
    for i in range(5):
        for start in range(0, WINDOWS * N, N):
            idx = row(rolls, i)[:, start : start + N + 1]
            alone = nats(model(idx[:, :-1], idx[:, 1:])[0][0], idx[0, 1:])
            np.testing.assert_allclose(losses["zeroed"][i, start // N], alone, atol=1e-5)
    assert np.abs(losses["zeroed"] - losses["as_is"])[:, 1:].max() > 0.01


def test_other_takes_the_vectors_of_the_partner(model: GPT, rolls: Rolls, losses: dict[str, Losses]) -> None:
    """Window i starts from what window i - 1 of a roll of the other article put out."""
    for i, partner in enumerate([2, 3, 0, 1, 0]):
        contexts = [context for _, context in model.roll(row(rolls, partner)[:, :-1])]
        for window in range(1, WINDOWS):
            idx = row(rolls, i)[:, window * N : (window + 1) * N + 1]
            logits = model.lm_head(model.transformer(idx[:, :-1], contexts[window - 1]))[0, 1:]
            np.testing.assert_allclose(losses["other"][i, window], nats(logits, idx[0, 1:]), atol=1e-5)
    np.testing.assert_array_equal(losses["other"][:, 0], losses["as_is"][:, 0])


def test_sliding_scores_the_newest_half(model: GPT, rolls: Rolls, losses: dict[str, Losses]) -> None:
    """Each character but those of the first window comes from a window alone that shows at least half a window before it."""
    for i in range(5):
        for target in range(N, WINDOWS * N):
            start = (target - N // 2) // (N // 2) * (N // 2)
            idx = row(rolls, i)[:, start : start + N + 1]
            alone = nats(model(idx[:, :-1], idx[:, 1:])[0][0], idx[0, 1:])
            assert losses["sliding"][i].reshape(-1)[target] == pytest.approx(alone[target - start], abs=1e-5)


@pytest.mark.parametrize("context_len", [1, 3, 8])
def test_any_window(context_len: int) -> None:
    """Each loss is written, whatever the window; progress counts what it says beforehand; batches change nothing."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, context_len=context_len)
    model = GPT(config)
    rolls = Rolls(np.ones((3, 2 * context_len + 1), np.uint8), np.array([0, 0, 1]))
    told: list[int] = []
    found = evaluate(model, rolls, batch_size=2, advance=told.append)
    whole = evaluate(model, rolls, batch_size=16, advance=lambda _: None)

    assert found.keys() == CONDITIONS.keys()
    assert sum(told) == chars_to_read(rolls, context_len)
    for name, values in found.items():
        assert values.shape == (3, 2, context_len)
        np.testing.assert_allclose(values, whole[name], atol=1e-5)
        assert np.abs(values - np.log(88)).max() < 0.5
