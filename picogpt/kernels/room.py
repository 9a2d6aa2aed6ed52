"""Memory for what the blocks make of a text, and of the next one: it takes longer to have it from the system than to fill it.

R rows are those of one window, N those of a whole text: one for each slot of each roll.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from picogpt.kernels.compiled import Kernels, Use

__all__ = ["Room", "Values"]


class Values(NamedTuple):
    """What a block makes of one window, in block.c's order. Gradients are written onto what has been read for the last time."""

    x: Tensor
    """What the block begins with (R, C)."""
    statistics_1: Tensor
    """Of 2 R numbers, each row's mean, and then what the distance from it was multiplied by."""
    normed_1: Tensor
    """What the first LayerNorm gives (R, C); like `normed_2` and `active` it is written in the backward pass."""
    qkv: Tensor
    """(R, 3C), and at last its gradient."""
    read: Tensor
    """What the heads read (R, C)."""
    scores: Tensor
    """Of 2 R H numbers, the largest score of each slot, and then 1 over the sum of their exponentials; by roll, head and slot."""
    middle: Tensor
    statistics_2: Tensor
    normed_2: Tensor
    hidden: Tensor
    """(R, 4C), and at last its gradient."""
    active: Tensor
    d_branch: Tensor
    """Gradient of what the feed-forward layer adds."""
    d_middle: Tensor
    """Gradient of what attention adds, in the type of the products."""
    fresh: Tensor
    """(R, 3C), for what is read right after it is written; so are `wide` (R, 4C), `narrow` and `branch` (R, C)."""
    wide: Tensor
    narrow: Tensor
    branch: Tensor


class _Rows(NamedTuple):
    """Rows of one of the values."""

    width: int
    dtype: torch.dtype
    kept: bool = False
    """Whether those of each block and window stay until the text is through; else the next ones are written over them."""


class Room:
    """Memory for all blocks and windows.

    Args:
        kernels: what computes.
        use: what for.
    """

    def __init__(self, kernels: Kernels, use: Use) -> None:
        self._n_layer, self._sizes = use.n_layer, [use.rolls * slots for slots in use.slots]
        kept = use.trained and not use.recompute
        self.at_once = kept and kernels.dtype == torch.bfloat16
        """Whether all that the gradients of matrices are made of stays until all windows are through."""
        self.wholes: list[dict[str, Tensor]] = [{} for _ in range(use.n_layer)]
        """Values that stay, of all windows (N, width), by block and name."""
        parts = {}
        for name, rows in _rows_of_values(kernels, trained=use.trained, kept=kept, at_once=self.at_once).items():
            parts[name], wholes = self._cut(rows)
            for block, whole in zip(self.wholes, wholes, strict=False):
                block[name] = whole
        self.values = [
            [Values(**{name: part[index][window] for name, part in parts.items()}) for index in range(use.n_layer)]
            for window in range(len(self._sizes))
        ]
        """By window and block."""

    def _cut(self, rows: _Rows) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Rows by block and window; and by block those of all windows, where they stay."""
        if not rows.kept:
            shared = torch.empty(max(self._sizes), rows.width, dtype=rows.dtype)
            return [[shared[:size] for size in self._sizes] for _ in range(self._n_layer)], []
        wholes = [torch.empty(sum(self._sizes), rows.width, dtype=rows.dtype) for _ in range(self._n_layer)]
        return [list(torch.split(whole, self._sizes)) for whole in wholes], wholes


def _rows_of_values(kernels: Kernels, *, trained: bool, kept: bool, at_once: bool) -> dict[str, _Rows]:
    """What `Values` are; `kept` for the backward pass, or also `at_once` for what comes after it."""
    width, n_head, _ = kernels.shape
    number, exact = kernels.dtype, torch.float32
    return {
        "x": _Rows(width, exact, trained),
        "statistics_1": _Rows(2, exact, kept),
        "normed_1": _Rows(width, number, at_once),
        "qkv": _Rows(3 * width, number, kept),
        "read": _Rows(width, number, kept),
        "scores": _Rows(2 * n_head, exact, kept),
        "middle": _Rows(width, exact, kept),
        "statistics_2": _Rows(2, exact, kept),
        "normed_2": _Rows(width, number, at_once),
        "hidden": _Rows(4 * width, number, kept),
        "active": _Rows(4 * width, number, at_once),
        "d_branch": _Rows(width, number, at_once),
        "d_middle": _Rows(width, number, at_once),
        "fresh": _Rows(3 * width, number),
        "wide": _Rows(4 * width, number),
        "narrow": _Rows(width, number),
        "branch": _Rows(width, number),
    }
