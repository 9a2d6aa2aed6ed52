"""The model without its head as one autograd function over the native kernels.

Weight gradients are deferred until all windows have gone backward: one GEMM over all rows of a batch. In float32, where
their inputs take twice the memory, that gains nothing if a step has several sequences: then they are accumulated window by
window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import Array, c_int32
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from picogpt.kernels.bindings import Activations, Batch, BatchGrads, LayerWeights, ParamGrads, WeightGrads
from picogpt.kernels.compiled import Kernels, WorkspaceSpec, data_ptrs, structure_of
from picogpt.kernels.workspace import Workspace

__all__ = ["FusedTransformer"]


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


class _VectorGrads(NamedTuple):
    """Gradients of the vectors of all blocks, each field of `picogpt.kernels.bindings.ParamGrads` in one tensor.

    They have a row for each thread or sequence: threads add to rows of their own without locks, and `totals` sums the rows.
    """

    ln1: Tensor
    """(layers + 1, threads, 3, C): LayerNorm weight and bias, and the bias of the GEMM whose output was normalized.

    The last entry belongs to the final LayerNorm.
    """
    attn_bias: Tensor
    """(layers, sequences, 3C)."""
    ln2: Tensor
    """(layers, threads, 3, C), like ln1."""
    fc_bias: Tensor
    """(layers, threads, 4C)."""

    @classmethod
    def make(cls, kernels: Kernels, spec: WorkspaceSpec) -> _VectorGrads:
        """Allocate the gradients."""
        (width, _, _), threads, layers = kernels.shape, kernels.threads, spec.n_layer
        return cls(
            ln1=torch.empty(layers + 1, threads, 3, width),
            attn_bias=torch.empty(layers, spec.sequences, 3 * width),
            ln2=torch.empty(layers, threads, 3, width),
            fc_bias=torch.empty(layers, threads, 4 * width),
        )

    def totals(self) -> _VectorGrads:
        """Sum over threads and sequences: each field loses its second dimension."""
        return _VectorGrads(*(field.sum(1) for field in self))


class FusedTransformer:
    """The model without its head on the native kernels, for batches of one shape.

    Args:
        kernels: native kernels compiled for the model's shape.
        spec: what the workspace is allocated for.
    """

    def __init__(self, kernels: Kernels, spec: WorkspaceSpec) -> None:
        self.kernels, self.spec = kernels, spec
        self.is_free = True
        """Whether the workspace is free: no batch waits for its backward pass."""
        self._workspace = Workspace(kernels, spec)
        width, entries = kernels.shape[0], spec.n_layer + 1
        # Tables of pointers, made once: the buffers stay where they are. The weights' is filled for each batch.
        blocks = [block for window in self._workspace.windows for block in window]
        self._activations = (Activations * len(blocks))(*(structure_of(Activations, block) for block in blocks))
        self._slots = (c_int32 * len(spec.slots))(*spec.slots)
        self._weights = (LayerWeights * entries)()
        self._packed: list[Tensor] = []
        self._residual = torch.empty(spec.sequences * max(spec.slots), width)
        self._context = torch.empty(spec.sequences, width)
        self._vectors = _VectorGrads.make(kernels, spec) if spec.trained else None

    def hidden_states(self, idx: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Return the final hidden states (B, T, C) of the ids (B, T), in the kernels' dtype.

        Args:
            idx: ids.
            parameters: those of `picogpt.model.gpt.GPT.transformer`, in the order of the module.
        """
        # The kernels look embeddings up without a check, and see bare pointers.
        assert idx.dtype == torch.int64
        assert all(parameter.dtype == torch.float32 for parameter in parameters)
        assert 0 <= int(idx.min()) <= int(idx.max()) < len(parameters[0]), "an id is not in the vocabulary"
        hidden: Tensor = _Batch.apply(self, idx.contiguous(), *parameters)  # type: ignore[no-untyped-call]
        return hidden

    def forward(self, idx: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Batch]:
        """Compute the final hidden states (B, T, C); return them, and the arguments of the kernels for `backward`.

        All tensors must stay alive, and as they are, until then.
        """
        assert self.is_free, "the workspace holds a batch whose backward pass is due"
        self.is_free = not self.spec.trained
        wte, wpe, *_, ln_f_weight, ln_f_bias = parameters
        # All of them, each time: torch does not count every change of a weight (those of a fused AdamW, for one), so which ones
        # the optimizer has changed since the last batch cannot be told.
        self._pack(_blocks_of(parameters))
        self._weights[self.spec.n_layer] = LayerWeights(ln1_weight=ln_f_weight.data_ptr(), ln1_bias=ln_f_bias.data_ptr())
        hidden = torch.empty(*idx.shape, self.kernels.shape[0], dtype=self.kernels.dtype)
        batch = Batch(
            weights=self._weights,
            activations=self._activations,
            wte=wte.data_ptr(),
            wpe=wpe.data_ptr(),
            ids=idx.data_ptr(),
            slots=self._slots,
            hidden=hidden.data_ptr(),
            residual=self._residual.data_ptr(),
            context=self._context.zero_().data_ptr(),
            layers=self.spec.n_layer,
            sequences=self.spec.sequences,
            windows=len(self.spec.slots),
            chars=idx.size(1),
            threads=self.kernels.threads,
            save=self.spec.save,
        )
        self.kernels.forward(batch)
        return hidden, batch

    def _pack(self, blocks: Sequence[_Weights]) -> None:
        """Pack the current values of all matrices for the GEMMs, once a step instead of once a window."""
        matrices = [getattr(block, name) for block in blocks for name in _WGRAD_INPUTS]
        if not self._packed:
            self._packed = [packed for matrix in matrices for packed in self.kernels.packed(*matrix.shape)]
        self.kernels.pack(data_ptrs(matrices), data_ptrs(self._packed), len(blocks))
        packed = iter(self._packed)
        for index, block in enumerate(blocks):
            tensors = block._asdict()
            for name in _WGRAD_INPUTS:
                # Two packed copies of each matrix: W^T for forward, W for the gradient of the input.
                tensors[name], tensors[f"{name}_back"] = next(packed), next(packed)
            self._weights[index] = structure_of(LayerWeights, tensors)

    def backward(self, batch: Batch, d_hidden: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of all parameters, given that of what `forward` returned, and free the workspace."""
        assert self._vectors is not None, "not allocated for training"
        wte, wpe, *_ = parameters
        # Autograd keeps the gradients that it gets, so each batch has new ones.
        d_wte, d_wpe = torch.zeros_like(wte), torch.zeros_like(wpe)
        deferred = self._workspace.weight_grads is WeightGrads.DEFERRED
        # Written by the first window that goes backward, or by one GEMM.
        matrices = [{name: torch.empty_like(getattr(block, name)) for name in _WGRAD_INPUTS} for block in _blocks_of(parameters)]
        for field in self._vectors:
            field.zero_()
        d_hidden = d_hidden.contiguous()
        grads = BatchGrads(
            params=self._param_grads(matrices),
            wte=d_wte.data_ptr(),
            wpe=d_wpe.data_ptr(),
            hidden=d_hidden.data_ptr(),
            weight_grads=self._workspace.weight_grads,
        )
        self._context.zero_()
        self.kernels.backward(batch, grads)
        if deferred:
            for of_block, activations in zip(matrices, self._workspace.all_windows, strict=False):
                # dW = dY^T X over the rows of all windows.
                for name, (d_out, x) in _WGRAD_INPUTS.items():
                    self.kernels.weight_grad(activations[d_out], activations[x], of_block[name])
        self.is_free = True
        return [d_wte, d_wpe, *_in_order(matrices, self._vectors.totals())]

    def _param_grads(self, matrices: Sequence[Mapping[str, Tensor]]) -> Array[ParamGrads]:
        """Return the table of where the gradients of all blocks go, and those of the final LayerNorm."""
        assert self._vectors is not None
        ln1, attn_bias, ln2, fc_bias = self._vectors
        table = (ParamGrads * (self.spec.n_layer + 1))()
        for index, of_block in enumerate(matrices):
            vectors = {"ln1": ln1[index], "attn_bias": attn_bias[index], "ln2": ln2[index], "fc_bias": fc_bias[index]}
            table[index] = structure_of(ParamGrads, vectors | dict(of_block))
        table[self.spec.n_layer] = ParamGrads(ln1=ln1[-1].data_ptr())
        return table


def _in_order(matrices: Sequence[Mapping[str, Tensor]], vectors: _VectorGrads) -> list[Tensor]:
    """Return the gradients of all blocks and of the final LayerNorm, in the order of the module's parameters."""
    found: list[Tensor] = []
    for index, of_block in enumerate(matrices):
        ln1_weight, ln1_bias, _ = vectors.ln1[index]
        # A bias is added to the residual stream in front of the next LayerNorm, which computes its gradient.
        ln2_weight, ln2_bias, proj_bias = vectors.ln2[index]
        out_bias = vectors.ln1[index + 1][2]
        found += _Weights(
            ln1_weight, ln1_bias, of_block["attn"], vectors.attn_bias[index], of_block["proj"], proj_bias,
            ln2_weight, ln2_bias, of_block["fc"], vectors.fc_bias[index], of_block["out"], out_bias,
        )  # fmt: skip
    ln_f_weight, ln_f_bias, _ = vectors.ln1[-1]
    return [*found, ln_f_weight, ln_f_bias]


def _blocks_of(parameters: Sequence[Tensor]) -> list[_Weights]:
    """Return the parameters of each block, without the two embeddings before and the final LayerNorm after them."""
    size = len(_Weights._fields)
    return [_Weights(*parameters[start : start + size]) for start in range(2, len(parameters) - 2, size)]


class _Batch(torch.autograd.Function):
    """Autograd node of the model without its head, for a whole batch."""

    @staticmethod
    def forward(ctx: Any, fused: FusedTransformer, idx: Tensor, *parameters: Tensor) -> Tensor:
        hidden, batch = fused.forward(idx, parameters)
        ctx.fused, ctx.batch, ctx.idx = fused, batch, idx
        ctx.save_for_backward(*parameters)  # autograd raises if they are changed before backward
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.fused is None:
            raise RuntimeError("backward can run only once per forward; run forward again for a second one")
        fused, ctx.fused = ctx.fused, None
        return None, None, *fused.backward(ctx.batch, d_hidden, ctx.saved_tensors)
