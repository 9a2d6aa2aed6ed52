"""The optimizers: Muon for the matrices of the blocks, AdamW for the other parameters, and DiLoCo's outer optimizer.

Recipe `fast` trains the matrices of the blocks with Muon (Jordan et al., 2024): an update is the orthogonalized momentum,
so that each direction in which a matrix can change counts the same. AdamW trains all other parameters.

Ranks that take many local steps are combined by an outer optimizer (DiLoCo: Douillard et al., 2023).
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
"""Coefficients of x, x^3 and x^5 in each iteration, optimal for singular values from 1e-3 to 1.

Polar Express: Amsel et al., 2025.
"""
_SAFETY_FACTOR = 1.02
"""Factor that keeps singular values below 1 after rounding: above 1 the polynomials diverge."""
_MAX_BATCH_ELEMENTS = 2**20
"""Most matrix entries that torch updates as one batch, so that they stay in the cache from beginning to end."""
# p(x) = a x + b x^3 + c x^5 is replaced by p(x / s), with s the safety factor, in all iterations but the last.
_POLAR_EXPRESS = (
    *((a / _SAFETY_FACTOR, b / _SAFETY_FACTOR**3, c / _SAFETY_FACTOR**5) for a, b, c in _POLAR_EXPRESS_COEFFICIENTS[:-1]),
    _POLAR_EXPRESS_COEFFICIENTS[-1],
)


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Replace the singular values of each of `matrices` (n, rows, columns) by about 1: U S V^T becomes U V^T.

    An iteration is X <- (a I + b A + c A^2) X with the Gram matrix A = X X^T. For a wide matrix the small A alone can be
    iterated, and X is multiplied with the result once, which is less arithmetic.

    Returns:
        Tensors of the same shape in `dtype`; singular values below a thousandth of the largest stay below 1.
    """
    rows, columns = matrices.shape[1:]
    # The Frobenius norm bounds the largest singular value, so all of them end up in [0, 1).
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True) * _SAFETY_FACTOR + 1e-7  # (n, 1, 1)
    x: Tensor = (matrices / norms).to(dtype)
    # The Gram matrix is taken of the short side, so tall matrices are transposed.
    x = x if rows <= columns else x.mT  # (n, short, long)
    remaining = iter(_POLAR_EXPRESS)
    for count in _gram_reuse_schedule(rows, columns, dtype):
        # The polynomials that share one Gram matrix.
        x = _polar_iterations(x, list(itertools.islice(remaining, count)))
    return x if rows <= columns else x.mT


def _gram_reuse_schedule(rows: int, columns: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Return how many iterations share a Gram matrix X X^T, one group after the other.

    In bfloat16 two iterations in a row, but not the first, come as close to float32's result; more diverge by rounding.
    """
    if max(rows, columns) < 2 * min(rows, columns):
        # A nearly square Gram matrix is as large as X: iterating on it saves nothing.
        return (1, 1, 1, 1, 1)
    return (5,) if dtype == torch.float32 else (1, 2, 2)


def _polar_iterations(x: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """Apply the polynomials one after the other to x (n, rows, columns), computing X X^T once."""
    gram = torch.bmm(x, x.mT)  # (n, rows, rows)
    (a, b, c), *others = polynomials
    if not others:
        # A single iteration: (b A + c A^2) X + a X, in two fused products.
        return torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    # With P_k = a I + b A_k + c A_k^2 the next Gram matrix is A_{k+1} = P_k A_k P_k, and all iterations are X <- ... P_2 P_1 X.
    product = factor = _polynomial(gram, a, b, c)
    for coefficients in others:
        gram = torch.bmm(torch.bmm(factor, gram), factor)  # (n, rows, rows)
        factor = _polynomial(gram, *coefficients)
        product = torch.bmm(factor, product)  # (n, rows, rows)
    return torch.bmm(product, x)  # (n, rows, columns)


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """Return a I + b gram + c gram^2, the factor of one iteration."""
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    # baddbmm has no identity term: add a I in place.
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


class _Matrix(NamedTuple):
    """A matrix that Muon updates: views of a parameter, its gradient and its optimizer state."""

    weights: Tensor
    """(rows, columns), like gradient and momentum."""
    gradient: Tensor
    momentum: Tensor
    mean_square: Tensor
    """(rows, 1), or (1, columns) for a matrix with more columns than rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.weights.shape
        return rows, columns


class Muon(torch.optim.Optimizer):
    """Muon: orthogonalized Nesterov momentum, normalized per neuron by a running mean square (NorMuon: Li et al., 2025).

    Args:
        parameters: matrices, or groups of them. A matrix with three times as many rows as columns holds the projections to
            queries, keys and values, and is updated as three matrices.
        lr: step size; for a matrix with more rows than columns it is multiplied by the root of their ratio.
        momentum: decay of the running mean of the gradient, in [0, 1).
        beta2: decay of the running mean square of each neuron's updates, in [0, 1).
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        interval: steps from one update of a matrix to the next, with a step size `interval` times larger; the momentum
            accumulates every step's gradient. A group is updated in steps t = 1, 2, ... where t + `phase` is a multiple of
            `interval`, so that groups with different phases spread the work.
        dtype: type of the orthogonalization; bfloat16 is precise enough.
        kernels: native kernels for the updates, compiled for the same dtype; None computes them with torch.
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
        """Accumulate every gradient into the momentum, and update the parameters that are due."""
        assert closure is None
        for group in self.param_groups:
            # Matrices of one shape are updated as one batch: one large product is faster than many small ones.
            by_shape: dict[tuple[int, int], list[_Matrix]] = defaultdict(list)
            for parameter in group["params"]:
                for part in self._due_matrices(parameter, group):
                    by_shape[part.shape].append(part)
            for (rows, columns), parts in by_shape.items():
                if self._kernels is not None and self._kernels.can_update(rows, columns):
                    self._update_with_kernels(self._kernels, parts, group)
                    continue
                # In torch a batch is cut so that it stays in the cache between the passes of an update.
                count = max(1, _MAX_BATCH_ELEMENTS // (rows * columns))
                for start in range(0, len(parts), count):
                    self._update(parts[start : start + count], group)

    def _due_matrices(self, parameter: Tensor, group: Mapping[str, Any]) -> list[_Matrix]:
        """Accumulate the gradient; return the parameter's matrices if they are due: one, or three for q, k and v."""
        if parameter.grad is None:
            return []
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["momentum"] = torch.zeros_like(parameter)
            state["mean_square"] = torch.zeros_like(parameter).mean(dim=_short_dim(parameter), keepdim=True)
        state["step"] += 1
        # m <- momentum m + (1 - momentum) g, also in the steps in which this matrix is not updated.
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        if (int(state["step"]) + group["phase"]) % group["interval"]:
            return []
        # c_attn is (3C, C): the three projections are orthogonalized separately.
        count = 3 if parameter.size(0) == 3 * parameter.size(1) else 1
        tensors = (parameter, parameter.grad, state["momentum"], state["mean_square"])
        return [_Matrix(*views) for views in zip(*(tensor.chunk(count) for tensor in tensors), strict=True)]

    def _update(self, parts: Sequence[_Matrix], group: Mapping[str, Any]) -> None:
        """Update matrices of one shape by their Nesterov momentum, orthogonalized and normalized per neuron."""
        rows, columns = parts[0].shape
        keep, length = _step_size(group, rows, columns)
        # Nesterov: (1 - momentum) g + momentum m, with m already updated by g.
        stack = parts[0].weights.new_empty(len(parts), rows, columns)  # (n, rows, columns)
        for part, mean in zip(parts, stack, strict=True):
            torch.lerp(part.gradient, part.momentum, group["momentum"], out=mean)
        for part, direction in zip(parts, orthogonalize(stack, self._dtype), strict=True):
            if keep != 1:
                # Decoupled weight decay: w <- (1 - lr * weight_decay) w.
                part.weights.mul_(keep)
            # w <- w - step size * (scale per neuron) * direction, in one pass.
            part.weights.addcmul_(direction, _normuon_scale(direction, part.mean_square, group["beta2"]), value=-length)

    def _update_with_kernels(self, kernels: Kernels, parts: Sequence[_Matrix], group: Mapping[str, Any]) -> None:
        """Update any number of matrices of one shape by the native kernels, as `_update` does."""
        rows, columns = parts[0].shape
        decay, length = _step_size(group, rows, columns)
        reuse = _gram_reuse_schedule(rows, columns, self._dtype)
        step = MuonStep(group["momentum"], group["beta2"], decay, length, _SAFETY_FACTOR, _POLAR_EXPRESS, reuse)
        # The kernels see bare pointers, so a wrong type would be read as garbage.
        assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for part in parts for tensor in part)
        kernels.update_matrices([part._asdict() for part in parts], step)
        # The kernels change the weights behind autograd's back: bump their versions, so that a stale graph is rejected.
        torch.autograd.graph.increment_version([part.weights for part in parts])


def _step_size(group: Mapping[str, Any], rows: int, columns: int) -> tuple[float, float]:
    """Return the factor of weight decay, and the step size for a matrix of this shape."""
    # An update every `interval` steps, with a step size `interval` times larger.
    rate = group["lr"] * group["interval"]
    return 1 - rate * group["weight_decay"], rate * math.sqrt(max(1.0, rows / columns))


def _normuon_scale(direction: Tensor, mean_square: Tensor, decay: float) -> Tensor:
    """Return NorMuon's factor for each neuron: for each row of `direction`, or each column where columns are more.

    A neuron's update is divided by the root of its running mean square, `mean_square`, which is updated in place. The Frobenius
    norm of the whole update stays the same.
    """
    side = _short_dim(direction)
    squares = direction.float().square().mean(dim=side, keepdim=True)  # (rows, 1) or (1, columns)
    # v <- beta2 v + (1 - beta2) mean(o^2), per neuron.
    mean_square.lerp_(squares, 1 - decay)
    factors = 1 / (mean_square.sqrt() + 1e-8)
    # Rescale by ||o|| / ||o * factors||, computed from the sums of squares.
    return factors * (squares.sum() / ((squares * factors.square()).sum() + 1e-12)).sqrt()


class OuterOptimizer:
    """Nesterov SGD on the outer gradient: anchor - mean of the ranks' weights (DiLoCo: Douillard et al., 2023).

    Args:
        parameters: the weights that all ranks start from.
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
        """Take an outer step of the anchors, given the mean of each parameter over the ranks."""
        for anchor, mean in zip(self.anchors, means, strict=True):
            # The distance that the local steps went, with the sign of a gradient.
            anchor.grad = anchor - mean
        self.sgd.step()
        self.sgd.zero_grad(set_to_none=True)


def _short_dim(matrix: Tensor) -> int:
    """Return the shorter dimension of `matrix`: 1 (columns) for tall and square matrices, 0 (rows) for wide ones."""
    return 1 if matrix.size(0) >= matrix.size(1) else 0


def build_optimizers(
    model: GPT, config: TrainConfig, dtype: torch.dtype, kernels: Kernels | None = None
) -> list[torch.optim.Optimizer]:
    """Return the optimizers that together hold all parameters of `model`, with the settings of `config`.

    Weight decay applies to matrices and embeddings, not to biases and norms. `dtype` is the type of Muon's own products,
    and `kernels` compute its update; None computes it with torch.
    """
    # Muon is made for matrices between activations; embeddings and vectors stay with AdamW.
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
        # Group i holds every interval-th block from block i on, and its phase makes it due in every interval-th step.
        turns = [{"params": list(itertools.chain(*blocks[i::interval])), "phase": i} for i in range(interval)]
        settings = {"lr": config.muon_lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
        optimizers.append(Muon(turns, **settings, interval=interval, dtype=dtype, kernels=kernels))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # "lr" changes each step; "peak" keeps the highest rate that the schedule's fraction is taken of.
            group["peak"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], fraction: float) -> None:
    """Set the learning rate of every group to `fraction` of its peak (see `fraction_of_peak`)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = fraction * group["peak"]
