"""Activation buffers for all blocks and windows of a text, reused for the next text.

They are reused because allocating them takes longer than filling them.

Dimensions: R rows of one window, N rows of a whole text: one row for each slot of each sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from picogpt.kernels.bindings import Save, WeightGrads
from picogpt.kernels.compiled import Kernels, WorkspaceSpec

__all__ = ["Workspace"]


class _Buffer(NamedTuple):
    """Width, dtype and lifetime of one activation."""

    width: int
    dtype: torch.dtype
    kept: bool = False
    """Whether each block and window has rows of its own until the backward pass; else all share the rows of one window."""


class Workspace:
    """Activation buffers for all blocks and windows of a text.

    Args:
        kernels: native kernels that fill the buffers.
        spec: what the buffers are allocated for.
    """

    def __init__(self, kernels: Kernels, spec: WorkspaceSpec) -> None:
        self._n_layer, self._sizes = spec.n_layer, [spec.sequences * slots for slots in spec.slots]
        # With recomputation the inputs of the weight gradients do not outlive their window, so nothing can be deferred.
        # Several sequences in float32 would take too much memory, and have more rows for each pass over the gradients.
        deferred = spec.save is Save.ACTIVATIONS and (kernels.dtype == torch.bfloat16 or spec.sequences == 1)
        self.weight_grads = WeightGrads.DEFERRED if deferred else WeightGrads.PER_WINDOW
        """Deferred weight gradients keep their inputs until all windows are done, so that each gradient is written once."""
        self.all_windows: list[dict[str, Tensor]] = [{} for _ in range(spec.n_layer)]
        """Kept activations of all windows (N, width), by block and name."""
        parts = {}
        for name, buffer in _buffers(kernels, spec.save, self.weight_grads).items():
            parts[name], wholes = self._cut(buffer)
            for block, whole in zip(self.all_windows, wholes, strict=False):
                block[name] = whole
        self.windows = [
            [{name: part[index][window] for name, part in parts.items()} for index in range(spec.n_layer)]
            for window in range(len(self._sizes))
        ]
        """Activations (R, width) by window, block and name: views of `all_windows`, or of shared rows."""

    def _cut(self, buffer: _Buffer) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Allocate a buffer; return its rows by block and window, and for kept buffers the rows of all windows by block."""
        if not buffer.kept:
            shared = torch.empty(max(self._sizes), buffer.width, dtype=buffer.dtype)  # (max R, width)
            return [[shared[:size] for size in self._sizes] for _ in range(self._n_layer)], []
        wholes = [torch.empty(sum(self._sizes), buffer.width, dtype=buffer.dtype) for _ in range(self._n_layer)]
        return [list(torch.split(whole, self._sizes)) for whole in wholes], wholes


def _buffers(kernels: Kernels, save: Save, weight_grads: WeightGrads) -> dict[str, _Buffer]:
    """Return width, dtype and lifetime of each field of `picogpt.kernels.bindings.Activations`."""
    width, n_head, _ = kernels.shape
    products, exact = kernels.dtype, torch.float32
    # "x" is kept for any training; most others only where nothing is recomputed; GEMM outputs and inputs only if deferred.
    trained, kept, deferred = save is not Save.NOTHING, save is Save.ACTIVATIONS, weight_grads is WeightGrads.DEFERRED
    return {
        "x": _Buffer(width, exact, trained),
        "ln1_stats": _Buffer(2, exact, kept),
        "ln1_out": _Buffer(width, products, deferred),
        "qkv": _Buffer(3 * width, products, kept),
        "att_out": _Buffer(width, products, kept),
        "softmax_stats": _Buffer(2 * n_head, exact, kept),
        "resid_mid": _Buffer(width, exact, kept),
        "ln2_stats": _Buffer(2, exact, kept),
        "ln2_out": _Buffer(width, products, deferred),
        "fc": _Buffer(4 * width, products, kept),
        "fc_gelu": _Buffer(4 * width, products, deferred),
        "d_mlp_out": _Buffer(width, products, deferred),
        "d_attn_out": _Buffer(width, products, deferred),
        # Scratch of the backward pass and of recomputation: never kept.
        "qkv_scratch": _Buffer(3 * width, products),
        "fc_scratch": _Buffer(4 * width, products),
        "ln_scratch": _Buffer(width, products),
        "branch": _Buffer(width, products),
    }
