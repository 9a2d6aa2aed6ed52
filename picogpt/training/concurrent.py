"""The gradient of a step whose sequences are divided among threads, each of which takes its own forward and backward.

Where torch computes the blocks, all its threads usually share each operation and wait for each other after it, thousands of
times a step; another program that holds one core for a moment makes the others wait too. Sequences do not need each other
before their gradients are added up, so threads that have some of their own wait once a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from picogpt.data import Batch
from picogpt.device import flush_denormals

__all__ = ["count_thread_groups", "parallel_backward"]

_MIN_ACTIVATIONS = 2**15
"""Activations from which on torch divides a pass over them among threads; PicoGPT's window has 33,024."""


def count_thread_groups(sequences: int, threads: int, activations: int) -> int:
    """How many groups of threads can have equally many of a step's `sequences` each, and be equally many threads each.

    It is 1 for small models, whose `activations` (slots times width of one sequence) keep threads waiting for Python, and where
    torch's own threads cannot be divided, as their number is one of the whole process.
    """
    divisible = "parallel backend: OpenMP" in torch.__config__.parallel_info()
    return math.gcd(sequences, threads) if divisible and activations >= _MIN_ACTIVATIONS else 1


def parallel_backward(loss_of: Callable[[Batch], Tensor], parameters: Sequence[Tensor], batch: Batch, groups: int) -> float:
    """Set the gradient of each of `parameters`, the mean over `groups` equal parts of `batch`.

    The parts are added up in their order, so that the result does not depend on which thread is done first.

    Args:
        loss_of: gives the mean loss of a batch; called by several threads at a time.
        parameters: all that the loss depends on.
        batch: the step's sequences, a multiple of `groups`.
        groups: as `count_thread_groups` says; torch's threads are divided among them.

    Returns:
        The mean loss.
    """
    threads, size = torch.get_num_threads(), len(batch.inputs) // groups

    def part(first: int) -> tuple[float, tuple[Tensor, ...]]:
        torch.set_num_threads(threads // groups)  # of this thread's operations alone, but for those of MKL
        loss = loss_of(Batch(batch.inputs[first : first + size], batch.targets[first : first + size]))
        return loss.item(), torch.autograd.grad(loss, parameters)

    try:
        losses, gradients = zip(*_pool(groups).map(part, range(0, len(batch.inputs), size)), strict=True)
    finally:
        torch.set_num_threads(threads)
    total, *others = gradients
    for gradient in others:
        torch._foreach_add_(total, gradient)
    torch._foreach_mul_(total, 1 / groups)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    return math.fsum(losses) / groups


@cache
def _pool(groups: int) -> ThreadPoolExecutor:
    """As many threads, for all steps of this process."""
    return ThreadPoolExecutor(groups, thread_name_prefix="sequences", initializer=flush_denormals)
