"""Activation buffers for all blocks and windows of a batch, reused for the next batch.

They are reused because allocating them takes longer than filling them.

Dimensions: R rows of one window, N rows of a whole batch: one row for each slot of each sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

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
    """Activation buffers for all blocks and windows of a batch, and for the final LayerNorm.

    Args:
        kernels: native kernels that fill the buffers.
        spec: what the buffers are allocated for.
    """

    def __init__(self, kernels: Kernels, spec: WorkspaceSpec) -> None:
        sizes = [spec.sequences * slots for slots in spec.slots]
        # With recomputation the inputs of the weight gradients do not outlive their window, so nothing can be deferred.
        # Several sequences in float32 would take too much memory, and have more rows for each pass over the gradients.
        deferred = spec.save is Save.ACTIVATIONS and (kernels.dtype == torch.bfloat16 or spec.sequences == 1)
        self.weight_grads = WeightGrads.DEFERRED if deferred else WeightGrads.PER_WINDOW
        """Deferred weight gradients keep their inputs until all windows are done, so that each gradient is written once."""
        buffers = _buffers(kernels, spec.save, self.weight_grads)
        shared = {name: torch.empty(max(sizes), b.width, dtype=b.dtype) for name, b in buffers.items() if not b.kept}
        self.all_windows = [
            {name: torch.empty(sum(sizes), b.width, dtype=b.dtype) for name, b in of_layer.items() if b.kept}
            for of_layer in [buffers] * spec.n_layer + [_final_buffers(buffers, spec)]
        ]
        """Kept activations of all windows (N, width), by block and name; after the blocks those of the final LayerNorm."""
        rows = [{name: torch.split(whole, sizes) for name, whole in kept.items()} for kept in self.all_windows]
        self.windows = [
            [{name: kept[name][i] if name in kept else shared[name][:size] for name in buffers} for kept in rows]
            for i, size in enumerate(sizes)
        ]
        """Activations (R, width) by window, block and name: views of `all_windows`, or of shared rows."""


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


def _final_buffers(buffers: Mapping[str, _Buffer], spec: WorkspaceSpec) -> dict[str, _Buffer]:
    """Return those of `buffers` that the final LayerNorm has, as ln1 of a block that does not exist; the others are empty."""
    # Its statistics are kept even where those of the blocks are recomputed.
    own = {name: buffers[name]._replace(kept=spec.trained) for name in ("x", "ln1_stats")}
    return {name: own.get(name, buffer._replace(width=0) if buffer.kept else buffer) for name, buffer in buffers.items()}
