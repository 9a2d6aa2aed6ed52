"""Both forms of attention against its definition, and the choice between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from picogpt.config import GPTConfig
from picogpt.device import CPU
from picogpt.model.attention import FORMS, choose_attention
from picogpt.model.gpt import Attend, CausalSelfAttention

Triple = tuple[Tensor, Tensor, Tensor]

BOTH = pytest.mark.parametrize("form", FORMS)


def by_definition(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | float = 1.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over what came before, head by head; with dropout `keep` has the factors of the weights."""
    mask = torch.full((q.size(2), q.size(2)), -torch.inf, dtype=q.dtype).triu(1)
    weights = (q @ k.mT / math.sqrt(q.size(-1)) + mask).softmax(-1)
    return (weights * keep) @ v


def heads(n_slots: int, n_head: int, head_size: int) -> tuple[Triple, Tensor]:
    """Random q, k and v of two sequences in double precision, and a gradient of what attention makes of them."""
    torch.manual_seed(n_slots)
    q, k, v, upstream = torch.randn(4, 2, n_head, n_slots, head_size, dtype=torch.float64).unbind()
    qkv = (q.clone().requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_())
    return qkv, upstream


def assert_same(found: Tensor, expected: Tensor, inputs: Sequence[Tensor], upstream: Tensor) -> None:
    """Outputs and the gradients of q, k and v are close."""
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, inputs, upstream) for y in (found, expected)))


@BOTH
@pytest.mark.parametrize("n_slots", [1, 2, 17, 129])
def test_equals_its_definition(form: str, n_slots: int) -> None:
    """Outputs and gradients, in double precision."""
    qkv, upstream = heads(n_slots, 3, 4)

    assert_same(FORMS[form](*qkv, 0.0), by_definition(*qkv), qkv, upstream)


@BOTH
@pytest.mark.parametrize("n_slots", [1, 2, 17, 129])
def test_module_with_and_without(form: str, n_slots: int) -> None:
    """The module's own formula gives what each fast form gives in its place."""
    torch.manual_seed(n_slots)
    module = CausalSelfAttention(GPTConfig(n_layer=1, n_head=3, n_embd=12, context_len=128)).double()
    x = torch.randn(2, n_slots, 12, dtype=torch.float64, requires_grad=True)

    assert_same(module(x, FORMS[form]), module(x), [x, *module.parameters()], torch.randn_like(x))


@BOTH
@pytest.mark.parametrize("n_slots", [1, 20, 129])
def test_bfloat16(form: str, n_slots: int) -> None:
    """Outputs and gradients are close to float32's, in the type that came in, under autocast too."""
    torch.manual_seed(0)
    q, k, v, upstream = torch.randn(4, 2, 2, n_slots, 4).bfloat16()
    rough, precise = [[x.detach().to(dtype).requires_grad_() for x in (q, k, v)] for dtype in (torch.bfloat16, torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = FORMS[form](rough[0], rough[1], rough[2], 0.0)
    expected = by_definition(precise[0], precise[1], precise[2])

    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
    of_found = torch.autograd.grad(found, rough, upstream)
    of_expected = torch.autograd.grad(expected, precise, upstream.float())
    for mine, theirs in zip(of_found, of_expected, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), theirs, atol=0.1, rtol=0.05)


def test_dropout_by_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that the masks leave out are left out after the softmax, forward and backward."""
    torch.manual_seed(0)
    keep = torch.rand(6, 9, 9, dtype=torch.float64).gt(0.4) / 0.6
    monkeypatch.setattr("picogpt.model.attention.keep_mask", lambda _like, _p: keep)
    qkv, upstream = heads(9, 3, 4)

    assert_same(FORMS["products"](*qkv, 0.4), by_definition(*qkv, keep.view(2, 3, 9, 9)), qkv, upstream)


def test_dropout_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training the module's own formula draws what the products draw; in evaluation neither draws anything."""
    module = CausalSelfAttention(GPTConfig(n_layer=1, n_head=2, n_embd=8, context_len=8, dropout=0.5))
    x = torch.randn(2, 9, 8)
    outputs = []
    for attend in (None, FORMS["products"]):
        torch.manual_seed(1)
        outputs.append(module(x, attend))
    torch.testing.assert_close(*outputs)
    monkeypatch.setattr("picogpt.model.attention.keep_mask", None)
    monkeypatch.setattr("picogpt.model.dropout.keep_mask", None)
    module.eval()

    torch.testing.assert_close(module(x), module(x, FORMS["products"]))


@pytest.mark.parametrize(
    ("config", "device", "ratio", "expected"),
    [
        (GPTConfig(), CPU, 1.29, ("fused", "products of matrices run at 1.29 times its speed")),
        (GPTConfig(), CPU, 1.31, ("products", "1.31 times as fast as torch's fused function")),
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

    def attention(form: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
            clock[0] += 2.0 if form == slow else 1.0
            return q + k + v

        return attend

    for form in ("fused", "products"):
        monkeypatch.setitem(FORMS, form, attention(form))
    monkeypatch.setattr("picogpt.device.time.perf_counter", lambda: clock[0])

    form, _ = choose_attention(GPTConfig(), 2, torch.float32, CPU)
    assert form == ("products" if slow == "fused" else "fused")
