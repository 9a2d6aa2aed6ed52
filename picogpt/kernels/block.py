"""A block of the model through the compiled functions, its backward pass written by hand around torch's matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from picogpt.kernels.compiled import Kernels

__all__ = ["FusedBlock"]


class FusedBlock:
    """A block with its weights as they are at one step, matrices in the type of the products; the same sums as the module's.

    Args:
        kernels: compiled for the block's shape.
        weights: the block's parameters, matrix and bias of each layer in the order of their use.
    """

    def __init__(self, kernels: Kernels, weights: list[Tensor]) -> None:
        self._kernels = kernels
        self._weights = [weight.to(kernels.dtype) if weight.dim() == 2 else weight for weight in weights]

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002 (a slot sees itself and those before it)
        """(B, S, C) -> (B, S, C)."""
        out: Tensor = _Block.apply(self._kernels, x, *self._weights)  # type: ignore[no-untyped-call]
        return out


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, *weights: Tensor) -> Tensor:
        norm_1, norm_1_bias, attn, attn_bias, proj, proj_bias, norm_2, norm_2_bias, fc, fc_bias, out, out_bias = weights
        rows = x.reshape(-1, x.size(-1))
        normed, mean_1, scale_1 = kernels.layer_norm(rows, norm_1, norm_1_bias)
        qkv = normed @ attn.T
        read, tops, shares = kernels.attention(qkv, attn_bias, x.size(0))
        middle = kernels.add(rows, read @ proj.T, proj_bias)
        normed, mean_2, scale_2 = kernels.layer_norm(middle, norm_2, norm_2_bias)
        hidden = normed @ fc.T
        result = kernels.add(middle, kernels.gelu(hidden, fc_bias) @ out.T, out_bias)
        ctx.kernels = kernels
        ctx.save_for_backward(rows, mean_1, scale_1, qkv, read, tops, shares, middle, mean_2, scale_2, hidden, *weights)
        return result.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernels: Kernels = ctx.kernels
        rows, mean_1, scale_1, qkv, read, tops, shares, middle, mean_2, scale_2, hidden, *weights = ctx.saved_tensors
        norm_1, norm_1_bias, attn, attn_bias, proj, _, norm_2, norm_2_bias, fc, fc_bias, out, _ = weights
        d_result = gradient.reshape(rows.shape)
        d_out, d_out_bias = kernels.add_backward(d_result)
        d_hidden, active, d_fc_bias = kernels.gelu_backward(d_out @ out, hidden, fc_bias)
        normed, d_middle, d_read, sums_2 = kernels.layer_norm_backward(
            d_hidden @ fc, middle, norm_2, norm_2_bias, mean_2, scale_2, d_result
        )
        d_fc = d_hidden.T @ normed
        d_qkv, d_attn_bias = kernels.attention_backward(d_read @ proj, qkv, attn_bias, read, tops, shares)
        normed, dx, _, sums_1 = kernels.layer_norm_backward(d_qkv @ attn, rows, norm_1, norm_1_bias, mean_1, scale_1, d_middle)
        of_attention = (*sums_1[:2], d_qkv.T @ normed, d_attn_bias, d_read.T @ read, sums_2[2])
        return None, dx.view_as(gradient), *of_attention, *sums_2[:2], d_fc, d_fc_bias, d_out.T @ active, d_out_bias
