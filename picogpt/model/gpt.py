"""The GPT with a context roll, top-down: attention, MLP, block, one window, the roll, the loss.

The blocks are those of GPT-2 in the form of nanoGPT (github.com/karpathy/nanoGPT), whose state-dict names are kept.
New is the slot in front of each window: it carries the mean output of the window before it, the idea of the PicoGPT
project. Knows tensors only; text, files and devices are other modules' business.

Dimensions: B rolls in a batch, T characters of a text, n characters of one window, S = n + 1 slots of a window (the
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
    """Multi-head attention in which a slot sees itself and what stands before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Take x (B, S, C), and mask (S, S) or None as `causal_attention` does; return (B, S, C)."""
        qkv = self.c_attn(x)  # (B, S, 3C)
        y = causal_attention(qkv, mask, self.n_head, self.dropout if self.training else 0.0)  # (B, S, C)
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out


class MLP(nn.Module):
    """Two layers with an exact (erf) GELU between them, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        out: Tensor = self.dropout(self.c_proj(F.gelu(self.c_fc(x))))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a residual path (pre-norm)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Take x (B, S, C), and mask (S, S) or None as `causal_attention` does; return (B, S, C)."""
        x = x + self.attn(self.ln_1(x), mask)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class _Transformer(nn.Module):
    """One window: context slot and characters in, normalised outputs out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_len + 1, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        # Whether blocks are computed again in the backward pass instead of kept: the same numbers (Chen et al., 2016).
        self.gradient_checkpointing = False
        # Form of attention where torch computes the blocks, one of `picogpt.checks.ATTENTIONS`.
        self.attention = "products" if config.dropout else "fused"
        # What computes the blocks instead of torch's functions, compiled for this shape.
        self.kernels: Kernels | None = None
        # The blocks that have memory for a step; what comes in between, as validation does, leaves it to them.
        self._fused: FusedBlocks | None = None
        self._draws = config.dropout > 0
        self.mask: Tensor
        self.register_buffer("mask", causal_mask(config.context_len + 1), persistent=False)

    def blocks(self, rolls: int, slots: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """What takes x (B, S, C) through all blocks, in one window after the other of a text, with so many `slots` each."""
        if self.kernels is None:
            return self._through_modules
        spec = WorkspaceSpec(len(self.h), rolls, tuple(slots), torch.is_grad_enabled(), self.gradient_checkpointing)
        fused = self._fused
        if fused is None or not fused.is_free or (fused.kernels, fused.spec) != (self.kernels, spec):
            fused = FusedBlocks(self.kernels, spec)
        if spec.trained:
            self._fused = fused
        return fused.begin([list(block.parameters()) for block in self.h])

    def _through_modules(self, x: Tensor) -> Tensor:
        mask = self.mask[: x.size(1), : x.size(1)] if self.attention == "products" else None
        for block in self.h:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False, preserve_rng_state=self._draws)
            else:
                x = block(x, mask)
        return x

    def forward(self, idx: Tensor, context: Tensor, blocks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Take idx (B, n), context (B, C) and what `blocks` returned, if it is for more windows; return (B, S, C)."""
        x = torch.cat((context.unsqueeze(1), self.wte(idx)), dim=1)  # (B, S, C)
        x = self.drop(x + self.wpe.weight[: x.size(1)])  # (B, S, C)
        out: Tensor = self.ln_f((blocks or self.blocks(x.size(0), [x.size(1)]))(x))
        return out


class GPT(nn.Module):
    """A GPT that reads a text of any length window by window, each window beginning with the mean of the last one.

    Calling it gives `logits, loss`: see `forward`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = _Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press and Wolf, 2017)
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # GPT-2: residual paths add up over the depth, so each one starts smaller.
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def num_params(self, *, positions: bool = True) -> int:
        """Number of trained values; the tied head counts once. Without `positions` the position table is left out."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total if positions else total - self.transformer.wpe.weight.numel()

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The weights by name; on a CPU the arrays share their memory. The tied head stands there once, as `wte`."""
        return {name: parameter.detach().cpu().numpy() for name, parameter in self.named_parameters()}

    def load_arrays(self, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        """Copy `weights` into the model; the tied `lm_head.weight` may be among them or not.

        Raises:
            RunError: a tensor is missing, unknown or of another shape; the model is as it was.
        """
        expected = dict(self.named_parameters())
        found = {name: array for name, array in weights.items() if name != "lm_head.weight"}
        for name in sorted(expected.keys() | found.keys()):
            want = tuple(expected[name].shape) if name in expected else "none"
            have = found[name].shape if name in found else "none"
            if want != have:
                raise RunError(f"the weights are of another model: {name} should have shape {want}, got {have}")
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(torch.from_numpy(np.array(found[name])))

    def roll(self, idx: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Read idx (B, T) window by window.

        Yields, for each window, its outputs after the final LayerNorm (B, S, C) and its context vector (B, C): their
        mean over all S slots, the context slot included. The next window starts from it, and gradients flow through it.
        """
        context = self.transformer.wte.weight.new_zeros(idx.size(0), self.config.n_embd)  # (B, C)
        spans = window_spans(idx.size(1), self.config.context_len)
        blocks = self.transformer.blocks(idx.size(0), [end - start + 1 for start, end in spans])
        for start, end in spans:
            h = self.transformer(idx[:, start:end], context, blocks)  # (B, S, C)
            context = h.mean(dim=1)  # (B, C)
            yield h, context

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict the character after each one of `idx`.

        Args:
            idx: ids (B, T), any T >= 1.
            targets: the ids (B, T) that should follow, or None.

        Returns:
            With targets, the logits (B, T, V) and the mean cross-entropy in nats over all B x T characters, each
            counted once. Without, the logits of the last character alone (B, 1, V), and None.
        """
        outputs = [h for h, _ in self.roll(idx)]
        if targets is None:
            return self.lm_head(outputs[-1][:, -1:]), None
        hidden = torch.cat([h[:, 1:] for h in outputs], dim=1)  # (B, T, C)
        logits: Tensor = self.lm_head(hidden)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss
