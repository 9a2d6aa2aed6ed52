"""The loss of every character, with the context roll and without it: one set of weights under four conditions.

Knows tensors only: which rolls are scored and what their losses come to is `picogpt.scores`.

Dimensions: R rolls, B of them in a batch, W windows of a roll, n characters of a window, T = W x n, C = n_embd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from picogpt.model import GPT
from picogpt.scores import CONDITIONS, Losses, Rolls

__all__ = ["chars_to_read", "evaluate"]

Advance = Callable[[int], None]


def chars_to_read(rolls: Rolls, context_len: int) -> int:
    """Characters that the model reads in `evaluate`, over all conditions."""
    R, T = len(rolls.ids), int(rolls.ids.shape[1]) - 1
    # The first window is the same under all conditions, and read once.
    windows = T // context_len + 2 * (T // context_len - 1) + len(_sliding_starts(T, context_len)) - 1
    return R * context_len * windows


@torch.no_grad()
def evaluate(model: GPT, rolls: Rolls, *, batch_size: int, advance: Advance) -> dict[str, Losses]:
    """The loss of each character of the rolls, under each of `picogpt.scores.CONDITIONS`.

    - `as_is`: as in training, each window starts from the mean of the one before it;
    - `zeroed`: each window starts from the zero vector, as only the first one does in training;
    - `other`: from the vector at the same place of a roll of another article (`Rolls.partners`);
    - `sliding`: windows that start half a window after the one before, from the zero vector, of which the newest half is
      scored: the plain way to give each character at least half a window of context. Of the first one all is scored.

    Memory: besides the result, the context vectors, 4 C / n bytes a character.

    Args:
        model: the model, in float32; it is set to evaluate.
        rolls: T must be whole windows of the model.
        batch_size: B.
        advance: told how many characters the model has read since it was last told.

    Returns:
        By condition, (R, W, n) in nats.
    """
    model.eval()
    n, C = model.config.context_len, model.config.n_embd
    R, T = len(rolls.ids), rolls.ids.shape[1] - 1
    losses = {name: np.empty((R, T), np.float32) for name in CONDITIONS}
    contexts = torch.zeros(R, T // n, C)  # what each window starts from
    for rows, idx in _batches(rolls.ids, batch_size):
        losses["as_is"][rows] = _as_is(model, idx, contexts[rows], advance)
    partners = torch.from_numpy(rolls.partners())
    for rows, idx in _batches(rolls.ids, batch_size):
        others = contexts[partners[rows]]  # (B, W, C)
        for name, given in (("zeroed", torch.zeros_like(others)), ("other", others)):
            losses[name][rows, :n] = losses["as_is"][rows, :n]
            for i in range(1, T // n):
                span = slice(i * n, (i + 1) * n)
                losses[name][rows, span] = _window(model, idx, span, given[:, i])
                advance(len(idx) * n)
        losses["sliding"][rows] = _sliding(model, idx, losses["as_is"][rows, :n], advance)
    return {name: values.reshape(R, T // n, n) for name, values in losses.items()}


def _batches(ids: npt.NDArray[np.uint8], batch_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the rolls, and their ids (B, T + 1)."""
    for start in range(0, len(ids), batch_size):
        rows = slice(start, start + batch_size)
        yield rows, torch.from_numpy(ids[rows].astype(np.int64))


def _as_is(model: GPT, idx: Tensor, contexts: Tensor, advance: Advance) -> Losses:
    """Losses (B, T) of idx (B, T + 1) as in training; writes what each window starts from into contexts (B, W, C)."""
    n = model.config.context_len
    parts = []
    for i, (h, context) in enumerate(model.roll(idx[:, :-1])):
        parts.append(_losses(model, h, idx[:, i * n + 1 : (i + 1) * n + 1]))
        if i + 1 < contexts.size(1):
            contexts[:, i + 1] = context
        advance(len(idx) * n)
    return np.concatenate(parts, axis=1)


def _sliding(model: GPT, idx: Tensor, first: Losses, advance: Advance) -> Losses:
    """Losses (B, T) of idx (B, T + 1) in overlapping windows without a roll; `first` (B, n) are those of the first window."""
    n, T = model.config.context_len, idx.size(1) - 1
    zero = torch.zeros(len(idx), model.config.n_embd)
    losses = np.empty((len(idx), T), np.float32)
    losses[:, :n] = first
    scored = n
    for start in _sliding_starts(T, n)[1:]:
        window = _window(model, idx, slice(start, start + n), zero)
        losses[:, scored : start + n] = window[:, scored - start :]
        scored = start + n
        advance(len(idx) * n)
    return losses


def _sliding_starts(roll_len: int, context_len: int) -> list[int]:
    """Where each overlapping window starts; the last one ends where the roll does."""
    last = roll_len - context_len
    return [*range(0, last, max(1, context_len // 2)), last]


def _window(model: GPT, idx: Tensor, span: slice, context: Tensor) -> Losses:
    """Losses (B, n) of the characters after those of one window, `span` of idx (B, T + 1), from context (B, C)."""
    h = model.transformer(idx[:, span], context)  # (B, n + 1, C)
    return _losses(model, h, idx[:, span.start + 1 : span.stop + 1])


def _losses(model: GPT, h: Tensor, targets: Tensor) -> Losses:
    """Cross-entropy in nats (B, n) of a window's outputs h (B, n + 1, C) against targets (B, n)."""
    logits = model.lm_head(h[:, 1:])  # (B, n, V)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return np.asarray(losses.view(targets.shape).numpy(), np.float32)
