"""Activation buffers for all blocks and windows of a text, and of the next one: allocating them takes longer than filling them.

R rows are those of one window, N those of a whole text: one for each slot of each roll.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from picogpt.kernels.bindings import Save, WeightGrads
from picogpt.kernels.compiled import Kernels, WorkspaceSpec

__all__ = ["Workspace"]


class _Buffer(NamedTuple):
    """The rows of one activation."""

    width: int
    dtype: torch.dtype
    kept: bool = False
    """Whether each block and window has rows of its own until the text is through; else all of them share one window's."""


class Workspace:
    """Memory for all blocks and windows.

    Args:
        kernels: what computes.
        use: what for.
    """

    def __init__(self, kernels: Kernels, spec: WorkspaceSpec) -> None:
        self._n_layer, self._sizes = spec.n_layer, [spec.sequences * slots for slots in spec.slots]
        deferred = spec.save is Save.ACTIVATIONS and kernels.dtype == torch.bfloat16
        self.weight_grads = WeightGrads.DEFERRED if deferred else WeightGrads.PER_WINDOW
        """Deferred, the inputs of the weight gradients stay until all windows are through: in float32 twice the memory."""
        self.all_windows: list[dict[str, Tensor]] = [{} for _ in range(spec.n_layer)]
        """Activations that are kept, of all windows (N, width), by block and name."""
        parts = {}
        for name, buffer in _buffers(kernels, spec.save, self.weight_grads).items():
            parts[name], wholes = self._cut(buffer)
            for block, whole in zip(self.all_windows, wholes, strict=False):
                block[name] = whole
        self.windows = [
            [{name: part[index][window] for name, part in parts.items()} for index in range(spec.n_layer)]
            for window in range(len(self._sizes))
        ]
        """Activations by window, block and name."""

    def _cut(self, buffer: _Buffer) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Rows by block and window; and by block those of all windows, where they are kept."""
        if not buffer.kept:
            shared = torch.empty(max(self._sizes), buffer.width, dtype=buffer.dtype)
            return [[shared[:size] for size in self._sizes] for _ in range(self._n_layer)], []
        wholes = [torch.empty(sum(self._sizes), buffer.width, dtype=buffer.dtype) for _ in range(self._n_layer)]
        return [list(torch.split(whole, self._sizes)) for whole in wholes], wholes


def _buffers(kernels: Kernels, save: Save, weight_grads: WeightGrads) -> dict[str, _Buffer]:
    """Each field of `picogpt.kernels.bindings.Activations`: its width, type, and whether it is kept."""
    width, n_head, _ = kernels.shape
    products, exact = kernels.dtype, torch.float32
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
        "qkv_scratch": _Buffer(3 * width, products),
        "fc_scratch": _Buffer(4 * width, products),
        "ln_scratch": _Buffer(width, products),
        "branch": _Buffer(width, products),
    }
