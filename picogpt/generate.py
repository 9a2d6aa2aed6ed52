"""From predictions to characters: sampling, pure and seeded. Ids in, ids out; knows no model and no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from picogpt.config import SampleConfig
from picogpt.tokenizer import SPECIAL_IDS, TEXT_IDS, VOCAB_SIZE

__all__ = ["NextLogits", "generate_ids", "make_generator", "probabilities", "sample_id"]

Logits = npt.NDArray[np.float32]
NextLogits = Callable[[list[int]], Logits]
"""Gives the logits (V,) of the character after the ids so far."""

_NEVER_DRAWN = np.array(sorted(set(range(VOCAB_SIZE)) - set(TEXT_IDS) - set(SPECIAL_IDS.values())))
"""Ids that stand for no text: unknown and spare."""


def make_generator(seed: int) -> np.random.Generator:
    """The generator of all draws: the same seed gives the same text."""
    return np.random.Generator(np.random.Philox(key=seed % 2**128))


def probabilities(logits: Logits, config: SampleConfig) -> npt.NDArray[np.float64]:
    """The distribution (V,) to draw from: softmax of `logits` / temperature, over the `top_k` likeliest.

    Temperature 0 puts everything on the likeliest id. Ids that stand for no text get nothing.
    """
    scores = logits.astype(np.float64)
    if scores.size == VOCAB_SIZE:
        scores[_NEVER_DRAWN] = -np.inf
    if config.temperature == 0:
        greedy = np.zeros_like(scores)
        greedy[scores.argmax()] = 1.0
        return greedy
    if 0 < config.top_k < scores.size:
        # A stable order of equals, so that the result is the same everywhere.
        scores[np.argsort(-scores, kind="stable")[config.top_k :]] = -np.inf
    weights = np.exp((scores - scores.max()) / config.temperature)
    drawn: npt.NDArray[np.float64] = weights / weights.sum()
    return drawn


def sample_id(logits: Logits, config: SampleConfig, generator: np.random.Generator) -> int:
    """Draw one id from `probabilities`, using one number of `generator`."""
    cumulative = probabilities(logits, config).cumsum()
    return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))


def generate_ids(
    next_logits: NextLogits, prompt: list[int], n_new: int | None, config: SampleConfig, generator: np.random.Generator
) -> Iterator[int]:
    """Yield `n_new` ids, or ids without end for None, that go on after `prompt`, which holds at least one."""
    ids = list(prompt)
    while n_new is None or len(ids) - len(prompt) < n_new:
        ids.append(sample_id(next_logits(ids), config, generator))
        yield ids[-1]
