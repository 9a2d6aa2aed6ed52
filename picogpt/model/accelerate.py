"""Faster ways through the blocks of `picogpt.model.gpt`, attached to a model by training.

The native kernels compute all blocks of a window in one call. Without them torch computes the blocks one by one, with one of
the fast forms of attention. Both can recompute activations in the backward pass instead of keeping them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from picogpt.kernels.autograd import FusedBlocks
from picogpt.kernels.compiled import Kernels, WorkspaceSpec
from picogpt.model.attention import FORMS
from picogpt.model.gpt import GPT

__all__ = ["FastBlocks", "accelerate"]


class FastBlocks:
    """A `picogpt.model.gpt.BlockRunner` on native kernels, or on torch with a fast form of attention.

    Args:
        dropout: the model's probability that an activation is dropped.
        kernels: native kernels compiled for the model's shape; None computes the blocks with torch.
    """

    def __init__(self, dropout: float, kernels: Kernels | None = None) -> None:
        self.kernels = kernels
        # Torch's fused attention draws dropout one weight at a time, so with dropout the products are faster.
        self.attention = "products" if dropout else "fused"
        """Form of attention when torch computes the blocks, one of `picogpt.checks.ATTENTIONS`."""
        self.gradient_checkpointing = False
        """Whether activations are recomputed in the backward pass: bit-identical, less memory (Chen et al., 2016)."""
        # Only dropout draws random numbers, so only then recomputation has to restore the generator.
        self._draws = dropout > 0
        # Blocks whose workspace training steps reuse; a validation in between does not replace it.
        self._fused: FusedBlocks | None = None

    def begin_sequence(self, blocks: nn.ModuleList, batch_size: int, slots: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """Return a function that takes one window x (B, S, C) through `blocks`; `slots` lists S of each window."""
        if self.kernels is None:
            return functools.partial(self._run_modules, blocks)
        spec = WorkspaceSpec(len(blocks), batch_size, tuple(slots), torch.is_grad_enabled(), self.gradient_checkpointing)
        # Allocating activation buffers takes longer than filling them, so a step reuses those of the step before. New ones
        # are needed while a text's backward pass is still due, and after a change of shape, kernels or mode.
        fused = self._fused
        if fused is None or not fused.is_free or (fused.kernels, fused.spec) != (self.kernels, spec):
            fused = FusedBlocks(self.kernels, spec)
        if spec.trained:
            self._fused = fused
        return fused.begin_sequence([list(block.parameters()) for block in blocks])

    def _run_modules(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        attend = FORMS[self.attention]
        for block in blocks:
            if self.gradient_checkpointing and block.training:
                # Keep only x; the backward pass runs the block again.
                x = checkpoint(block, x, attend, use_reentrant=False, preserve_rng_state=self._draws)
            else:
                x = block(x, attend)
        return x


def accelerate(model: GPT, kernels: Kernels | None = None) -> FastBlocks:
    """Attach a faster way through its blocks to `model`, and return it: its settings can be changed between texts."""
    fast = FastBlocks(model.config.dropout, kernels)
    model.transformer.runner = fast
    return fast
