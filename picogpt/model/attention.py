"""Fast forms of causal attention in torch, and the choice between them. The definition is in `picogpt.model.gpt`.

`fused` is torch's `scaled_dot_product_attention`. `products` are two batched matrix products with a softmax between them:
on a CPU that computes in bfloat16 the fused form's backward pass can take several times as long. In float32 the two are close.

Dimensions: B sequences in a batch, S slots of a window, H heads, D entries of a head.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from picogpt.config import GPTConfig
from picogpt.device import speedup
from picogpt.model.dropout import keep_mask
from picogpt.model.gpt import Attend

__all__ = ["FORMS", "choose_attention"]

_MIN_SPEEDUP = 1.3
"""Speedup from which `products` is chosen: with a margin, so that two starts on one machine choose alike."""


def _fused(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Compute attention by torch's fused function: q, k, v (B, H, S, D) -> (B, H, S, D)."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def _products(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Compute attention by batched matrix products: q, k, v (B, H, S, D) -> (B, H, S, D)."""
    shape, n_slots = q.shape, q.size(2)
    # baddbmm and bmm take one batch dimension, so batch and heads become one.
    q, k, v = (part.reshape(-1, n_slots, part.size(3)) for part in (q, k, v))  # (B * H, S, D)
    # The GEMM itself adds the mask: 0 on and below the diagonal, -inf above it.
    mask = torch.full((n_slots, n_slots), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    # Scaling q (S x D) is cheaper than scaling the scores (S x S).
    scores = torch.baddbmm(mask, q * (1 / math.sqrt(q.size(-1))), k.mT)  # (B * H, S, S)
    weights = scores.softmax(dim=-1)  # (B * H, S, S): each row sums to 1
    if dropout:
        weights = weights * keep_mask(weights, dropout)
    return torch.bmm(weights, v).view(shape)  # (B * H, S, D) -> (B, H, S, D)


FORMS: dict[str, Attend] = {"fused": _fused, "products": _products}
"""Each form by its name in `picogpt.checks.ATTENTIONS`."""


def choose_attention(config: GPTConfig, sequences: int, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """Choose one of `picogpt.checks.ATTENTIONS` for training, and give the reason in a few words.

    On a CPU the faster form is measured: one layer on `sequences` windows, forward and backward in `dtype`.
    """
    if config.dropout:
        # Torch's fused attention draws its own dropout, one weight at a time.
        return "products", "fast dropout of attention weights"
    if device.type != "cpu":
        # The backward pass of fused attention on a GPU adds up in an order that varies.
        return "products", "reproducible gradients on a GPU"
    ratio = _products_speedup(config, sequences, dtype)
    if ratio >= _MIN_SPEEDUP:
        return "products", f"{ratio:.2f} times as fast as torch's fused function"
    return "fused", f"products of matrices run at {ratio:.2f} times its speed"


def _products_speedup(config: GPTConfig, sequences: int, dtype: torch.dtype) -> float:
    """Return the speedup of the products over the fused form, forward and backward."""
    shape = (sequences, config.n_head, config.context_len + 1, config.n_embd // config.n_head)  # (B, H, S, D)
    q, k, v = (torch.ones(shape, dtype=dtype, requires_grad=True) for _ in range(3))

    def run(form: str) -> None:
        y = FORMS[form](q, k, v, dropout=0.0)
        torch.autograd.grad(y, (q, k, v), torch.ones_like(y))

    return speedup(functools.partial(run, "products"), functools.partial(run, "fused"))
