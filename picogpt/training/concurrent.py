"""Gradient of a step whose sequences are divided among threads, each with a forward and backward pass of its own.

When torch computes the blocks, its threads share each operation and wait for each other after it, thousands of
times a step; a program that holds one core for a moment makes all threads wait. Sequences do not depend on each other
before their gradients are added up, so threads with sequences of their own synchronize once a step.
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

# From this number of activations on, torch divides an elementwise pass among threads; PicoGPT's window has 33,024.
_MIN_ACTIVATIONS = 2**15


def count_thread_groups(sequences: int, threads: int, activations: int) -> int:
    """Return into how many groups of equal size both the threads and a step's `sequences` can be divided.

    The result is 1 for small models, whose `activations` (slots times width of one sequence) keep threads waiting for Python,
    and where torch's number of threads belongs to the whole process and cannot be divided.
    """
    # With OpenMP the number of threads is a setting of each calling thread; other backends have one pool for the process.
    divisible = "parallel backend: OpenMP" in torch.__config__.parallel_info()
    return math.gcd(sequences, threads) if divisible and activations >= _MIN_ACTIVATIONS else 1


def parallel_backward(loss_of: Callable[[Batch], Tensor], parameters: Sequence[Tensor], batch: Batch, groups: int) -> float:
    """Run forward and backward on `groups` equal parts of `batch` in parallel, and set each parameter's mean gradient.

    The gradients are added up in the order of the parts, so that the result is deterministic.

    Args:
        loss_of: returns the mean loss of a batch; called by several threads at a time.
        parameters: all parameters that the loss depends on.
        batch: the step's sequences, a multiple of `groups`.
        groups: number of groups, from `count_thread_groups`; torch's threads are divided among them.

    Returns:
        The mean loss.
    """
    threads, size = torch.get_num_threads(), len(batch.inputs) // groups

    def part(first: int) -> tuple[float, tuple[Tensor, ...]]:
        torch.set_num_threads(threads // groups)  # applies to this thread's operations alone, except for MKL's
        loss = loss_of(Batch(batch.inputs[first : first + size], batch.targets[first : first + size]))
        # autograd.grad returns the gradients instead of adding to .grad, which all threads share.
        return loss.item(), torch.autograd.grad(loss, parameters)

    try:
        losses, gradients = zip(*_pool(groups).map(part, range(0, len(batch.inputs), size)), strict=True)
    finally:
        # MKL's number of threads is global and has been changed by the groups.
        torch.set_num_threads(threads)
    total, *others = gradients
    for gradient in others:
        # One fused pass over all parameters instead of a kernel for each of them.
        torch._foreach_add_(total, gradient)
    torch._foreach_mul_(total, 1 / groups)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    return math.fsum(losses) / groups


@cache
def _pool(groups: int) -> ThreadPoolExecutor:
    """Return a pool of `groups` threads, shared by all steps of this process."""
    # The CPU's flag for denormals belongs to a thread, so each new one sets it.
    return ThreadPoolExecutor(groups, thread_name_prefix="sequences", initializer=flush_denormals)
