"""The GPT with a context roll, in plain torch: attention, MLP, block, one window, the roll over windows, the loss.

The blocks are those of GPT-2 in the form of nanoGPT (github.com/karpathy/nanoGPT), whose state-dict names are kept.
New is the slot in front of each window: it carries the mean output of the window before it, the idea of the PicoGPT
project. This module knows tensors only; text, files and devices belong to other modules.

Dimensions: B sequences in a batch, T characters of a sequence, n characters of one window, S = n + 1 slots of a window (the
context slot and its characters), C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from picogpt.config import GPTConfig
from picogpt.errors import RunError
from picogpt.kernels.autograd import FusedBlocks
from picogpt.kernels.compiled import Kernels, WorkspaceSpec
from picogpt.model.attention import causal_attention, causal_mask
from picogpt.model.dropout import Dropout
from picogpt.model.roll import window_spans

__all__ = ["GPT", "MLP", "Block", "CausalSelfAttention"]


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention: each slot attends to itself and to the slots before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v of all heads in one GEMM
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)  # output projection
        self.dropout = config.dropout
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within one window: x (B, S, C) -> (B, S, C); `mask` is (S, S), or None for torch's fused kernel."""
        qkv = self.c_attn(x)  # (B, S, C) -> (B, S, 3C)
        # For each head, with q, k, v (S, D) cut out of qkv and mask 0 on and below the diagonal, -inf above it:
        #     scores = q @ k.T / sqrt(D) + mask     (S, S): row i has a score for each slot up to i
        #     weights = softmax(scores, dim=-1)     (S, S): each row sums to 1
        #     y = dropout(weights) @ v              (S, D)
        # `causal_attention` computes just that for all heads at once, by torch's fused kernel or by two batched products.
        y = causal_attention(qkv, mask, self.n_head, self.dropout if self.training else 0.0)  # (B, S, 3C) -> (B, S, C)
        out: Tensor = self.resid_dropout(self.c_proj(y))  # (B, S, C)
        return out


class MLP(nn.Module):
    """Two linear layers with an exact (erf) GELU between them; the hidden layer is four times as wide."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)  # C -> 4C
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)  # 4C -> C
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to each slot by itself: (B, S, C) -> (B, S, C)."""
        x = F.gelu(self.c_fc(x))  # (B, S, 4C)
        out: Tensor = self.dropout(self.c_proj(x))  # (B, S, C)
        return out


class Block(nn.Module):
    """Transformer block: attention and MLP, each with a pre-LayerNorm and a residual connection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Apply the block to one window: x (B, S, C) -> (B, S, C); `mask` as in `CausalSelfAttention.forward`."""
        x = x + self.attn(self.ln_1(x), mask)  # (B, S, C)
        out: Tensor = x + self.mlp(self.ln_2(x))  # (B, S, C)
        return out


class _Transformer(nn.Module):
    """The model for one window: context vector and characters in, outputs after the final LayerNorm out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # (V, C)
        self.wpe = nn.Embedding(config.context_len + 1, config.n_embd)  # one position more than characters: the context slot
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        # Whether activations are recomputed in the backward pass: bit-identical, less memory (checkpointing, Chen et al., 2016).
        self.gradient_checkpointing = False
        # Form of attention when torch computes the blocks, one of `picogpt.checks.ATTENTIONS`.
        self.attention = "products" if config.dropout else "fused"
        # Native kernels compiled for this shape; None computes the blocks with torch.
        self.kernels: Kernels | None = None
        # Blocks whose workspace training steps reuse; a validation in between does not replace it.
        self._fused: FusedBlocks | None = None
        # Only dropout draws random numbers, so only then recomputation has to restore the generator.
        self._draws = config.dropout > 0
        # Not part of the state dict: the mask follows from the shape.
        self.mask: Tensor
        self.register_buffer("mask", causal_mask(config.context_len + 1), persistent=False)

    def blocks(self, sequences: int, slots: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """Return a function that takes one window x (B, S, C) through all blocks.

        The function is called once for each window of a text, in order; `slots` lists S of each window.
        """
        if self.kernels is None:
            return self._through_modules
        spec = WorkspaceSpec(len(self.h), sequences, tuple(slots), torch.is_grad_enabled(), self.gradient_checkpointing)
        # Allocating activation buffers takes longer than filling them, so a step reuses those of the step before. New ones
        # are needed while a text's backward pass is still due, and after a change of shape, kernels or mode.
        fused = self._fused
        if fused is None or not fused.is_free or (fused.kernels, fused.spec) != (self.kernels, spec):
            fused = FusedBlocks(self.kernels, spec)
        if spec.trained:
            self._fused = fused
        return fused.begin_sequence([list(block.parameters()) for block in self.h])

    def _through_modules(self, x: Tensor) -> Tensor:
        # The first window of a sequence can be shorter than the others.
        mask = self.mask[: x.size(1), : x.size(1)] if self.attention == "products" else None
        for block in self.h:
            if self.gradient_checkpointing and self.training:
                # Keep only x; the backward pass runs the block again.
                x = checkpoint(block, x, mask, use_reentrant=False, preserve_rng_state=self._draws)
            else:
                x = block(x, mask)
        return x

    def forward(self, idx: Tensor, context: Tensor, blocks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Compute the outputs of one window.

        Args:
            idx: ids (B, n).
            context: context vector of the window before (B, C).
            blocks: the function that `blocks` returned for the whole text; None for a single window.

        Returns:
            Outputs after the final LayerNorm (B, S, C).
        """
        # The context vector takes slot 0, where other models have a start token.
        x = torch.cat((context.unsqueeze(1), self.wte(idx)), dim=1)  # (B, S, C)
        x = self.drop(x + self.wpe.weight[: x.size(1)])  # (B, S, C) + (S, C)
        x = (blocks or self.blocks(x.size(0), [x.size(1)]))(x)  # (B, S, C)
        out: Tensor = self.ln_f(x)  # (B, S, C)
        return out


class GPT(nn.Module):
    """A GPT that reads a text of any length window by window; slot 0 of each window is the mean output of the one before.

    Calling the model returns `logits, loss`: see `forward`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = _Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)  # (V, C)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press and Wolf, 2017)
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # GPT-2: 2 * n_layer residual branches add up, so each starts smaller by the root of that number.
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def num_params(self, *, positions: bool = True) -> int:
        """Return the number of trained parameters, the tied head counted once; `positions` includes the position table."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total if positions else total - self.transformer.wpe.weight.numel()

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the weights by name, as arrays that share the model's memory on a CPU; the tied head appears once, as `wte`."""
        return {name: parameter.detach().cpu().numpy() for name, parameter in self.named_parameters()}

    def load_arrays(self, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        """Copy `weights` into the model; the tied `lm_head.weight` is optional.

        Raises:
            RunError: a tensor is missing, unknown or of another shape; the model is unchanged.
        """
        expected = dict(self.named_parameters())
        found = {name: array for name, array in weights.items() if name != "lm_head.weight"}
        # Check every name and shape before anything is copied.
        for name in sorted(expected.keys() | found.keys()):
            want = tuple(expected[name].shape) if name in expected else "none"
            have = found[name].shape if name in found else "none"
            if want != have:
                raise RunError(f"the weights are of another model: {name} should have shape {want}, got {have}")
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(torch.from_numpy(np.array(found[name])))

    def roll(self, idx: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Compute idx (B, T) window by window, passing the context vector from each window to the next.

        Yields, for each window, its outputs after the final LayerNorm (B, S, C) and its context vector (B, C): their
        mean over all S slots, the context slot included. The next window starts from it, and gradients flow through it.
        """
        # The first window has no window before it: its context vector is zero.
        context = self.transformer.wte.weight.new_zeros(idx.size(0), self.config.n_embd)  # (B, C)
        # Where T is no multiple of the window, the first window is the short one.
        spans = window_spans(idx.size(1), self.config.context_len)
        blocks = self.transformer.blocks(idx.size(0), [end - start + 1 for start, end in spans])
        for start, end in spans:
            h = self.transformer(idx[:, start:end], context, blocks)  # (B, S, C)
            # The context roll: context_{i+1} = mean over S of h_i. Gradients flow back through it into all windows before.
            context = h.mean(dim=1)  # (B, C)
            yield h, context

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict the character after each character of `idx`.

        Args:
            idx: ids (B, T), any T >= 1.
            targets: the ids (B, T) that should follow, or None.

        Returns:
            With targets, the logits (B, T, V) and the mean cross-entropy in nats over all B x T characters, each
            counted once. Without, the logits of the last character alone (B, 1, V), and None.
        """
        outputs = [h for h, _ in self.roll(idx)]
        if targets is None:
            return self.lm_head(outputs[-1][:, -1:]), None  # (B, 1, V)
        # Slot 0 of each window is the context slot, which predicts nothing.
        hidden = torch.cat([h[:, 1:] for h in outputs], dim=1)  # (B, T, C)
        logits: Tensor = self.lm_head(hidden)  # (B, T, V)
        # In float32 also under autocast: bfloat16 is too coarse for a mean over thousands of characters.
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())  # (B * T, V), (B * T,) -> scalar
        return logits, loss
