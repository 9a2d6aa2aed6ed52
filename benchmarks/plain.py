"""Two plain ways to train the same body, in eager torch: what ours is compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import Batch, Source
from picogpt.model.accelerate import accelerate
from picogpt.model.gpt import GPT

__all__ = ["NANOGPT", "NanoGPTLoop", "PlainLoop"]

NANOGPT = TrainConfig(optimizer="adamw", lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.99, grad_clip=1.0)
"""nanoGPT's settings for small models (config/train_shakespeare_char.py); its batches are windows, not sequences of windows."""


class _Loop(ABC):
    """The model with torch's fused attention and AdamW.

    Args:
        model_config: shape of the model.
        config: its seed, learning rate, weight decay, betas and largest norm of the gradient.
        source: where batches come from.
        dtype: bfloat16 runs the products under autocast.
        fused: whether AdamW takes a step in one pass, or a tensor at a time.
    """

    def __init__(self, model_config: GPTConfig, config: TrainConfig, source: Source, dtype: torch.dtype, *, fused: bool) -> None:
        self.dtype = dtype
        torch.manual_seed(config.seed)
        self.model = GPT(model_config)
        self.runner = accelerate(self.model)
        self.runner.attention = "fused"
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused, foreach=False)
        self._source, self._grad_clip = source, config.grad_clip
        self.step, self.chars_per_step = 0, 0
        """Steps taken so far, and characters of the last one."""

    def train_step(self, rate: float) -> float:
        """Take one step with learning rate `rate`; return the batch's mean loss in nats per character."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self._source.train_batch(self.step)
        self.chars_per_step = batch.targets.size
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss over a batch."""
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(part)) for part in batch)
        return self.loss_of(inputs, targets)

    @abstractmethod
    def loss_of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of ids (B, T) whose successors are `targets`."""


class PlainLoop(_Loop):
    """The model with its context roll and AdamW a tensor at a time, in float32; arguments as `_Loop` has them."""

    def __init__(self, model_config: GPTConfig, config: TrainConfig, source: Source) -> None:
        super().__init__(model_config, config, source, torch.float32, fused=False)

    def loss_of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Window after window, each beginning with the context vector of the one before."""
        _, loss = self.model(inputs, targets)
        assert isinstance(loss, Tensor)
        return loss


class NanoGPTLoop(_Loop):
    """nanoGPT's way (github.com/karpathy/nanoGPT): independent windows without a context slot, all of them in one pass.

    Its AdamW takes a tensor at a time on a CPU; here it is torch's fused one, which is faster.

    Args:
        model_config: shape of the model; the row of its position table for the last slot is not used.
        source: where batches of single windows come from.
        dtype: bfloat16 runs the products under autocast.
    """

    def __init__(self, model_config: GPTConfig, source: Source, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(model_config, NANOGPT, source, dtype, fused=True)

    def loss_of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """All windows beside each other."""
        body = self.model.transformer
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            x = body.wte(inputs) + body.wpe.weight[: inputs.size(1)]  # (B, n, C)
            logits = self.model.lm_head(body.ln_f(self.runner.run_blocks(self.model, x)))  # (B, n, V)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
