"""The GPT with a context roll, in plain torch: attention, MLP, block, one window, the roll over windows, the loss.

The blocks are those of GPT-2 in the form of nanoGPT (github.com/karpathy/nanoGPT), whose state-dict names are kept.
New is slot 0 of each window: it carries the mean of the previous window's final hidden states, the idea of the PicoGPT
project. Everything here is plain torch, to be read. Training (`picogpt.model.accelerate`) and generation
(`picogpt.inference`) run faster versions, which are tested against this one. Text, files and devices belong to other modules.

Dimensions: B sequences in a batch, T characters of a sequence, n characters of one window, S = n + 1 slots of a window (the
context slot and its characters), C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picogpt.config import GPTConfig
from picogpt.errors import RunError
from picogpt.model.dropout import Dropout
from picogpt.model.roll import window_spans

__all__ = ["GPT", "MLP", "Attend", "Block", "CausalSelfAttention", "Runner", "without_context_slots"]


class Attend(Protocol):
    """Another way to compute causal attention."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """Attend with q, k and v (B, H, S, D), dropping weights with probability `dropout`; return (B, H, S, D)."""


class Runner(Protocol):
    """Another way to compute the model without its head."""

    def hidden_states(self, model: GPT, idx: Tensor) -> Tensor:
        """Compute the final hidden states of all characters: ids (B, T) -> (B, T, C)."""


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention: each slot attends to itself and to the slots before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v of all heads in one GEMM
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)  # output projection
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """Attend within one window: x (B, S, C) -> (B, S, C); `attend` replaces the formula below."""
        B, S, C = x.shape
        # Split q, k and v into heads, and move the heads forward so that each is a matrix of its own.
        q, k, v = (part.view(B, S, self.n_head, C // self.n_head).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        if attend is not None:
            y = attend(q, k, v, self.attn_dropout.p if self.training else 0.0)  # (B, H, S, D)
        else:
            scores = q @ k.mT / math.sqrt(k.size(-1))  # (B, H, S, D) @ (B, H, D, S) -> (B, H, S, S)
            # Causal: a slot does not see the slots after it. exp(-inf) is 0, so these get no weight.
            future = torch.ones(S, S, dtype=torch.bool, device=x.device).triu(1)
            weights = F.softmax(scores.masked_fill(future, -math.inf), dim=-1)  # (B, H, S, S): each row sums to 1
            y = self.attn_dropout(weights) @ v  # (B, H, S, S) @ (B, H, S, D) -> (B, H, S, D)
        y = y.transpose(1, 2).reshape(B, S, C)  # heads side by side again
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

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """Apply the block to one window: x (B, S, C) -> (B, S, C); `attend` as in `CausalSelfAttention.forward`."""
        x = x + self.attn(self.ln_1(x), attend)  # (B, S, C)
        out: Tensor = x + self.mlp(self.ln_2(x))  # (B, S, C)
        return out


class _Transformer(nn.Module):
    """The model for one window: context vector and characters in, final hidden states (after the last LayerNorm) out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # (V, C)
        self.wpe = nn.Embedding(config.context_len + 1, config.n_embd)  # one position more than characters: the context slot
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, idx: Tensor, context: Tensor, run_blocks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Compute the final hidden states of one window.

        Args:
            idx: ids (B, n).
            context: context vector of the window before (B, C).
            run_blocks: another way through all blocks, (B, S, C) -> (B, S, C).

        Returns:
            Final hidden states, after the last LayerNorm (B, S, C).
        """
        # The context vector takes slot 0, where other models have a BOS token.
        x = torch.cat((context.unsqueeze(1), self.wte(idx)), dim=1)  # (B, S, C)
        x = self.drop(x + self.wpe.weight[: x.size(1)])  # (B, S, C) + (S, C)
        if run_blocks is not None:
            x = run_blocks(x)
        else:
            for block in self.h:
                x = block(x)
        out: Tensor = self.ln_f(x)  # (B, S, C)
        return out


class GPT(nn.Module):
    """A GPT that reads a sequence of any length window by window; slot 0 of each is the mean of the previous hidden states.

    Calling the model returns `logits, loss`: see `forward`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = _Transformer(config)
        # A faster way to compute the hidden states, attached from outside; None computes them by `roll`.
        self.runner: Runner | None = None
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
        """Return the number of trained parameters, the tied head counted once; `positions` includes the position embeddings."""
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

    def roll(self, idx: Tensor, run_blocks: Callable[[Tensor], Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the model over idx (B, T) window by window, passing the context vector from each window to the next.

        `run_blocks` is another way through all blocks, (B, S, C) -> (B, S, C).

        Yields, for each window, its final hidden states (B, S, C) and its context vector (B, C): their
        mean over all S slots, the context slot included. The next window starts from it, and gradients flow through it.
        """
        # The first window has no window before it: its context vector is zero.
        context = self.transformer.wte.weight.new_zeros(idx.size(0), self.config.n_embd)  # (B, C)
        # Where T is no multiple of the window, the first window is the short one: 300 characters are cut at 0, 44, 172 and 300.
        for start, end in window_spans(idx.size(1), self.config.context_len):
            hidden = self.transformer(idx[:, start:end], context, run_blocks)  # (B, S, C)
            # The context roll: context_{i+1} = mean over S of hidden_i. Gradients flow back through it into all windows before.
            context = hidden.mean(dim=1)  # (B, C)
            yield hidden, context

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict the character after each character of `idx`.

        Args:
            idx: ids (B, T), any T >= 1.
            targets: the ids (B, T) that should follow, or None.

        Returns:
            With targets, the logits (B, T, V) and the mean cross-entropy in nats over all B x T characters, each
            counted once. Without, the logits of the last character alone (B, 1, V), and None.
        """
        hidden = without_context_slots(self.roll(idx)) if self.runner is None else self.runner.hidden_states(self, idx)
        if targets is None:
            return self.lm_head(hidden[:, -1:]), None  # (B, 1, V)
        logits: Tensor = self.lm_head(hidden)  # (B, T, V)
        # In float32 also under autocast: bfloat16 is too coarse for a mean over thousands of characters.
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())  # (B * T, V), (B * T,) -> scalar
        return logits, loss


def without_context_slots(windows: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Join what `GPT.roll` yields to the final hidden states of all characters (B, T, C).

    Slot 0 of each window is the context slot, which predicts nothing.
    """
    return torch.cat([hidden[:, 1:] for hidden, _ in windows], dim=1)
