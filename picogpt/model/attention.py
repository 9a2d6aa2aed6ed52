"""Causal attention by torch, in two forms, and the choice between them.

`fused` is torch's `scaled_dot_product_attention`. `products` are two batched products of matrices with a softmax between them:
on a CPU that computes in bfloat16 the fused one's backward pass can take several times as long. In float32 the two are close.

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
"""How many times as fast the products have to be, so that two starts on one machine choose alike."""


def causal_attention(qkv: Tensor, mask: Tensor | None, n_head: int, dropout: float = 0.0) -> Tensor:
    """Let every slot attend to itself and those before it.

    Args:
        qkv: queries, keys and values of all heads beside each other (B, S, 3 * C).
        mask: None for the fused form; `causal_mask` (S, S) for the products.
        n_head: H.
        dropout: probability that an attention weight is dropped, in [0, 1).

    Returns:
        Outputs of all heads beside each other (B, S, C), in the type of `qkv`.
    """
    B, S, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    q, k, v = (part.view(B, S, n_head, C // n_head).transpose(1, 2) for part in qkv.chunk(3, dim=2))  # (B, H, S, D)
    if mask is None:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, S, D)
    else:
        q, k, v = (part.reshape(B * n_head, S, C // n_head) for part in (q, k, v))
        y = _by_products(q, k, v, mask, dropout).view(B, n_head, S, C // n_head)
    return y.transpose(1, 2).reshape(B, S, C)


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Attention of each (S, D) of q, k and v (B * H, S, D)."""
    scores = torch.baddbmm(mask.to(q.dtype), q * (1 / math.sqrt(q.size(-1))), k.mT)  # (B * H, S, S)
    weights = scores.softmax(dim=-1)
    if dropout:
        weights = weights * keep_mask(weights, dropout)
    return torch.bmm(weights, v)


def causal_mask(n_slots: int) -> Tensor:
    """(S, S), 0 where the slot of a row attends to that of a column, -inf elsewhere."""
    return torch.full((n_slots, n_slots), -torch.inf).triu(1)


def choose_attention(config: GPTConfig, sequences: int, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """Choose one of `picogpt.checks.ATTENTIONS` for training, and give the reason in a few words.

    On a CPU the clock decides, on one layer with so many `sequences` of a step, forward and backward in `dtype`.
    """
    if config.dropout:
        return "products", "fast dropout of attention weights"
    if device.type != "cpu":
        return "products", "reproducible gradients on a GPU"
    ratio = _products_speedup(config, sequences, dtype)
    if ratio >= _MIN_SPEEDUP:
        return "products", f"{ratio:.1f} times as fast as torch's fused function"
    return "fused", f"products of matrices run at {ratio:.1f} times its speed"


def _products_speedup(config: GPTConfig, sequences: int, dtype: torch.dtype) -> float:
    """How many times as fast the products are as the fused form, forward and backward."""
    n_slots = config.context_len + 1
    qkv = torch.ones(sequences, n_slots, 3 * config.n_embd, dtype=dtype, requires_grad=True)

    def take_turn(mask: Tensor | None) -> None:
        y = causal_attention(qkv, mask, config.n_head)
        torch.autograd.grad(y, qkv, torch.ones_like(y))

    return speedup(functools.partial(take_turn, causal_mask(n_slots)), functools.partial(take_turn, None))
