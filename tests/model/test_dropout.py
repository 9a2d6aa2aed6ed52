"""Dropout's masks and the layer that uses them."""

from __future__ import annotations

import pytest
import torch

from picogpt.model.dropout import Dropout, keep_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_share_and_scale(p: float, dtype: torch.dtype) -> None:
    """Zeros where activations are dropped, as many as asked for; the rest makes up for them."""
    torch.manual_seed(0)
    n = 1_000_000
    mask = keep_mask(torch.empty(n, dtype=dtype), p)
    dropped = mask.eq(0)

    assert mask.dtype == dtype
    assert mask[~dropped].eq(torch.tensor(1 / (1 - p), dtype=dtype)).all()
    assert abs(dropped.sum().item() - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def test_places_are_independent() -> None:
    """What is drawn together decides no two places alike: neighbours agree as often as chance has it."""
    torch.manual_seed(0)
    mask = keep_mask(torch.empty(1_000_000), 0.5)

    for distance in (1, 2, 3, 4, 8):
        alike = mask[distance:].eq(mask[:-distance]).double().mean().item()
        assert abs(alike - 0.5) < 5 * 0.5 / 1000


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5, 7)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    """Sizes that four does not divide, and what is not contiguous."""
    assert keep_mask(torch.empty(shape), 0.5).shape == shape
    assert keep_mask(torch.empty(shape).mT if len(shape) > 1 else torch.empty(shape), 0.5).is_contiguous()


def test_no_chance_drops_nothing() -> None:
    """The smallest draw stays too."""
    assert keep_mask(torch.empty(1_000_000), 1e-9).eq(1).all()


def test_near_certainty_drops_nearly_everything() -> None:
    """The largest probability that can be asked for does not begin anew at none."""
    torch.manual_seed(0)

    assert keep_mask(torch.empty(1_000_000), 1 - 1e-9).eq(0).double().mean() > 0.9999


def test_layer() -> None:
    """It acts in training only, the same way for the same seed, on the gradient as on the value."""
    layer, x = Dropout(0.5), torch.ones(64, requires_grad=True)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)

    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], first.detach())
    assert torch.equal(layer.eval()(x), x)
    assert Dropout(0.0)(x) is x
