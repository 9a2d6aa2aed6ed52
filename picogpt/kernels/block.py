"""The blocks of the model through the compiled functions, their backward pass written by hand around torch's matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from picogpt.kernels.compiled import Kernels, Normed

__all__ = ["FusedBlocks"]


class _Weights(NamedTuple):
    """Parameters of a block, or their gradients, in the order in which they are used, which is also the module's."""

    norm_1: Tensor
    norm_1_bias: Tensor
    attn: Tensor
    attn_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    norm_2: Tensor
    norm_2_bias: Tensor
    fc: Tensor
    fc_bias: Tensor
    out: Tensor
    out_bias: Tensor


class _Saved(NamedTuple):
    """What the backward pass needs of a block, beside the rows that it was given."""

    statistics_1: Tensor
    qkv: Tensor
    read: Tensor
    scores: Tensor
    middle: Tensor
    statistics_2: Tensor
    hidden: Tensor


class _MatrixSum:
    """The gradient of a matrix (out, in), kept the way round in which it is added to sooner."""

    def __init__(self, kernels: Kernels, weight: Tensor) -> None:
        self._kernels, self._transposed = kernels, kernels.onednn and weight.size(0) > weight.size(1)
        self._sum: Tensor | None = None

    def add(self, of_rows: Tensor, rows: Tensor) -> None:
        """Add what comes of `rows` (R, in), which the matrix was multiplied with, and the product's gradient (R, out)."""
        left, right = (rows, of_rows) if self._transposed else (of_rows, rows)
        self._sum = self._kernels.add_product(self._sum, left, right)

    def total(self) -> Tensor:
        """The gradient (out, in), float32, which is given away."""
        total, self._sum = self._sum, None
        assert total is not None
        return (total.T if self._transposed else total).float()


class _Sums:
    """Gradients of a block's weights, as they add up over the windows of a roll: in bfloat16 for matrices of that type.

    Those of matrices are added within the product itself, the others within the function that makes them, in shares.
    """

    def __init__(self, kernels: Kernels, weights: _Weights, rolls: int) -> None:
        width, new = weights.norm_1.size(0), weights.norm_1.new_zeros
        self.norm_1, self.norm_2 = new(kernels.threads, 3, width), new(kernels.threads, 3, width)
        self.attn_bias, self.fc_bias = new(rolls, 3 * width), new(kernels.threads, 4 * width)
        matrices = (weights.attn, weights.proj, weights.fc, weights.out)
        self.attn, self.proj, self.fc, self.out = (_MatrixSum(kernels, weight) for weight in matrices)

    def totals(self, out_bias: Tensor) -> _Weights:
        """The gradients of all weights; that of the last bias is known to what comes after the block."""
        (norm_1, norm_1_bias, _), (norm_2, norm_2_bias, proj_bias) = self.norm_1.sum(0), self.norm_2.sum(0)
        attn_bias, fc_bias = self.attn_bias.sum(0), self.fc_bias.sum(0)
        attn, proj, fc, out = (matrix.total() for matrix in (self.attn, self.proj, self.fc, self.out))
        return _Weights(
            norm_1, norm_1_bias, attn, attn_bias, proj, proj_bias, norm_2, norm_2_bias, fc, fc_bias, out, out_bias
        )  # fmt: skip


class FusedBlocks:
    """All blocks of a model, with the weights as they are during one roll; matrices in the type of the products.

    Args:
        kernels: compiled for the model's shape.
        parameters: those of each block, in the order of the module.
        rolls: B.
        recompute: whether a block's inner values are computed again in the backward pass, instead of kept for it.
    """

    def __init__(self, kernels: Kernels, parameters: Sequence[Sequence[Tensor]], rolls: int, *, recompute: bool) -> None:
        self.kernels, self.rolls, self.recompute = kernels, rolls, recompute
        self.weights = [
            _Weights(*(weight.detach().to(kernels.dtype) if weight.dim() == 2 else weight.detach() for weight in block))
            for block in parameters
        ]
        self.sums = [_Sums(kernels, weights, rolls) for weights in self.weights]
        self.last_bias = self.sums[-1].fc_bias.new_zeros(kernels.threads, self.weights[-1].norm_1.size(0))
        """Gradient of the last block's last bias, in shares."""
        self._token = _Parameters.apply(self.sums, self.last_bias, *(w for block in parameters for w in block))  # type: ignore[no-untyped-call]

    def __call__(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        out: Tensor = _Blocks.apply(self, x, self._token)  # type: ignore[no-untyped-call]
        return out

    def norm(self, index: int, rows: Tensor) -> Normed:
        """Rows (R, C) as block `index` begins with them."""
        weights = self.weights[index]
        return self.kernels.layer_norm(rows, weights.norm_1, weights.norm_1_bias)

    def forward(self, index: int, normed: Normed) -> tuple[_Saved, Tensor]:
        """Block `index`, from its first LayerNorm on: what to save, and what is to be added to `middle`, with the last bias."""
        kernels, weights = self.kernels, self.weights[index]
        qkv = kernels.linear(normed.out, weights.attn)
        read, scores = kernels.attention(qkv, weights.attn_bias, self.rolls)
        branch = kernels.linear(read, weights.proj)
        middle = kernels.add_layer_norm(normed.x, branch, weights.proj_bias, weights.norm_2, weights.norm_2_bias)
        hidden = kernels.linear(middle.out, weights.fc)
        branch = kernels.linear(kernels.gelu(hidden, weights.fc_bias), weights.out)
        return _Saved(normed.statistics, qkv, read, scores, middle.x, middle.statistics, hidden), branch

    def backward(self, index: int, rows: Tensor, saved: _Saved, gradient: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of `rows`, which block `index` was given, from that of its result; both also in the products' type."""
        kernels, weights, sums = self.kernels, self.weights[index], self.sums[index]
        d_active = kernels.linear(d_out, weights.out.T)
        d_hidden, active = kernels.gelu_backward(d_active, saved.hidden, weights.fc_bias, sums.fc_bias)
        sums.out.add(d_out, active)
        norm = (kernels.linear(d_hidden, weights.fc.T), saved.middle, weights.norm_2, weights.norm_2_bias)
        normed, d_middle, d_proj = kernels.layer_norm_backward(
            *norm, statistics=saved.statistics_2, residual=gradient, sums=sums.norm_2
        )
        sums.fc.add(d_hidden, normed)
        sums.proj.add(d_proj, saved.read)
        attention = (kernels.linear(d_proj, weights.proj.T), saved.qkv, weights.attn_bias, saved.read)
        d_qkv = kernels.attention_backward(*attention, statistics=saved.scores, sums=sums.attn_bias)
        norm = (kernels.linear(d_qkv, weights.attn.T), rows, weights.norm_1, weights.norm_1_bias)
        normed, dx, dx_number = kernels.layer_norm_backward(
            *norm, statistics=saved.statistics_1, residual=d_middle, sums=sums.norm_1
        )
        sums.attn.add(d_qkv, normed)
        return dx, dx_number


class _Parameters(torch.autograd.Function):
    """Stands for all weights in the graph of a roll: its backward pass comes after those of all windows, and has the sums."""

    @staticmethod
    def forward(ctx: Any, sums: list[_Sums], last_bias: Tensor, *parameters: Tensor) -> Tensor:
        ctx.sums, ctx.last_bias = sums, last_bias
        return parameters[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.sums is None:
            raise RuntimeError("the sums are those of one backward pass; a second one would add to them")
        all_sums, ctx.sums = ctx.sums, None
        # What a block's result is added to ends in the first LayerNorm of the next block.
        biases = [*(sums.norm_1.sum(0)[2] for sums in all_sums[1:]), ctx.last_bias.sum(0)]
        gradients = [total for sums, bias in zip(all_sums, biases, strict=True) for total in sums.totals(bias)]
        return None, None, *gradients


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: FusedBlocks, x: Tensor, token: Tensor) -> Tensor:  # noqa: ARG004 (it is there for the graph)
        normed = blocks.norm(0, x.reshape(-1, x.size(-1)))
        kept: list[Tensor] = []
        for index, weights in enumerate(blocks.weights):
            saved, branch = blocks.forward(index, normed)
            kept += (normed.x,) if blocks.recompute else (normed.x, *saved)
            if index + 1 < len(blocks.weights):
                after = blocks.weights[index + 1]
                normed = blocks.kernels.add_layer_norm(saved.middle, branch, weights.out_bias, after.norm_1, after.norm_1_bias)
        ctx.blocks = blocks
        ctx.save_for_backward(*kept)
        return blocks.kernels.add(saved.middle, branch, weights.out_bias).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        blocks: FusedBlocks = ctx.blocks
        kept = list(ctx.saved_tensors)
        each = len(kept) // len(blocks.weights)
        dx = gradient.reshape(kept[0].shape).contiguous()
        dx_number = blocks.kernels.add_backward(dx, blocks.last_bias)
        for index in reversed(range(len(blocks.weights))):
            rows, *values = kept[index * each : (index + 1) * each]
            saved = blocks.forward(index, blocks.norm(index, rows))[0] if blocks.recompute else _Saved(*values)
            dx, dx_number = blocks.backward(index, rows, saved, dx, dx_number)
        return None, dx.view_as(gradient), dx.new_zeros(())
