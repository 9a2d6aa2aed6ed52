"""Dropout (Srivastava et al., 2014) with fast random numbers on a CPU.

Torch's dropout draws a number for each activation, which takes longer than attention itself. Here a draw of 64 bits decides on
four.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Dropout", "keep_mask"]

_BITS = 16
"""Random bits of each decision: a probability is met to within 1 in 131,072."""
_PER_DRAW = 64 // _BITS


def keep_mask(like: Tensor, p: float) -> Tensor:
    """Draw a dropout mask.

    Args:
        like: the mask has its shape, type and device.
        p: probability that an activation is dropped, in [0, 1).

    Returns:
        0 where an activation is dropped, 1 / (1 - p) elsewhere, so that the mean stays; drawn from the device's generator.
    """
    # One 64-bit draw is cut into four 16-bit integers, uniform in [-2^15, 2^15).
    draws = torch.empty(-(-like.numel() // _PER_DRAW), dtype=torch.int64, device=like.device)
    bits = draws.random_(-(2**63), None).view(torch.int16)[: like.numel()].view(like.shape)
    # bits >= threshold has probability 1 - p; the min keeps a p close to 1 from dropping everything.
    threshold = min(round(p * 2**_BITS), 2**_BITS - 1) - 2 ** (_BITS - 1)
    # Write 0 and 1 straight into the mask's type: a boolean mask would need one more pass.
    return torch.ge(bits, threshold, out=torch.empty_like(like, memory_format=torch.contiguous_format)).mul_(1 / (1 - p))


class Dropout(nn.Module):
    """Drops activations in training with probability `p`, in [0, 1)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop activations of x, of any shape, in training mode; return x itself otherwise."""
        return x * keep_mask(x.detach(), self.p) if self.training and self.p else x
