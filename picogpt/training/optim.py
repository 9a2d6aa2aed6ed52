"""The optimizers.

Recipe `fast` trains the matrices of the blocks with Muon (Jordan et al., 2024): their updates are momentum made orthogonal,
so that each direction in which a matrix can change counts the same. All other parameters have AdamW.

Ranks that train by themselves for many steps are brought together by an outer optimizer (DiLoCo: Douillard et al., 2023).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from picogpt.config import TrainConfig
from picogpt.kernels.compiled import Kernels, MuonStep
from picogpt.model.gpt import GPT

__all__ = [
    "Muon",
    "OuterOptimizer",
    "build_optimizers",
    "orthogonalize",
    "set_learning_rate",
]

_POLAR_EXPRESS_COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
)
"""Of x, x**3 and x**5 in each iteration: the best ones for singular values from 1e-3 to 1 (Polar Express: Amsel et al., 2025)."""
_SAFETY_FACTOR = 1.02
"""What singular values are kept below 1 by, lest rounding takes one beyond it, where the polynomials run away."""
_MAX_BATCH_ELEMENTS = 2**20
"""Most entries that Muon updates together by torch's functions, so that they stay in the cache from beginning to end."""
# p(x) = a x + b x^3 + c x^5 becomes p(x / s): all but the last polynomial leave their output a factor s below 1.
_POLAR_EXPRESS = (
    *((a / _SAFETY_FACTOR, b / _SAFETY_FACTOR**3, c / _SAFETY_FACTOR**5) for a, b, c in _POLAR_EXPRESS_COEFFICIENTS[:-1]),
    _POLAR_EXPRESS_COEFFICIENTS[-1],
)


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Replace the singular values of each of `matrices` (n, rows, columns) by about 1.

    The polynomials of the iteration are in X X^T. Where a matrix is wide, that small product alone can be iterated, and X
    multiplied with the result once: all five iterations take half the time so.

    Returns:
        Tensors of the same shape in `dtype`; singular values below a thousandth of the largest stay below 1.
    """
    rows, columns = matrices.shape[1:]
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True) * _SAFETY_FACTOR + 1e-7
    x: Tensor = (matrices / norms).to(dtype)
    x = x if rows <= columns else x.mT
    remaining = iter(_POLAR_EXPRESS)
    for count in _gram_reuse_schedule(rows, columns, dtype):
        x = _polar_iterations(x, list(itertools.islice(remaining, count)))
    return x if rows <= columns else x.mT


def _gram_reuse_schedule(rows: int, columns: int, dtype: torch.dtype) -> tuple[int, ...]:
    """How many polynomials are applied before X X^T is formed anew, and so on.

    In bfloat16 only two, and not the first one, are as close to float32's result; beyond that roundings let it run away.
    """
    if max(rows, columns) < 2 * min(rows, columns):
        return (1, 1, 1, 1, 1)
    return (5,) if dtype == torch.float32 else (1, 2, 2)


def _polar_iterations(x: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """Apply one polynomial after the other to x (n, rows, columns), forming X X^T once."""
    gram = torch.bmm(x, x.mT)
    (a, b, c), *others = polynomials
    if not others:
        return torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    product = factor = _polynomial(gram, a, b, c)
    for coefficients in others:
        gram = torch.bmm(torch.bmm(factor, gram), factor)
        factor = _polynomial(gram, *coefficients)
        product = torch.bmm(factor, product)
    return torch.bmm(product, x)


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """The sum a + b gram + c gram^2, which an iteration multiplies by."""
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


class _Matrix(NamedTuple):
    """A matrix that Muon takes for one, as views of a parameter and of what belongs to it."""

    weights: Tensor
    """(rows, columns)."""
    gradient: Tensor
    momentum: Tensor
    mean_square: Tensor
    """(rows, 1), or (1, columns) where there are more columns than rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.weights.shape
        return rows, columns


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, and each neuron's share of it evened out over time (NorMuon: Li et al., 2025).

    Args:
        parameters: matrices, or groups of them. One with three times as many rows as columns holds those of queries, keys and
            values and is taken for three.
        lr: length of a step; a matrix with more rows than columns has longer ones, by the root of their ratio.
        momentum: decay of the mean gradient, in [0, 1).
        beta2: decay of the mean square of each neuron's updates, in [0, 1).
        weight_decay: decoupled, times the learning rate.
        interval: steps from one update of a matrix to the next, which goes as many times as far; the mean gradient takes up
            every step's. A group's turn is in those steps 1, 2, ... that come to a multiple of `interval` with the group's
            `phase` added, so that the work can be spread.
        dtype: type in which updates are made orthogonal; bfloat16 is precise enough.
        kernels: what computes updates instead of torch's functions, for the same type.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.0,
        interval: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        kernels: Kernels | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay}
        defaults |= {"interval": interval, "phase": 0}
        super().__init__(parameters, defaults)
        assert kernels is None or kernels.dtype == dtype, "compiled for another type"
        self._dtype, self._kernels = dtype, kernels

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take up every gradient, and update the parameters whose turn it is."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[_Matrix]] = defaultdict(list)
            for parameter in group["params"]:
                for part in self._due_matrices(parameter, group):
                    by_shape[part.shape].append(part)
            for (rows, columns), parts in by_shape.items():
                if self._kernels is not None and self._kernels.can_update(rows, columns):
                    self._update_with_kernels(self._kernels, parts, group)
                    continue
                count = max(1, _MAX_BATCH_ELEMENTS // (rows * columns))
                for start in range(0, len(parts), count):
                    self._update(parts[start : start + count], group)

    def _due_matrices(self, parameter: Tensor, group: Mapping[str, Any]) -> list[_Matrix]:
        """Take up the gradient; return the matrices of queries, keys and values, or the one, if their turn has come."""
        if parameter.grad is None:
            return []
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["momentum"] = torch.zeros_like(parameter)
            state["mean_square"] = torch.zeros_like(parameter).mean(dim=_short_dim(parameter), keepdim=True)
        state["step"] += 1
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        if (int(state["step"]) + group["phase"]) % group["interval"]:
            return []
        count = 3 if parameter.size(0) == 3 * parameter.size(1) else 1
        tensors = (parameter, parameter.grad, state["momentum"], state["mean_square"])
        return [_Matrix(*views) for views in zip(*(tensor.chunk(count) for tensor in tensors), strict=True)]

    def _update(self, parts: Sequence[_Matrix], group: Mapping[str, Any]) -> None:
        """Update matrices of one shape: with the mean gradient, looking one step ahead (Nesterov), made orthogonal."""
        rows, columns = parts[0].shape
        keep, length = _step_size(group, rows, columns)
        stack = parts[0].weights.new_empty(len(parts), rows, columns)
        for part, mean in zip(parts, stack, strict=True):
            torch.lerp(part.gradient, part.momentum, group["momentum"], out=mean)
        for part, direction in zip(parts, orthogonalize(stack, self._dtype), strict=True):
            if keep != 1:
                part.weights.mul_(keep)
            part.weights.addcmul_(direction, _normuon_scale(direction, part.mean_square, group["beta2"]), value=-length)

    def _update_with_kernels(self, kernels: Kernels, parts: Sequence[_Matrix], group: Mapping[str, Any]) -> None:
        """The same for any number of them."""
        rows, columns = parts[0].shape
        decay, length = _step_size(group, rows, columns)
        reuse = _gram_reuse_schedule(rows, columns, self._dtype)
        step = MuonStep(group["momentum"], group["beta2"], decay, length, _SAFETY_FACTOR, _POLAR_EXPRESS, reuse)
        assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for part in parts for tensor in part)
        kernels.update_matrices([part._asdict() for part in parts], step)
        # So that autograd notices it where the weights are needed as they were.
        torch.autograd.graph.increment_version([part.weights for part in parts])


def _step_size(group: Mapping[str, Any], rows: int, columns: int) -> tuple[float, float]:
    """What weight decay leaves of a matrix, and the length of its step."""
    rate = group["lr"] * group["interval"]
    return 1 - rate * group["weight_decay"], rate * math.sqrt(max(1.0, rows / columns))


def _normuon_scale(direction: Tensor, mean_square: Tensor, decay: float) -> Tensor:
    """Factors for the rows of `direction`, or its columns where there are more of them, that even them out over time.

    Each is divided by the root of its mean square over time, `mean_square`, which is brought up to date. The norm of the whole
    stays as it was.
    """
    side = _short_dim(direction)
    squares = direction.float().square().mean(dim=side, keepdim=True)
    mean_square.lerp_(squares, 1 - decay)
    factors = 1 / (mean_square.sqrt() + 1e-8)
    return factors * (squares.sum() / ((squares * factors.square()).sum() + 1e-12)).sqrt()


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


def _short_dim(matrix: Tensor) -> int:
    """The dimension of `matrix` that has fewer entries, the columns where both have as many."""
    return 1 if matrix.size(0) >= matrix.size(1) else 0


def build_optimizers(model: GPT, config: TrainConfig, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """The optimizers that together hold all parameters of `model`, with the settings of `config`.

    Weight decay is for matrices and embeddings; biases and norms have none. `dtype` is that of Muon's own products.
    """
    blocks = [[p for p in block.parameters() if p.dim() == 2] for block in model.transformer.h]
    for_muon = {id(p) for block in blocks for p in block} if config.optimizer == "muon" else set()
    others = [p for p in model.parameters() if id(p) not in for_muon]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if for_muon:
        interval = config.muon_interval
        turns = [{"params": list(itertools.chain(*blocks[i::interval])), "phase": i} for i in range(interval)]
        settings = {"lr": config.muon_lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
        optimizers.append(Muon(turns, **settings, interval=interval, dtype=dtype, kernels=model.transformer.kernels))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], share: float) -> None:
    """Set the learning rate of every group to `share` of its highest one (`fraction_of_peak`)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
