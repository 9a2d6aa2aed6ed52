"""Both forms of attention against its definition, and the choice between them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from picogpt.config import GPTConfig
from picogpt.device import CPU
from picogpt.model.attention import causal_attention, causal_mask, choose_attention

BOTH = pytest.mark.parametrize("form", ["fused", "products"])


def mask_of(form: str, n_slots: int) -> Tensor | None:
    """How `causal_attention` is told the form."""
    return causal_mask(n_slots) if form == "products" else None


def by_definition(qkv: Tensor, n_head: int, keep: Tensor | float = 1.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over what came before, head by head; with dropout `keep` has the factors of the weights."""
    batch, n_slots, width = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    q, k, v = (part.reshape(batch, n_slots, n_head, -1).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    weights = (q @ k.mT / math.sqrt(q.size(-1)) + causal_mask(n_slots).to(qkv.dtype)).softmax(-1)
    read: Tensor = ((weights * keep) @ v).transpose(1, 2).reshape(batch, n_slots, width)
    return read


@BOTH
@pytest.mark.parametrize("n_slots", [1, 2, 17, 129])
def test_equals_its_definition(form: str, n_slots: int) -> None:
    """Outputs and gradients, in double precision."""
    torch.manual_seed(n_slots)
    qkv = torch.randn(2, n_slots, 3 * 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, n_slots, 12, dtype=torch.float64)
    found, expected = causal_attention(qkv, mask_of(form, n_slots), 3), by_definition(qkv, 3)

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, qkv, upstream)[0] for y in (found, expected)))


@BOTH
@pytest.mark.parametrize("n_slots", [1, 20, 129])
def test_bfloat16(form: str, n_slots: int) -> None:
    """Outputs and gradients are close to float32's, in the type that came in, under autocast too."""
    torch.manual_seed(0)
    qkv, upstream = torch.randn(2, n_slots, 24).bfloat16(), torch.randn(2, n_slots, 8).bfloat16()
    precise, rough = qkv.float().requires_grad_(), qkv.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = causal_attention(rough, mask_of(form, n_slots), 2)
    expected = by_definition(precise, 2)

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
    keep = torch.rand(6, 9, 9, dtype=torch.float64).gt(0.4) / 0.6
    monkeypatch.setattr("picogpt.model.attention.keep_mask", lambda _like, _p: keep)
    qkv = torch.randn(2, 9, 3 * 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 9, 12, dtype=torch.float64)
    found = causal_attention(qkv, causal_mask(9), 3, dropout=0.4)
    expected = by_definition(qkv, 3, keep=keep.view(2, 3, 9, 9))

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, qkv, upstream)[0] for y in (found, expected)))


@pytest.mark.parametrize(
    ("config", "device", "ratio", "expected"),
    [
        (GPTConfig(), CPU, 1.29, ("fused", "products of matrices run at 1.3 times its speed")),
        (GPTConfig(), CPU, 1.31, ("products", "1.3 times as fast as torch's fused function")),
        (GPTConfig(dropout=0.1), CPU, 0.5, ("products", "fast dropout of attention weights")),
        (GPTConfig(), torch.device("cuda"), 0.5, ("products", "reproducible gradients on a GPU")),
    ],
    ids=["as fast", "faster", "dropout", "GPU"],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, config: GPTConfig, device: torch.device, ratio: float, expected: tuple[str, str]
) -> None:
    """The products have to be well ahead on a CPU; where clocks do not decide they are taken for what they do."""
    monkeypatch.setattr("picogpt.model.attention._products_speedup", lambda *_: ratio)

    assert choose_attention(config, 2, torch.float32, device) == expected


@pytest.mark.parametrize("slow", ["fused", "products"])
def test_choice_is_timed(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    """The form that takes less time, forward and backward, is the one that is chosen."""
    clock = [0.0]

    def attention(qkv: Tensor, mask: Tensor | None, n_head: int) -> Tensor:
        clock[0] += 2.0 if (mask is None) == (slow == "fused") else 1.0
        return qkv * 2

    monkeypatch.setattr("picogpt.model.attention.causal_attention", attention)
    monkeypatch.setattr("picogpt.device.time.perf_counter", lambda: clock[0])

    form, _ = choose_attention(GPTConfig(), 2, torch.float32, CPU)
    assert form == ("products" if slow == "fused" else "fused")
