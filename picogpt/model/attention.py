"""Causal attention in torch, in two forms, and the choice between them.

`fused` is torch's `scaled_dot_product_attention`. `products` are two batched products of matrices with a softmax between them:
on a CPU that computes in bfloat16 the fused form's backward pass can take several times as long. In float32 the two are close.

Dimensions: B sequences in a batch, S slots of a window, C = n_embd, H = n_head, D = C / H.
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

__all__ = ["causal_attention", "causal_mask", "choose_attention"]

_MIN_SPEEDUP = 1.3
"""Speedup from which `products` is chosen: with a margin, so that two starts on one machine choose alike."""


def causal_attention(qkv: Tensor, mask: Tensor | None, n_head: int, dropout: float = 0.0) -> Tensor:
    """Attend from every slot to itself and the slots before it: y = softmax(q k^T / sqrt(D) + mask) v.

    Args:
        qkv: queries, keys and values of all heads, concatenated (B, S, 3 * C).
        mask: None for the fused form; `causal_mask` (S, S) for the products.
        n_head: H.
        dropout: probability that an attention weight is dropped, in [0, 1).

    Returns:
        Outputs of all heads, concatenated (B, S, C), in the dtype of `qkv`.
    """
    B, S, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    # Split qkv into q, k and v, and each of them into heads.
    q, k, v = (part.view(B, S, n_head, C // n_head).transpose(1, 2) for part in qkv.chunk(3, dim=2))  # (B, H, S, D)
    if mask is None:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, S, D)
    else:
        # baddbmm and bmm take one batch dimension, so batch and heads become one.
        q, k, v = (part.reshape(B * n_head, S, C // n_head) for part in (q, k, v))  # (B * H, S, D)
        y = _by_products(q, k, v, mask, dropout).view(B, n_head, S, C // n_head)  # (B, H, S, D)
    return y.transpose(1, 2).reshape(B, S, C)  # heads side by side again


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Compute attention for q, k and v (B * H, S, D) by batched matrix products; return (B * H, S, D)."""
    # The mask is added by the GEMM itself; scaling q (S x D) is cheaper than scaling the scores (S x S).
    scores = torch.baddbmm(mask.to(q.dtype), q * (1 / math.sqrt(q.size(-1))), k.mT)  # (B * H, S, S)
    weights = scores.softmax(dim=-1)  # (B * H, S, S), each row sums to 1
    if dropout:
        weights = weights * keep_mask(weights, dropout)
    return torch.bmm(weights, v)  # (B * H, S, D)


def causal_mask(n_slots: int) -> Tensor:
    """Return the additive mask (S, S): 0 where the row's slot attends to the column's slot, -inf above the diagonal."""
    return torch.full((n_slots, n_slots), -torch.inf).triu(1)


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
        return "products", f"{ratio:.1f} times as fast as torch's fused function"
    return "fused", f"products of matrices run at {ratio:.1f} times its speed"


def _products_speedup(config: GPTConfig, sequences: int, dtype: torch.dtype) -> float:
    """Return the speedup of the products over the fused form, forward and backward."""
    n_slots = config.context_len + 1
    qkv = torch.ones(sequences, n_slots, 3 * config.n_embd, dtype=dtype, requires_grad=True)

    def run(mask: Tensor | None) -> None:
        y = causal_attention(qkv, mask, config.n_head)
        torch.autograd.grad(y, qkv, torch.ones_like(y))

    return speedup(functools.partial(run, causal_mask(n_slots)), functools.partial(run, None))
