"""The optimizers, and the learning rate as a pure function of the step.

Recipe `fast` trains the matrices of the blocks with Muon (Jordan et al., 2024): their updates are momentum made orthogonal,
so that each direction in which a matrix can change counts the same. All other parameters have AdamW.

Ranks that train by themselves for many steps are brought together by an outer optimizer (DiLoCo: Douillard et al., 2023).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from picogpt.config import TrainConfig
from picogpt.model import GPT

__all__ = ["Muon", "OuterOptimizer", "build_optimizers", "learning_rate", "orthogonalize", "set_learning_rate"]

_COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
)
"""Of x, x**3 and x**5 in each iteration: the best ones for singular values from 1e-3 to 1 (Polar Express: Amsel et al., 2025)."""
_MARGIN = 1.02
"""What singular values are kept below 1 by, lest rounding takes one beyond it, where the polynomials run away."""
_POLAR_EXPRESS = (*((a / _MARGIN, b / _MARGIN**3, c / _MARGIN**5) for a, b, c in _COEFFICIENTS[:-1]), _COEFFICIENTS[-1])


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Replace the singular values of each of `matrices` (n, rows, columns), rows <= columns, by about 1.

    The polynomials of the iteration are in X X^T. Where a matrix is wide, that small product alone can be iterated, and X
    multiplied with the result once, in half the time; but only in float32, as bfloat16's roundings let it run away.

    Returns:
        Tensors of the same shape in float32; singular values below a thousandth of the largest stay below 1.
    """
    norms: Tensor = matrices.flatten(1).norm(dim=1)[:, None, None] * _MARGIN + 1e-7
    x: Tensor = (matrices / norms).to(dtype)
    if dtype != torch.float32 or x.size(2) < 2 * x.size(1):
        for a, b, c in _POLAR_EXPRESS:
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.float()
    gram = torch.bmm(x, x.mT)
    product: Tensor | None = None
    for a, b, c in _POLAR_EXPRESS:
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else torch.bmm(factor, product)
        gram = torch.bmm(torch.bmm(factor, gram), factor)
    assert product is not None
    return torch.bmm(product, x).float()


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, and each neuron's share of it evened out over time (NorMuon: Li et al., 2025).

    Args:
        parameters: matrices. One with three times as many rows as columns holds those of queries, keys and values and is
            taken for three.
        lr: length of a step; a matrix with more rows than columns has longer ones, by the root of their ratio.
        momentum: decay of the mean gradient, in [0, 1).
        beta2: decay of the mean square of each neuron's updates, in [0, 1).
        weight_decay: decoupled, times the learning rate.
        dtype: type in which updates are made orthogonal; bfloat16 is precise enough.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            updates = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
            for parameter, update in zip(parameters, self._orthogonal(updates), strict=True):
                self._even_out(parameter, update, group["beta2"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _momentum(self, parameter: Tensor, decay: float) -> Tensor:
        """The mean gradient, looking one step ahead (Nesterov)."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["momentum"] = torch.zeros_like(parameter)
            state["mean_square"] = torch.zeros_like(parameter).mean(dim=_short_side(parameter), keepdim=True)
        state["step"] += 1
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - decay)
        return gradient.lerp(state["momentum"], decay)

    def _orthogonal(self, updates: Sequence[Tensor]) -> list[Tensor]:
        """Each of `updates` made orthogonal; all parts of one shape in one go."""
        results = [torch.empty_like(update) for update in updates]
        parts: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for update, result in zip(updates, results, strict=True):
            for source, target in zip(_parts(update), _parts(result), strict=True):
                parts[tuple(source.shape)].append((source, target))
        for (rows, columns), pairs in parts.items():
            stack = torch.stack([source for source, _ in pairs])
            done = orthogonalize(stack, self._dtype) if rows <= columns else orthogonalize(stack.mT, self._dtype).mT
            for (_, target), matrix in zip(pairs, done, strict=True):
                torch.mul(matrix, math.sqrt(max(1.0, rows / columns)), out=target)
        return results

    def _even_out(self, parameter: Tensor, update: Tensor, decay: float) -> None:
        """Divide each row of `update` by the root of its mean square over time, or each column where there are more of them.

        The norm of the whole stays as it was.
        """
        state = self.state[parameter]
        state["mean_square"].lerp_(update.square().mean(dim=_short_side(update), keepdim=True), 1 - decay)
        before = update.norm()
        update.div_(state["mean_square"].sqrt().add_(1e-8))
        update.mul_(before / (update.norm() + 1e-12))


class OuterOptimizer:
    """Nesterov SGD on the mean difference that the steps of all ranks have made (DiLoCo: Douillard et al., 2023).

    Args:
        parameters: what the ranks have in common now, and train from here.
    """

    LR = 0.7
    MOMENTUM = 0.9
    """The paper's choices for both."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.anchors = [parameter.detach().clone() for parameter in parameters]
        """The parameters after the last outer step."""
        self.sgd = torch.optim.SGD(self.anchors, lr=self.LR, momentum=self.MOMENTUM, nesterov=True)

    @torch.no_grad()
    def step(self, means: Sequence[Tensor]) -> None:
        """Move the anchors, given the mean of each parameter over the ranks."""
        for anchor, mean in zip(self.anchors, means, strict=True):
            anchor.grad = anchor - mean
        self.sgd.step()
        self.sgd.zero_grad(set_to_none=True)


def _short_side(matrix: Tensor) -> int:
    """The dimension of `matrix` that has fewer entries, the columns where both have as many."""
    return 1 if matrix.size(0) >= matrix.size(1) else 0


def _parts(matrix: Tensor) -> Sequence[Tensor]:
    """The matrices of queries, keys and values, or the one matrix."""
    return matrix.chunk(3) if matrix.size(0) == 3 * matrix.size(1) else (matrix,)


def build_optimizers(model: GPT, config: TrainConfig, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """The optimizers that together hold all parameters of `model`, with the settings of `config`.

    Weight decay is for matrices and embeddings; biases and norms have none. `dtype` is that of Muon's own products.
    """
    parameters = list(model.parameters())
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2] if config.optimizer == "muon" else []
    others = [p for p in parameters if not any(p is matrix for matrix in matrices)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        optimizers.append(
            Muon(matrices, lr=config.muon_lr, momentum=config.momentum, weight_decay=config.weight_decay, dtype=dtype)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


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


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], share: float) -> None:
    """Set the learning rate of every group to `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
