"""The blocks of the model through the compiled functions: what they need, and what autograd sees of them.

In bfloat16 the gradients of matrices wait until all windows are through, and are one product with all rows of a text. In float32
they are added up window by window, as what they are made of would take twice the memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from picogpt.kernels.compiled import Kernels, Use, addresses
from picogpt.kernels.room import Room

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


_OF_MATRICES = {
    "attn": ("qkv", "normed_1"),
    "proj": ("d_middle", "read"),
    "fc": ("hidden", "normed_2"),
    "out": ("d_branch", "active"),
}
"""Values that the gradient of each matrix is made of: the gradients of its products, and what it was multiplied with."""


class _Sums(NamedTuple):
    """Gradients of a block's weights over the windows of a text, in block.c's order; those of vectors in shares."""

    norm_1: Tensor
    """(threads, 3, C): of weight, bias, and the bias of the product that was normalised."""
    attn: Tensor
    attn_bias: Tensor
    """(rolls, 3C)."""
    proj: Tensor
    norm_2: Tensor
    fc: Tensor
    fc_bias: Tensor
    """(threads, 4C)."""
    out: Tensor

    @classmethod
    def make(cls, kernels: Kernels, rolls: int) -> _Sums:
        """Room for them; the gradients of matrices are made anew for each text, as they are given away."""
        (width, _, _), threads, none = kernels.shape, kernels.threads, torch.empty(0)
        norm_1, norm_2 = torch.zeros(2, threads, 3, width).unbind()
        return cls(norm_1, none, torch.zeros(rolls, 3 * width), none, norm_2, none, torch.zeros(threads, 4 * width), none)

    def begin(self, weights: _Weights, *, at_once: bool) -> _Sums:
        """Begin again, with new gradients of matrices; those that are computed at once need no zeros to begin with."""
        for tensor in (self.norm_1, self.attn_bias, self.norm_2, self.fc_bias):
            tensor.zero_()
        new = torch.empty_like if at_once else torch.zeros_like
        return self._replace(**{name: new(getattr(weights, name)) for name in _OF_MATRICES})

    def totals(self, out_bias: Tensor) -> _Weights:
        """The gradients of all weights; that of the last bias is known to what comes after the block."""
        (norm_1, norm_1_bias, _), (norm_2, norm_2_bias, proj_bias) = self.norm_1.sum(0), self.norm_2.sum(0)
        attn_bias, fc_bias = self.attn_bias.sum(0), self.fc_bias.sum(0)
        return _Weights(
            norm_1, norm_1_bias, self.attn, attn_bias, self.proj, proj_bias,
            norm_2, norm_2_bias, self.fc, fc_bias, self.out, out_bias,
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
        self._room = Room(kernels, use)
        self._values = [addresses(itertools.chain(*blocks)) for blocks in self._room.values]
        self._packed: list[Tensor] = []
        self._weights = addresses([])
        self._own = [_Sums.make(kernels, use.rolls) for _ in range(use.n_layer)] if use.trained else []
        self._sums: list[_Sums] = []
        self._sums_at = addresses([])
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
        weights = [_Weights(*(p.detach() for p in block)) for block in parameters]
        self._pack(weights)
        self._sums = [own.begin(of, at_once=self._room.at_once) for own, of in zip(self._own, weights, strict=False)]
        self._sums_at = addresses(itertools.chain(*self._sums))
        self._last_bias.zero_()
        windows = range(len(self.use.slots))
        self._remaining = set(windows)
        token = _Parameters.apply(self, *(p for block in parameters for p in block))  # type: ignore[no-untyped-call]
        turns = iter(windows)
        return lambda x: _Blocks.apply(self, next(turns), x, token)  # type: ignore[no-untyped-call]

    def _pack(self, weights: Sequence[_Weights]) -> None:
        """Pack all matrices as they are now."""
        matrices = [getattr(block, name) for block in weights for name in _OF_MATRICES]
        if not self._packed:
            self._packed = [packed for matrix in matrices for packed in self.kernels.packed(*matrix.shape)]
        packed = iter(self._packed)
        of_all = [p for block in weights for p in block]
        self._weights = addresses(q for p in of_all for q in ((next(packed), next(packed)) if p.dim() == 2 else (p,)))
        self.kernels.pack(addresses(matrices), addresses(self._packed), len(weights))

    def forward(self, window: int, x: Tensor) -> Tensor:
        """Rows (R, C) through all blocks."""
        self._room.values[window][0].x.copy_(x)
        out = torch.empty_like(x)
        self.kernels.forward(self._weights, self._values[window], out, self.use)
        return out

    def backward(self, window: int, dx: Tensor) -> None:
        """Turn the gradient of what `forward` returned, in place, into that of what it was given."""
        self._remaining.remove(window)
        tables = self._weights, self._values[window], self._sums_at
        self.kernels.backward(tables, dx, self._last_bias, self.use, at_once=self._room.at_once)

    def gradients(self) -> list[Tensor]:
        """Those of all parameters, once all windows have gone backward; the memory is free for the next text."""
        assert not self._remaining, f"windows {sorted(self._remaining)} have not gone backward"
        if self._room.at_once:
            for sums, values in zip(self._sums, self._room.wholes, strict=True):
                for name, (of_rows, rows) in _OF_MATRICES.items():
                    self.kernels.gradient_of_matrix(values[of_rows], values[rows], getattr(sums, name))
        # What a block's result is added to ends in the first LayerNorm of the next block.
        biases = [*(sums.norm_1.sum(0)[2] for sums in self._sums[1:]), self._last_bias.sum(0)]
        found = [total for sums, bias in zip(self._sums, biases, strict=True) for total in sums.totals(bias)]
        self._sums = []
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
        return blocks.forward(window, x.detach().reshape(-1, x.size(-1))).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.blocks is None:
            raise RuntimeError("what a window has made is used up by one backward pass; go forward again for a second one")
        blocks, ctx.blocks = ctx.blocks, None
        dx = gradient.reshape(-1, gradient.size(-1)).clone(memory_format=torch.contiguous_format)
        blocks.backward(ctx.window, dx)
        return None, None, dx.view_as(gradient), dx.new_zeros(())
