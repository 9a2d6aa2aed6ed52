"""Seeded sampling: which ids are never drawn, the filters of the logits, and the draw.

Dimensions: B texts in the batch, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from picogpt.alphabet import UNKNOWN_ID
from picogpt.config import GPTConfig, SampleConfig, TextConfig, alphabet_of
from picogpt.inference import Sampling
from picogpt.inference.tensors import Floats

__all__ = [
    "Sampler",
    "Scores",
    "build_filters",
    "min_p_filter",
    "softmax",
    "suppressed_ids",
    "temperature_filter",
    "top_k_filter",
    "top_p_filter",
]

Scores = npt.NDArray[np.float64]
Filter = Callable[[Scores], Scores]


def suppressed_ids(text: TextConfig | None, *, chat: bool = False) -> npt.NDArray[np.intp]:
    """Return the ids that are never drawn: those not in the training text, the unknown id and the special tokens.

    The model has learned nothing about an id that never occurred in training.

    Args:
        text: description of the training text; None allows all characters of the original project's alphabet.
        chat: whether to allow the special tokens.
    """
    # The suppressed ids are the complement of the allowed ones.
    alphabet = alphabet_of(text)
    specials = set(alphabet.special_ids.values())
    drawn = set(alphabet.text_ids if text is None else text.ids) - specials - {UNKNOWN_ID}
    return np.array(sorted(set(range(alphabet.vocab_size)) - drawn - (specials if chat else set())), np.intp)


def suppress_filter(scores: Scores, ids: npt.NDArray[np.intp]) -> Scores:
    """Set `ids` of `scores` (..., V) to -inf."""
    kept: Scores = scores.copy()
    kept[..., ids] = -np.inf
    return kept


def temperature_filter(scores: Scores, temperature: float) -> Scores:
    """Divide logits `scores` (..., V), minus their maximum, by `temperature`; 0 keeps only the argmax, the first of equals."""
    if temperature == 0:
        best = np.full_like(scores, -np.inf)
        np.put_along_axis(best, scores.argmax(axis=-1, keepdims=True), 0.0, axis=-1)
        return best
    # The maximum is subtracted first: it stays 0 at any temperature, and all else may overflow to -inf, but never to NaN.
    with np.errstate(over="ignore"):
        divided: Scores = (scores - scores.max(axis=-1, keepdims=True)) / temperature
    return divided


def top_k_filter(scores: Scores, k: int) -> Scores:
    """Keep the `k` largest of `scores` (..., V), the first of equals; 0 keeps all."""
    if not 0 < k < scores.shape[-1]:
        return scores
    # A stable sort, so that of equal scores the same ones are kept as by the native kernels.
    order = np.argsort(-scores, axis=-1, kind="stable")
    return _without(scores, order[..., k:])


def top_p_filter(scores: Scores, p: float) -> Scores:
    """Keep the smallest set of `scores` (..., V) whose probability reaches `p` (nucleus sampling: Holtzman et al., 2020)."""
    if p >= 1:
        return scores
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(softmax(scores), order, axis=-1)  # probabilities, largest first
    # An id is kept if the probability of those ranked before it is below p, so the one that reaches p is kept too.
    before = ranked.cumsum(axis=-1) - ranked
    kept = np.where(before < p, np.take_along_axis(scores, order, axis=-1), -np.inf)
    result = np.empty_like(scores)  # back in the order of ids
    np.put_along_axis(result, order, kept, axis=-1)
    return result


def min_p_filter(scores: Scores, p: float) -> Scores:
    """Keep `scores` (..., V) with at least `p` times the largest probability (min-p: Nguyen et al., 2025)."""
    if p <= 0:
        return scores
    # q >= p max(q) in logits: s >= max(s) + log(p), without a softmax.
    kept: Scores = np.where(scores >= scores.max(axis=-1, keepdims=True) + math.log(p), scores, -np.inf)
    return kept


def _without(scores: Scores, indices: npt.NDArray[np.intp]) -> Scores:
    kept: Scores = scores.copy()
    np.put_along_axis(kept, indices, -np.inf, axis=-1)
    return kept


def softmax(scores: Scores) -> Scores:
    """Return the probabilities (..., V) of logits."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities: Scores = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities


def build_filters(config: SampleConfig, suppressed: npt.NDArray[np.intp] | None = None) -> list[Filter]:
    """Return the active filters of `config` in the order in which they apply; `suppressed` ids are removed first."""
    filters: list[Filter] = [] if suppressed is None else [lambda scores: suppress_filter(scores, suppressed)]
    filters.append(lambda scores: temperature_filter(scores, config.temperature))
    if config.top_k:
        filters.append(lambda scores: top_k_filter(scores, config.top_k))
    if config.top_p < 1:
        filters.append(lambda scores: top_p_filter(scores, config.top_p))
    if config.min_p > 0:
        filters.append(lambda scores: min_p_filter(scores, config.min_p))
    return filters


class Sampler:
    """Draws ids, using exactly one random number per id from the text's own generator.

    Args:
        config: the sampling parameters.
        generators: one for each of B texts; see `picogpt.rng.sample_generator`.
        suppressed: ids that are never drawn (`suppressed_ids`).
        vocab_size: V, number of ids of the model.
    """

    def __init__(
        self,
        config: SampleConfig,
        generators: Sequence[np.random.Generator],
        suppressed: npt.NDArray[np.intp] | None = None,
        *,
        vocab_size: int = GPTConfig.vocab_size,
    ) -> None:
        self._filters, self._generators = build_filters(config, suppressed), generators
        self.batch = len(generators)
        """B, texts that are drawn side by side."""
        allowed = np.zeros(vocab_size)
        allowed[[] if suppressed is None else suppressed] = -np.inf
        # More than all characters is all of them, and the kernels take a number of 32 bits.
        top_k = min(config.top_k, vocab_size)
        self.native = Sampling(config.temperature, top_k, config.top_p, config.min_p, allowed)
        """The same parameters for the native kernels, which draw the same ids."""

    def uniforms(self, count: int) -> Scores:
        """Draw `count` random numbers in [0, 1) from each generator, (count, B)."""
        uniforms: Scores = np.stack([generator.random(count) for generator in self._generators], axis=1)
        return uniforms

    def draw(self, logits: Floats) -> npt.NDArray[np.intp]:
        """Draw an id for each row of `logits` (B, V)."""
        # float64, as in the native kernels, so that both draw the same ids from the same logits.
        scores = logits.astype(np.float64)
        for apply in self._filters:
            scores = apply(scores)
        # Inverse transform sampling: the first id whose cumulative probability exceeds the random number. The probabilities
        # are not normalised; the random number is scaled by their sum instead.
        cumulative = np.exp(scores - scores.max(axis=-1, keepdims=True)).cumsum(axis=-1)  # (B, V)
        draws = self.uniforms(1)[0] * cumulative[:, -1]  # (B,)
        drawn: npt.NDArray[np.intp] = (cumulative > draws[:, None]).argmax(axis=-1)
        return drawn
