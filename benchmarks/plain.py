"""The plain way to train the same model, in float32 as nanoGPT does it: what ours is compared with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import Batch, Source
from picogpt.model import GPT

__all__ = ["PlainLoop"]


class PlainLoop:
    """The model with its context roll, torch's attention and AdamW a tensor at a time, in eager float32.

    Args:
        model_config: shape of the model.
        config: its seed, learning rate, weight decay, betas and largest norm of the gradient.
        source: where batches come from.
    """

    def __init__(self, model_config: GPTConfig, config: TrainConfig, source: Source) -> None:
        torch.manual_seed(config.seed)
        self.model = GPT(model_config)
        self.model.transformer.attention = "fused"
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=False, foreach=False)
        self._source, self._grad_clip = source, config.grad_clip
        self.step = 0

    def update(self, rate: float) -> float:
        """Take one step with learning rate `rate`; return the batch's mean loss in nats per character."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(self._source.train_batch(self.step))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss over a batch."""
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(part)) for part in batch)
        _, loss = self.model(inputs, targets)
        assert isinstance(loss, Tensor)
        return loss
