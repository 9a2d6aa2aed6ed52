"""The blocks of the model through the compiled functions, their backward pass written by hand around torch's matrix products.

In bfloat16 the gradients of matrices wait until all windows are through: one product with all rows of a text takes a fifth less
time than one for each window, added up. In float32 it takes no less, and they are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from picogpt.kernels.compiled import Kernels
from picogpt.kernels.room import Room, Use

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


class _MatrixSum:
    """The gradient of a matrix (out, in).

    Args:
        kernels: what multiplies.
        kept: gradients (N, out) of the products with it in all windows, and what it was multiplied with (N, in), if they stay
            until all windows are through.
    """

    def __init__(self, kernels: Kernels, kept: tuple[Tensor, Tensor] | None) -> None:
        self._kernels, self._kept = kernels, kept
        self._sum: Tensor | None = None
        self._transposed = False

    def add(self, of_rows: Tensor, rows: Tensor) -> None:
        """Add what comes of `rows` (R, in) of one window and the product's gradient (R, out), if they do not stay."""
        if self._kept is None:
            # Kept the way round in which it is added to sooner.
            self._transposed = self._kernels.onednn and of_rows.size(1) > rows.size(1)
            left, right = (rows, of_rows) if self._transposed else (of_rows, rows)
            self._sum = self._kernels.add_product(self._sum, left, right)

    def total(self) -> Tensor:
        """The gradient, float32, which is given away."""
        if self._kept is not None:
            of_rows, rows = self._kept
            return (of_rows.T @ rows).float()
        total, self._sum = self._sum, None
        assert total is not None
        return (total.T if self._transposed else total).float()


class _Sums:
    """Gradients of a block's weights, over the windows of a text; those of vectors add up where they are made, in shares."""

    def __init__(self, kernels: Kernels, rolls: int, kept: Mapping[str, Tensor]) -> None:
        (width, _, _), threads = kernels.shape, kernels.threads
        self.norm_1, self.norm_2 = torch.zeros(threads, 3, width), torch.zeros(threads, 3, width)
        self.attn_bias, self.fc_bias = torch.zeros(rolls, 3 * width), torch.zeros(threads, 4 * width)
        pairs = (("qkv", "normed_1"), ("d_middle", "read"), ("hidden", "normed_2"), ("d_branch", "active"))
        self.attn, self.proj, self.fc, self.out = (
            _MatrixSum(kernels, (kept[left], kept[right]) if {left, right} <= kept.keys() else None) for left, right in pairs
        )

    def clear(self) -> None:
        """Begin again; the sums of matrices have been given away."""
        for tensor in (self.norm_1, self.norm_2, self.attn_bias, self.fc_bias):
            tensor.zero_()

    def totals(self, out_bias: Tensor) -> _Weights:
        """The gradients of all weights; that of the last bias is known to what comes after the block."""
        (norm_1, norm_1_bias, _), (norm_2, norm_2_bias, proj_bias) = self.norm_1.sum(0), self.norm_2.sum(0)
        attn_bias, fc_bias = self.attn_bias.sum(0), self.fc_bias.sum(0)
        attn, proj, fc, out = (matrix.total() for matrix in (self.attn, self.proj, self.fc, self.out))
        return _Weights(
            norm_1, norm_1_bias, attn, attn_bias, proj, proj_bias, norm_2, norm_2_bias, fc, fc_bias, out, out_bias
        )  # fmt: skip


class FusedBlocks:
    """All blocks of a model, for text after text of one shape, each window by window.

    Args:
        kernels: compiled for the model's shape.
        use: what there is to be room for.
    """

    def __init__(self, kernels: Kernels, use: Use) -> None:
        self.kernels, self.use = kernels, use
        self.is_free = True
        """Whether the text before is through."""
        self.weights: list[_Weights] = []
        """Of each block, as they are during a text; matrices in the type of the products."""
        self._room = Room(kernels, use)
        self._sums = [_Sums(kernels, use.rolls, wholes) for wholes in self._room.wholes]
        self._last_bias = torch.zeros(kernels.threads, kernels.shape[0])
        """Gradient of the last block's last bias, in shares."""
        self._remaining: set[int] = set()
        """Windows that have not gone backward."""

    def begin(self, parameters: Sequence[Sequence[Tensor]]) -> Callable[[Tensor], Tensor]:
        """Begin a text with the parameters of each block, in the order of the module.

        Returns:
            What takes the next window through all blocks: (B, S, C) -> (B, S, C).
        """
        assert self.is_free, "a text that is not through needs the memory"
        self.is_free = not self.use.trained
        self.weights = [
            _Weights(*(p.detach().to(self.kernels.dtype) if p.dim() == 2 else p.detach() for p in block)) for block in parameters
        ]
        for sums in self._sums:
            sums.clear()
        self._last_bias.zero_()
        windows = range(len(self.use.slots))
        self._remaining = set(windows)
        token = _Parameters.apply(self, *(p for block in parameters for p in block))  # type: ignore[no-untyped-call]
        turns = iter(windows)
        return lambda x: _Blocks.apply(self, next(turns), x, token)  # type: ignore[no-untyped-call]

    def forward(self, window: int, x: Tensor) -> Tensor:
        """Rows (R, C) through all blocks."""
        kernels = self.kernels
        self._room.x[0][window] = x
        self._normalize(0, window)
        for index, weights in enumerate(self.weights):
            branch, middle = self._forward(index, window), self._room.values[index][window].middle
            if index + 1 == len(self.weights):
                break
            after, values = self.weights[index + 1], self._room.values[index + 1][window]
            written = {"added": self._room.x[index + 1][window], "out": values.normed_1, "statistics": values.statistics_1}
            kernels.add_layer_norm(middle, branch, weights.out_bias, after.norm_1, after.norm_1_bias, **written)
        out = torch.empty_like(x)
        kernels.add(middle, branch, weights.out_bias, out)
        return out

    def _normalize(self, index: int, window: int) -> None:
        """The first LayerNorm of a block."""
        x, weights, values = self._room.x[index][window], self.weights[index], self._room.values[index][window]
        self.kernels.layer_norm(x, weights.norm_1, weights.norm_1_bias, values.normed_1, values.statistics_1)

    def _forward(self, index: int, window: int) -> Tensor:
        """A block from there on: returns what is to be added to `middle`, with the last bias."""
        kernels, weights, values = self.kernels, self.weights[index], self._room.values[index][window]
        values.qkv = kernels.linear(values.normed_1, weights.attn, values.qkv)
        kernels.attention(values.qkv, weights.attn_bias, self.use.rolls, out=values.read, scores=values.scores)
        branch = kernels.linear(values.read, weights.proj, values.branch)
        x = self._room.x[index][window]
        written = {"added": values.middle, "out": values.normed_2, "statistics": values.statistics_2}
        kernels.add_layer_norm(x, branch, weights.proj_bias, weights.norm_2, weights.norm_2_bias, **written)
        values.hidden = kernels.linear(values.normed_2, weights.fc, values.hidden)
        kernels.gelu(values.hidden, weights.fc_bias, values.active)
        return kernels.linear(values.active, weights.out, values.branch)

    def backward(self, window: int, dx: Tensor) -> None:
        """Turn the gradient of what `forward` returned, in place, into that of what it was given."""
        self._remaining.remove(window)
        last = len(self.weights) - 1
        self.kernels.add_backward(dx, self._room.values[last][window].d_branch, self._last_bias)
        for index in range(last, -1, -1):
            if self.use.recompute:
                self._normalize(index, window)
                self._forward(index, window)
            self._backward(index, window, dx, self._room.values[index - 1][window].d_branch if index else None)

    def _backward(self, index: int, window: int, dx: Tensor, d_branch: Tensor | None) -> None:
        kernels, weights, sums = self.kernels, self.weights[index], self._sums[index]
        values, x = self._room.values[index][window], self._room.x[index][window]
        d_active = kernels.linear(values.d_branch, weights.out.T, values.d_active)
        kernels.gelu_backward(d_active, values.hidden, weights.fc_bias, self._again(values.active), sums.fc_bias)
        sums.out.add(values.d_branch, values.active)
        d_normed = kernels.linear(values.hidden, weights.fc.T, values.d_normed)
        norm = (values.middle, weights.norm_2, weights.norm_2_bias, values.statistics_2)
        again, branch = self._again(values.normed_2), values.d_middle
        kernels.layer_norm_backward(d_normed, *norm, out=again, dx=dx, branch=branch, sums=sums.norm_2)
        sums.fc.add(values.hidden, values.normed_2)
        sums.proj.add(values.d_middle, values.read)
        d_read = kernels.linear(values.d_middle, weights.proj.T, values.d_read)
        attention = {"out": values.read, "scores": values.scores, "sums": sums.attn_bias}
        kernels.attention_backward(d_read, values.qkv, weights.attn_bias, self.use.rolls, **attention)
        d_normed = kernels.linear(values.qkv, weights.attn.T, values.d_normed)
        norm = (x, weights.norm_1, weights.norm_1_bias, values.statistics_1)
        again = self._again(values.normed_1)
        kernels.layer_norm_backward(d_normed, *norm, out=again, dx=dx, branch=d_branch, sums=sums.norm_1)
        sums.attn.add(values.qkv, values.normed_1)
        if kernels.onednn:
            values.qkv = values.hidden = torch.empty(0)  # so that their memory is there for the next products

    def _again(self, rows: Tensor) -> Tensor | None:
        """Where what was made of rows in the forward pass is made again, unless it is still there."""
        return None if self._room.at_once else rows

    def gradients(self) -> list[Tensor]:
        """Those of all parameters, once all windows have gone backward; the memory is free for the next text."""
        assert not self._remaining, f"windows {sorted(self._remaining)} have not gone backward"
        # What a block's result is added to ends in the first LayerNorm of the next block.
        biases = [*(sums.norm_1.sum(0)[2] for sums in self._sums[1:]), self._last_bias.sum(0)]
        found = [total for sums, bias in zip(self._sums, biases, strict=True) for total in sums.totals(bias)]
        self.is_free = True
        return found


class _Parameters(torch.autograd.Function):
    """Stands for all weights in the graph of a text: its backward pass comes after those of all windows, and has the sums."""

    @staticmethod
    def forward(ctx: Any, blocks: FusedBlocks, *parameters: Tensor) -> Tensor:
        ctx.blocks = blocks
        ctx.save_for_backward(*parameters)  # so that it is noticed if they are changed in between
        return parameters[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.saved_tensors
        return None, *ctx.blocks.gradients()


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: FusedBlocks, window: int, x: Tensor, token: Tensor) -> Tensor:  # noqa: ARG004 (it is there for the graph)
        ctx.blocks, ctx.window = blocks, window
        # Detached, as the memory for x is there longer than the graph that x is part of.
        return blocks.forward(window, x.detach().reshape(-1, x.size(-1)).contiguous()).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.blocks is None:
            raise RuntimeError("what a window has made is used up by one backward pass; go forward again for a second one")
        blocks, ctx.blocks = ctx.blocks, None
        dx = gradient.reshape(-1, gradient.size(-1)).clone(memory_format=torch.contiguous_format)
        blocks.backward(ctx.window, dx)
        return None, None, dx.view_as(gradient), dx.new_zeros(())
