"""A faster way to compute the hidden states of `picogpt.model.gpt`, attached to a model by training.

The native kernels compute a whole text in one call. Without them torch computes the windows block by block, with one of
the fast forms of attention. Both can recompute activations in the backward pass instead of keeping them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from picogpt.kernels.autograd import FusedTransformer
from picogpt.kernels.compiled import Kernels, WorkspaceSpec
from picogpt.model.attention import FORMS
from picogpt.model.gpt import GPT, without_context_slots
from picogpt.model.roll import window_spans

__all__ = ["FastRunner", "accelerate"]


class FastRunner:
    """A `picogpt.model.gpt.Runner` on native kernels, or on torch with a fast form of attention.

    Args:
        dropout: the model's probability that an activation is dropped.
        kernels: native kernels compiled for the model's shape; None computes with torch.
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
        # Its workspace is reused by all training steps; a validation in between does not replace it.
        self._fused: FusedTransformer | None = None

    def hidden_states(self, model: GPT, idx: Tensor) -> Tensor:
        """Compute the final hidden states of all characters: ids (B, T) -> (B, T, C)."""
        if self.kernels is None:
            return without_context_slots(model.roll(idx, lambda x: self.run_blocks(model, x)))
        slots = tuple(end - start + 1 for start, end in window_spans(idx.size(1), model.config.context_len))
        spec = WorkspaceSpec(model.config.n_layer, len(idx), slots, torch.is_grad_enabled(), self.gradient_checkpointing)
        # Allocating activation buffers takes longer than filling them, so a step reuses those of the step before. New ones
        # are needed while a text's backward pass is still due, and after a change of shape, kernels or mode.
        fused = self._fused
        if fused is None or not fused.is_free or (fused.kernels, fused.spec) != (self.kernels, spec):
            fused = FusedTransformer(self.kernels, spec)
        if spec.trained:
            self._fused = fused
        return fused.hidden_states(idx, list(model.transformer.parameters()))

    def run_blocks(self, model: GPT, x: Tensor) -> Tensor:
        """Take one window x (B, S, C) through all blocks, by torch."""
        attend = FORMS[self.attention]
        for block in model.transformer.h:
            if self.gradient_checkpointing and block.training:
                # Keep only x; the backward pass runs the block again.
                x = checkpoint(block, x, attend, use_reentrant=False, preserve_rng_state=self._draws)
            else:
                x = block(x, attend)
        return x


def accelerate(model: GPT, kernels: Kernels | None = None) -> FastRunner:
    """Attach a faster way to compute its hidden states to `model`, and return it: its settings can be changed between texts."""
    model.runner = FastRunner(model.config.dropout, kernels)
    return model.runner
