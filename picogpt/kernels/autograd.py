"""The blocks of the model as autograd functions over the native kernels.

Weight gradients are deferred until all windows have gone backward: one GEMM over all rows of a text. In float32, where their
inputs take twice the memory, they are accumulated window by window instead if a step has several sequences.
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
    """Parameters of a block, or their gradients, in the order of `Block.parameters()`."""

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
"""Inputs of each weight gradient dW = dY^T X, as names of activations: the gradient of the output dY, and the input X."""


class _Grads(NamedTuple):
    """Gradients of a block's weights over the windows of a text: fields of `picogpt.kernels.bindings.ParamGrads`."""

    ln1: Tensor
    """(threads, 3, C): LayerNorm weight, LayerNorm bias, and the bias of the GEMM whose output was normalized."""
    attn: Tensor
    attn_bias: Tensor
    """(sequences, 3C)."""
    proj: Tensor
    ln2: Tensor
    fc: Tensor
    fc_bias: Tensor
    """(threads, 4C)."""
    out: Tensor

    @classmethod
    def make(cls, kernels: Kernels, sequences: int) -> _Grads:
        """Allocate the gradients, except those of matrices: autograd keeps these, so each text gets new ones."""
        (width, _, _), threads, none = kernels.shape, kernels.threads, torch.empty(0)
        # A row for each thread or sequence: threads add to rows of their own without locks, and `totals` sums the rows.
        ln1, ln2 = torch.zeros(2, threads, 3, width).unbind()
        return cls(ln1, none, torch.zeros(sequences, 3 * width), none, ln2, none, torch.zeros(threads, 4 * width), none)

    def reset(self, weights: _Weights, when: WeightGrads) -> _Grads:
        """Zero the gradients, with new tensors for those of matrices."""
        for tensor in (self.ln1, self.attn_bias, self.ln2, self.fc_bias):
            tensor.zero_()
        # Deferred weight gradients are written by one GEMM; the others are accumulated and start from zero.
        new = torch.empty_like if when is WeightGrads.DEFERRED else torch.zeros_like
        return self._replace(**{name: new(getattr(weights, name)) for name in _WGRAD_INPUTS})

    def totals(self, out_bias: Tensor) -> _Weights:
        """Return the gradients of all parameters; `out_bias` comes from the block that follows."""
        # The bias of attention's output projection is added to the residual stream in front of ln_2, which computes its gradient.
        (ln1_weight, ln1_bias, _), (ln2_weight, ln2_bias, proj_bias) = self.ln1.sum(0), self.ln2.sum(0)
        attn_bias, fc_bias = self.attn_bias.sum(0), self.fc_bias.sum(0)
        return _Weights(
            ln1_weight, ln1_bias, self.attn, attn_bias, self.proj, proj_bias,
            ln2_weight, ln2_bias, self.fc, fc_bias, self.out, out_bias,
        )  # fmt: skip


class FusedBlocks:
    """All blocks of a model on the native kernels, for texts of one shape, each computed window by window.

    Args:
        kernels: native kernels compiled for the model's shape.
        spec: what the workspace is allocated for.
    """

    def __init__(self, kernels: Kernels, spec: WorkspaceSpec) -> None:
        self.kernels, self.spec = kernels, spec
        self.is_free = True
        """Whether the workspace is free: no text waits for its backward pass."""
        self._workspace = Workspace(kernels, spec)
        self._activations = [
            # One table of pointers for each window, made once: the buffers stay where they are.
            (Activations * spec.n_layer)(*(structure_of(Activations, block) for block in blocks))
            for blocks in self._workspace.windows
        ]
        self._packed: list[Tensor] = []
        self._weights = (LayerWeights * spec.n_layer)()
        self._held: list[_Weights] = []
        """Parameters whose data pointers are in `_weights`: they must stay alive."""
        self._own = [_Grads.make(kernels, spec.sequences) for _ in range(spec.n_layer)] if spec.trained else []
        self._grads: list[_Grads] = []
        self._param_grads = (ParamGrads * spec.n_layer)()
        """Data pointers of `_grads`, which keeps the tensors alive."""
        self._last_bias = torch.zeros(kernels.threads, kernels.shape[0])
        """Gradient of the last block's `mlp.c_proj.bias`, a row for each thread."""
        self._remaining: set[int] = set()
        """Windows whose backward pass is still due."""

    def begin_sequence(self, parameters: Sequence[Sequence[Tensor]]) -> Callable[[Tensor], Tensor]:
        """Start a text with the parameters of each block, in the order of the module.

        Returns:
            A function that takes the next window through all blocks: (B, S, C) -> (B, S, C).
        """
        assert self.is_free, "the workspace holds a text whose backward pass is due"
        self.is_free = not self.spec.trained
        weights = [_Weights(*(p.detach() for p in block)) for block in parameters]
        # The optimizer has changed the weights since the last text, so they are packed again.
        self._pack(weights)
        self._grads = [own.reset(of, self._workspace.weight_grads) for own, of in zip(self._own, weights, strict=False)]
        # Made once for all windows: filling such tables takes Python a tenth of a millisecond.
        self._param_grads = (ParamGrads * len(self._grads))(*(structure_of(ParamGrads, own._asdict()) for own in self._grads))
        self._last_bias.zero_()
        windows = range(len(self.spec.slots))
        self._remaining = set(windows)
        # Each window takes the token as an input, so autograd runs its backward pass after those of all windows: only then
        # the weight gradients are complete. The kernels add them up themselves; autograd would add window by window.
        token = _Parameters.apply(self, *(p for block in parameters for p in block))  # type: ignore[no-untyped-call]
        turns = iter(windows)
        return lambda x: _Blocks.apply(self, next(turns), x, token)  # type: ignore[no-untyped-call]

    def _pack(self, weights: list[_Weights]) -> None:
        """Pack the current values of all matrices for the GEMMs, once a step instead of once a window."""
        matrices = [getattr(block, name) for block in weights for name in _WGRAD_INPUTS]
        if not self._packed:
            self._packed = [packed for matrix in matrices for packed in self.kernels.packed(*matrix.shape)]
        self.kernels.pack(data_ptrs(matrices), data_ptrs(self._packed), len(weights))
        packed = iter(self._packed)
        for index, block in enumerate(weights):
            tensors = block._asdict()
            for name in _WGRAD_INPUTS:
                # Two packed copies of each matrix: W^T for forward, W for the gradient of the input.
                tensors[name], tensors[f"{name}_back"] = next(packed), next(packed)
            self._weights[index] = structure_of(LayerWeights, tensors)
        self._held = weights

    def _pass(self, window: int) -> Pass:
        """Return the arguments of the kernels for one window."""
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
        """Compute all blocks for the rows x (R, C) of one window; return (R, C)."""
        self._workspace.windows[window][0]["x"].copy_(x)
        out = torch.empty_like(x)
        self.kernels.forward(self._pass(window), out)
        return out

    def backward(self, window: int, dx: Tensor) -> None:
        """Turn dx (R, C), the gradient of the output of `forward`, into the gradient of its input, in place."""
        self._remaining.remove(window)
        assert dx.is_contiguous()
        grads = PassGrads(
            params=self._param_grads,
            dx=dx.data_ptr(),
            last_bias=self._last_bias.data_ptr(),
            weight_grads=self._workspace.weight_grads,
        )
        self.kernels.backward(self._pass(window), grads)

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all parameters, once all windows have gone backward, and free the workspace."""
        assert not self._remaining, f"windows {sorted(self._remaining)} have not gone backward"
        if self._workspace.weight_grads is WeightGrads.DEFERRED:
            for grads, activations in zip(self._grads, self._workspace.all_windows, strict=True):
                # dW = dY^T X over the rows of all windows.
                for name, (d_out, x) in _WGRAD_INPUTS.items():
                    self.kernels.weight_grad(activations[d_out], activations[x], getattr(grads, name))
        # The gradient of a block's last bias is computed by the next block's ln_1, which reads the residual stream.
        biases = [*(grads.ln1.sum(0)[2] for grads in self._grads[1:]), self._last_bias.sum(0)]
        found = [total for grads, bias in zip(self._grads, biases, strict=True) for total in grads.totals(bias)]
        self._grads = []
        self.is_free = True
        return found


class _Parameters(torch.autograd.Function):
    """Autograd node of all weights of a text: its backward pass runs after those of all windows and returns the sums."""

    @staticmethod
    def forward(ctx: Any, blocks: FusedBlocks, *parameters: Tensor) -> Tensor:
        ctx.blocks = blocks
        ctx.save_for_backward(*parameters)  # autograd raises if they are changed before backward
        return parameters[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.saved_tensors  # runs autograd's check of the versions
        return None, *ctx.blocks.gradients()


class _Blocks(torch.autograd.Function):
    """Autograd node of one window through all blocks."""

    @staticmethod
    def forward(ctx: Any, blocks: FusedBlocks, window: int, x: Tensor, token: Tensor) -> Tensor:  # noqa: ARG004 (for the graph)
        ctx.blocks, ctx.window = blocks, window
        # Detached: the workspace outlives the graph that x belongs to.
        return blocks.forward(window, x.detach().reshape(-1, x.size(-1))).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.blocks is None:
            raise RuntimeError("backward can run only once per forward; run forward again for a second one")
        blocks, ctx.blocks = ctx.blocks, None
        # A copy, as the kernels overwrite it: autograd may use this gradient elsewhere too.
        dx = gradient.reshape(-1, gradient.size(-1)).clone(memory_format=torch.contiguous_format)
        blocks.backward(ctx.window, dx)
        # The token's gradient is a zero: only its place in the graph matters.
        return None, None, dx.view_as(gradient), dx.new_zeros(())
