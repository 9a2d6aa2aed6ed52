"""The model against the vectors of the original rule, its size, its start and its gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from picogpt.config import GPTConfig
from picogpt.errors import RunError
from picogpt.model.gpt import GPT
from tests.conftest import TINY

Vectors = dict[str, npt.NDArray[Any]]
SMALL = GPTConfig(n_layer=2, n_head=4, n_embd=32, context_len=16)
LENGTHS = [1, 7, 16, 17, 32, 53, 160]


@pytest.fixture(scope="module")
def small(roll_vectors: Vectors) -> GPT:
    """The model of the vectors."""
    model = GPT(SMALL)
    model.load_arrays({name.removeprefix("w/"): array for name, array in roll_vectors.items() if name.startswith("w/")})
    return model.eval()


@pytest.mark.parametrize("n", LENGTHS)
def test_logits_and_loss(small: GPT, roll_vectors: Vectors, n: int) -> None:
    """Every character's prediction to 1e-4, and the mean loss over all of them, each counted once, to 1e-5."""
    idx, targets = (torch.from_numpy(roll_vectors[f"{part}/{n}"]) for part in ("idx", "targets"))

    logits, loss = small(idx, targets)

    assert logits.shape == (2, n, 88)
    assert loss is not None
    np.testing.assert_allclose(logits.detach().numpy(), roll_vectors[f"logits/{n}"], atol=1e-4, rtol=0)
    assert loss.item() == pytest.approx(float(roll_vectors[f"mean_loss/{n}"]), abs=1e-5)


@pytest.mark.parametrize("n", LENGTHS)
def test_last_logits(small: GPT, roll_vectors: Vectors, n: int) -> None:
    """Without targets, the last character's prediction alone."""
    logits, loss = small(torch.from_numpy(roll_vectors[f"idx/{n}"]))

    assert logits.shape == (2, 1, 88)
    assert loss is None
    np.testing.assert_allclose(logits[:, 0].detach().numpy(), roll_vectors[f"last_logits/{n}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("n", LENGTHS)
def test_context_vectors(small: GPT, roll_vectors: Vectors, n: int) -> None:
    """The context vector of every window is the mean of its outputs, the context slot included."""
    contexts = torch.stack([context for _, context in small.roll(torch.from_numpy(roll_vectors[f"idx/{n}"]))], dim=1)

    np.testing.assert_allclose(contexts.detach().numpy(), roll_vectors[f"context/{n}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("n", [1, 7, 16, 17, 32, 53])
def test_prefix_logits(small: GPT, roll_vectors: Vectors, n: int) -> None:
    """Windows cut anew for every prefix: what the original's generation sees at each step."""
    ids = torch.from_numpy(roll_vectors[f"idx/{n}"][:1])
    rows = torch.cat([small(ids[:, :t])[0][:, 0] for t in range(1, n + 1)])

    np.testing.assert_allclose(rows.detach().numpy(), roll_vectors[f"prefix_logits/{n}"], atol=1e-4, rtol=0)


def test_parameter_counts() -> None:
    """789,760 a block, 6,374,144 in all, 6,341,120 without positions."""
    model = GPT(GPTConfig())

    assert sum(p.numel() for p in model.transformer.h[0].parameters()) == 789_760
    assert model.num_params() == 6_374_144
    assert model.num_params(positions=False) == 6_341_120


def test_state_dict_names_are_nanogpts(roll_vectors: Vectors) -> None:
    """The names are those of the vectors, the tied head included."""
    assert set(GPT(SMALL).state_dict()) == {name.removeprefix("w/") for name in roll_vectors if name.startswith("w/")}


def test_initial_weights() -> None:
    """Normal 0.02, residual projections 0.02 / sqrt(16), biases 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig())

    assert model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03)
        if name.endswith("bias"):
            assert not parameter.any()


def test_first_loss() -> None:
    """An untrained model is about as unsure as a guess among 88 ids."""
    torch.manual_seed(1337)
    idx = torch.randint(1, 75, (4, 257))

    _, loss = GPT(GPTConfig())(idx[:, :-1], idx[:, 1:])

    assert loss is not None
    assert loss.item() == pytest.approx(math.log(88), abs=0.1)


def test_gradient_reaches_the_first_window() -> None:
    """The last window's loss moves the first window's characters, and only through the context vector."""
    torch.manual_seed(0)
    model = GPT(TINY)
    only_in_first_window = 5
    idx = torch.full((1, 24), 7)
    idx[0, 0] = only_in_first_window
    outputs = [h for h, _ in model.roll(idx)]

    outputs[-1].square().sum().backward()  # type: ignore[no-untyped-call]

    gradient = model.transformer.wte.weight.grad
    assert gradient is not None
    assert gradient[only_in_first_window].abs().max() > 0


def test_without_biases() -> None:
    """`bias=False` leaves no bias anywhere."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, context_len=8, bias=False))

    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]


def test_dropout_acts_in_training_only() -> None:
    """With dropout two passes differ in training and agree in evaluation."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, context_len=8, dropout=0.5))
    idx = torch.arange(8)[None]

    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.wpe.weight": np.zeros((5, 32), np.float32)}, r"wpe.weight should have shape \(17, 32\), got \(5, 32\)"),
        ({"surplus": np.zeros(1, np.float32)}, r"surplus should have shape none, got \(1,\)"),
    ],
    ids=["other shape", "unknown name"],
)
def test_load_refuses_other_weights(roll_vectors: Vectors, change: Vectors, message: str) -> None:
    """Weights of another model are refused by name and shape, and nothing is changed."""
    model = GPT(SMALL)
    before = model.transformer.wte.weight.clone()
    weights = {name.removeprefix("w/"): array for name, array in roll_vectors.items() if name.startswith("w/")}

    with pytest.raises(RunError, match=message):
        model.load_arrays({**weights, **change})

    assert torch.equal(model.transformer.wte.weight, before)
