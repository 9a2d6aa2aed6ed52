"""Parameter groups, the optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from picogpt.config import TrainConfig

__all__ = ["build_optimizer", "learning_rate", "parameter_groups", "set_learning_rate"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for the optimizer: matrices and embeddings with weight decay, biases and norms without."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters of `model`, with the settings of `config`."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of step 0, 1, ..., total_steps - 1: up in a straight line, then down to `config.min_lr`.

    The decay ends at `config.decay_steps`, or exactly with the run where that is None; there the warm-up takes at most
    a tenth of the run. After the decay the rate stays at `config.min_lr`.
    """
    if config.decay_steps is None:
        end, warmup = total_steps, min(config.warmup_steps, total_steps // 10)
    else:
        end, warmup = config.decay_steps, config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if step >= end:
        return config.min_lr
    progress = (step - warmup) / max(1, end - warmup)
    share = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + share * (config.lr - config.min_lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
