"""What stands between the products of a block: torch's functions against those in C, forward and backward."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import ROUNDS
from picogpt.attention import causal_attention
from picogpt.config import GPTConfig
from picogpt.device import choose_dtype, set_threads
from picogpt.kernels import Kernels, compile_kernels
from picogpt.train import seconds_of

__all__ = ["add_arguments", "comparing"]

REPEATS = 40
"""Calls that are timed in one round."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--batch-size", metavar="N", type=int, default=4, help="rolls in a step (default: 4)")


def comparing(arguments: argparse.Namespace) -> None:
    """Print what each of them takes, in turns."""
    set_threads(None)
    dtype, reason = choose_dtype("auto")
    print(f"{reason}; microseconds, forward and backward, of one window of {arguments.batch_size} rolls\n")
    print("| | torch | C |\n|---|---|---|")
    kernels = compile_kernels(GPTConfig(), dtype)
    for name, make in (("attention", attention), ("GELU", gelu), ("residual path and LayerNorm", norm)):
        times: tuple[list[float], list[float]] = ([], [])
        pair = make(kernels, arguments.batch_size)
        for _ in range(ROUNDS):
            for call, found in zip(pair, times, strict=True):
                found.append(statistics.median(seconds_of(call) for _ in range(REPEATS)))
        print(f"| {name} | " + " | ".join(f"{statistics.median(found) * 1e6:,.0f}" for found in times) + " |", flush=True)


Pair = tuple[Callable[[], object], Callable[[], object]]


def attention(kernels: Kernels, rolls: int) -> Pair:
    """Of queries, keys and values as the product before it leaves them, which in torch has added their bias."""
    config = GPTConfig()
    slots, width = config.context_len + 1, config.n_embd
    qkv = torch.randn(rolls * slots, 3 * width, dtype=kernels.dtype)
    before, gradient, bias = qkv.clone(), torch.randn(rolls * slots, width, dtype=kernels.dtype), torch.randn(3 * width)
    mask = torch.full((slots, slots), -torch.inf).triu(1)
    leaf, sums = qkv.view(rolls, slots, -1).clone().requires_grad_(), torch.zeros(rolls, 3 * width)
    read, scores = torch.empty_like(gradient), torch.empty(rolls * slots, 2 * config.n_head)

    def by_torch() -> object:
        found = causal_attention(leaf, mask, config.n_head)
        (d_qkv,) = torch.autograd.grad(found, leaf, gradient.view_as(found))
        return d_qkv.flatten(0, 1).sum(0)

    def by_c() -> object:
        kernels.attention(qkv, bias, rolls, out=read, scores=scores)
        kernels.attention_backward(gradient, qkv, bias, rolls, out=read, scores=scores, sums=sums)
        return qkv.copy_(before)  # where the gradient has been written

    return by_torch, by_c


def gelu(kernels: Kernels, rolls: int) -> Pair:
    """Of the wide layer; in torch the product before it has added the bias."""
    config = GPTConfig()
    rows, width = rolls * (config.context_len + 1), 4 * config.n_embd
    x, gradient = torch.randn(2, rows, width, dtype=kernels.dtype).unbind()
    leaf, bias, sums = x.clone().requires_grad_(), torch.randn(width), torch.zeros(kernels.threads, width)
    before, out = x.clone(), torch.empty_like(x)

    def by_torch() -> object:
        (dx,) = torch.autograd.grad(F.gelu(leaf), leaf, gradient)
        return dx.sum(0)

    def by_c() -> object:
        kernels.gelu(x, bias, out)
        kernels.gelu_backward(gradient, x, bias, None, sums)
        return x.copy_(before)  # where the gradient has been written

    return by_torch, by_c


def norm(kernels: Kernels, rolls: int) -> Pair:
    """The sum of residual path and branch, and LayerNorm of it in the type of the products."""
    config = GPTConfig()
    rows, width = rolls * (config.context_len + 1), config.n_embd
    x, residual = torch.randn(2, rows, width).unbind()
    branch, gradient = torch.randn(2, rows, width, dtype=kernels.dtype).unbind()
    weight, bias, branch_bias = torch.randn(3, width).unbind()
    leaves: list[Tensor] = [tensor.clone().requires_grad_() for tensor in (x, branch, weight, bias)]
    sums, dx = torch.zeros(kernels.threads, 3, width), residual.clone()
    written = {"added": torch.empty_like(x), "out": torch.empty_like(branch), "statistics": torch.empty(rows, 2)}

    def by_torch() -> object:
        total = leaves[0] + leaves[1]
        out = F.layer_norm(total, (width,), leaves[2], leaves[3]).to(kernels.dtype)
        found = torch.autograd.grad((total, out), leaves, (residual, gradient))
        return found[1].sum(0)

    def by_c() -> object:
        kernels.add_layer_norm(x, branch, branch_bias, weight, bias, **written)
        norm = (written["added"], weight, bias, written["statistics"])
        kernels.layer_norm_backward(gradient, *norm, out=None, dx=dx, branch=written["out"], sums=sums)
        return dx.copy_(residual)  # to which the gradient has been added

    return by_torch, by_c
