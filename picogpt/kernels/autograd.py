"""The blocks of the model through the compiled functions: what they need, and what autograd sees of them.

In bfloat16 the gradients of matrices wait until all windows are through, and are one product with all rows of a text. In float32
they are added up window by window, as what they are made of would take twice the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from picogpt.kernels.bindings import Activations, LayerWeights, ParamGrads, Pass, PassGrads, WeightGrads
from picogpt.kernels.compiled import Kernels, WorkspaceSpec, data_ptrs, structure_of
from picogpt.kernels.workspace import Workspace

__all__ = ["FusedBlocks"]


class _Weights(NamedTuple):
    """Parameters of a block, or their gradients, in the order of the module."""

    ln1_weight: Tensor
    ln1_bias: Tensor
    attn: Tensor
    attn_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    ln2_weight: Tensor
    ln2_bias: Tensor
    fc: Tensor
    fc_bias: Tensor
    out: Tensor
    out_bias: Tensor


_WGRAD_INPUTS = {
    "attn": ("qkv", "ln1_out"),
    "proj": ("d_attn_out", "att_out"),
    "fc": ("fc", "ln2_out"),
    "out": ("d_mlp_out", "fc_gelu"),
}
"""Activations that the gradient of each matrix is made of: the gradient of its output, and its input."""


class _Grads(NamedTuple):
    """Gradients of a block's weights over the windows of a text: fields of `picogpt.kernels.bindings.ParamGrads`."""

    ln1: Tensor
    """(threads, 3, C): of weight, bias, and the bias of the product that was normalised."""
    attn: Tensor
    attn_bias: Tensor
    """(rolls, 3C)."""
    proj: Tensor
    ln2: Tensor
    fc: Tensor
    fc_bias: Tensor
    """(threads, 4C)."""
    out: Tensor

    @classmethod
    def make(cls, kernels: Kernels, rolls: int) -> _Grads:
        """Memory for them; the gradients of matrices are made anew for each text, as they are given away."""
        (width, _, _), threads, none = kernels.shape, kernels.threads, torch.empty(0)
        ln1, ln2 = torch.zeros(2, threads, 3, width).unbind()
        return cls(ln1, none, torch.zeros(rolls, 3 * width), none, ln2, none, torch.zeros(threads, 4 * width), none)

    def begin(self, weights: _Weights, when: WeightGrads) -> _Grads:
        """Begin again, with new gradients of matrices; deferred ones are written, the others added to zeros."""
        for tensor in (self.ln1, self.attn_bias, self.ln2, self.fc_bias):
            tensor.zero_()
        new = torch.empty_like if when is WeightGrads.DEFERRED else torch.zeros_like
        return self._replace(**{name: new(getattr(weights, name)) for name in _WGRAD_INPUTS})

    def totals(self, out_bias: Tensor) -> _Weights:
        """The gradients of all weights; that of the last bias is known to the block that follows."""
        (ln1_weight, ln1_bias, _), (ln2_weight, ln2_bias, proj_bias) = self.ln1.sum(0), self.ln2.sum(0)
        attn_bias, fc_bias = self.attn_bias.sum(0), self.fc_bias.sum(0)
        return _Weights(
            ln1_weight, ln1_bias, self.attn, attn_bias, self.proj, proj_bias,
            ln2_weight, ln2_bias, self.fc, fc_bias, self.out, out_bias,
        )  # fmt: skip


class FusedBlocks:
    """All blocks of a model, for text after text of one shape, each window by window.

    Args:
        kernels: compiled for the model's shape.
        use: what there is to be room for.
    """

    def __init__(self, kernels: Kernels, spec: WorkspaceSpec) -> None:
        self.kernels, self.spec = kernels, spec
        self.is_free = True
        """Whether the text before is through."""
        self._workspace = Workspace(kernels, spec)
        self._activations = [
            (Activations * spec.n_layer)(*(structure_of(Activations, block) for block in blocks))
            for blocks in self._workspace.windows
        ]
        self._packed: list[Tensor] = []
        self._weights = (LayerWeights * spec.n_layer)()
        self._held: list[_Weights] = []
        """The parameters whose addresses are in `_weights`."""
        self._own = [_Grads.make(kernels, spec.sequences) for _ in range(spec.n_layer)] if spec.trained else []
        self._grads: list[_Grads] = []
        self._last_bias = torch.zeros(kernels.threads, kernels.shape[0])
        """Gradient of the last block's last bias, a row for each thread."""
        self._remaining: set[int] = set()
        """Windows that have not gone backward."""

    def begin(self, parameters: Sequence[Sequence[Tensor]]) -> Callable[[Tensor], Tensor]:
        """Begin a text with the parameters of each block, in the order of the module.

        Returns:
            What takes the next window through all blocks: (B, S, C) -> (B, S, C).
        """
        assert self.is_free, "a text that is not through needs the memory"
        self.is_free = not self.spec.trained
        weights = [_Weights(*(p.detach() for p in block)) for block in parameters]
        self._pack(weights)
        self._grads = [own.begin(of, self._workspace.weight_grads) for own, of in zip(self._own, weights, strict=False)]
        self._last_bias.zero_()
        windows = range(len(self.spec.slots))
        self._remaining = set(windows)
        token = _Parameters.apply(self, *(p for block in parameters for p in block))  # type: ignore[no-untyped-call]
        turns = iter(windows)
        return lambda x: _Blocks.apply(self, next(turns), x, token)  # type: ignore[no-untyped-call]

    def _pack(self, weights: list[_Weights]) -> None:
        """Pack all matrices as they are now."""
        matrices = [getattr(block, name) for block in weights for name in _WGRAD_INPUTS]
        if not self._packed:
            self._packed = [packed for matrix in matrices for packed in self.kernels.packed(*matrix.shape)]
        self.kernels.pack(data_ptrs(matrices), data_ptrs(self._packed), len(weights))
        packed = iter(self._packed)
        for index, block in enumerate(weights):
            tensors = block._asdict()
            for name in _WGRAD_INPUTS:
                tensors[name], tensors[f"{name}_back"] = next(packed), next(packed)
            self._weights[index] = structure_of(LayerWeights, tensors)
        self._held = weights

    def _pass(self, window: int) -> Pass:
        """One window, as the functions take it."""
        return Pass(
            weights=self._weights,
            activations=self._activations[window],
            layers=self.spec.n_layer,
            rolls=self.spec.sequences,
            slots=self.spec.slots[window],
            threads=self.kernels.threads,
            save=self.spec.save,
        )

    def forward(self, window: int, x: Tensor) -> Tensor:
        """Rows (R, C) through all blocks."""
        self._workspace.windows[window][0]["x"].copy_(x)
        out = torch.empty_like(x)
        self.kernels.forward(self._pass(window), out)
        return out

    def backward(self, window: int, dx: Tensor) -> None:
        """Turn the gradient of what `forward` returned, in place, into that of what it was given."""
        self._remaining.remove(window)
        assert dx.is_contiguous()
        grads = PassGrads(
            params=(ParamGrads * len(self._grads))(*(structure_of(ParamGrads, block._asdict()) for block in self._grads)),
            dx=dx.data_ptr(),
            last_bias=self._last_bias.data_ptr(),
            weight_grads=self._workspace.weight_grads,
        )
        self.kernels.backward(self._pass(window), grads)

    def gradients(self) -> list[Tensor]:
        """Those of all parameters, once all windows have gone backward; the memory is free for the next text."""
        assert not self._remaining, f"windows {sorted(self._remaining)} have not gone backward"
        if self._workspace.weight_grads is WeightGrads.DEFERRED:
            for grads, activations in zip(self._grads, self._workspace.all_windows, strict=True):
                for name, (d_out, x) in _WGRAD_INPUTS.items():
                    self.kernels.weight_grad(activations[d_out], activations[x], getattr(grads, name))
        # What a block's result is added to ends in the first LayerNorm of the next block.
        biases = [*(grads.ln1.sum(0)[2] for grads in self._grads[1:]), self._last_bias.sum(0)]
        found = [total for grads, bias in zip(self._grads, biases, strict=True) for total in grads.totals(bias)]
        self._grads = []
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
            raise RuntimeError("backward can run only once per forward; run forward again for a second one")
        blocks, ctx.blocks = ctx.blocks, None
        dx = gradient.reshape(-1, gradient.size(-1)).clone(memory_format=torch.contiguous_format)
        blocks.backward(ctx.window, dx)
        return None, None, dx.view_as(gradient), dx.new_zeros(())
