"""Attention in halves against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from picogpt.attention import causal_attention


def mask_of(n_slots: int) -> Tensor:
    """0 where a row may look, -inf elsewhere."""
    return torch.full((n_slots, n_slots), -torch.inf).triu(1)


def by_definition(qkv: Tensor, n_head: int, keep: Tensor | float = 1.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over what came before, head by head; with dropout `keep` has the factors of the weights."""
    batch, n_slots, width = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    q, k, v = (part.reshape(batch, n_slots, n_head, -1).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    weights = (q @ k.mT / math.sqrt(q.size(-1)) + mask_of(n_slots).to(qkv.dtype)).softmax(-1)
    read: Tensor = ((weights * keep) @ v).transpose(1, 2).reshape(batch, n_slots, width)
    return read


@pytest.mark.parametrize("n_slots", [1, 2, 3, 16, 17, 129])
def test_equals_its_definition(n_slots: int) -> None:
    """Outputs and gradients, in double precision."""
    torch.manual_seed(n_slots)
    qkv = torch.randn(2, n_slots, 3 * 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, n_slots, 12, dtype=torch.float64)
    found, expected = causal_attention(qkv, mask_of(n_slots), 3), by_definition(qkv, 3)

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, qkv, upstream)[0] for y in (found, expected)))


def test_gradient_by_differences() -> None:
    """The backward pass is the derivative of the forward pass."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 5, 12, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x: causal_attention(x, mask_of(5), 2), qkv)


@pytest.mark.parametrize("n_slots", [1, 2, 20, 129])
def test_bfloat16(n_slots: int) -> None:
    """Outputs and gradients are close to float32's, in the type that came in."""
    torch.manual_seed(0)
    qkv, upstream = torch.randn(2, n_slots, 24).bfloat16(), torch.randn(2, n_slots, 8).bfloat16()
    precise, rough = qkv.float().requires_grad_(), qkv.clone().requires_grad_()
    found, expected = causal_attention(rough, mask_of(n_slots), 2), by_definition(precise, 2)

    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
    of_found, of_expected = (
        torch.autograd.grad(found, rough, upstream)[0],
        torch.autograd.grad(expected, precise, upstream.float())[0],
    )
    assert of_found.dtype == torch.bfloat16
    torch.testing.assert_close(of_found.float(), of_expected, atol=0.1, rtol=0.05)


def test_dropout_by_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that the masks leave out are left out after the softmax, forward and backward."""
    torch.manual_seed(0)
    mask = torch.rand(6, 9, 9, dtype=torch.float64).gt(0.4) / 0.6
    drawn = iter([mask[:, :5, :5], mask[:, 5:]])
    monkeypatch.setattr("picogpt.attention.keep_mask", lambda _like, _p: next(drawn))
    qkv = torch.randn(2, 9, 3 * 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 9, 12, dtype=torch.float64)
    found = causal_attention(qkv, mask_of(9), 3, dropout=0.4)
    expected = by_definition(qkv, 3, keep=mask.view(2, 3, 9, 9))

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, qkv, upstream)[0] for y in (found, expected)))


def test_knows_no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The types inside are those of what comes in: a GPU's autocast would make the softmax float32."""
    seen: list[bool] = []

    def parts(n_slots: int, dtype: torch.dtype) -> list[tuple[int, int]]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return [(0, n_slots)]

    monkeypatch.setattr("picogpt.attention._parts", parts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        causal_attention(torch.randn(1, 4, 12), mask_of(4), 2)

    assert seen == [False]
