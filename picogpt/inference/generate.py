"""Generation: rolling windows over a text of any length, and seeded sampling.

Ids in, ids out: this module knows no characters, no files and no torch.

Dimensions: B texts in the batch, k new characters, V = vocab_size.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from picogpt.alphabet import UNKNOWN_ID
from picogpt.config import GPTConfig, SampleConfig, TextConfig, alphabet_of
from picogpt.ids import id_dtype
from picogpt.inference import Engine, NativeWindow, Sampling, Window

__all__ = [
    "Decoder",
    "RollingDecoder",
    "Sampler",
    "StepwiseDecoder",
    "StopSequenceFilter",
    "build_filters",
    "continue_prompt",
    "generate",
    "min_p_filter",
    "softmax",
    "suppressed_ids",
    "temperature_filter",
    "top_k_filter",
    "top_p_filter",
]

Floats = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Ids = npt.NDArray[np.integer[Any]]
Filter = Callable[[Scores], Scores]

MAX_PROMPT_WINDOWS = 10
"""Maximum number of windows read of a prompt, counted from its end: 1,280 characters, as far as the original's roll reaches."""

_CALL_SECONDS = 0.02
"""Target duration of one call of `Decoder.decode`: text appears smoothly, and Ctrl-C is handled between two calls."""


class Decoder(Protocol):
    """A model that reads a batch of B texts, and draws the characters that follow."""

    def prefill(self, ids: Ids) -> Floats:
        """Append ids (B, k) to the texts; return the logits (B, V) of the next characters."""

    def decode(self, ids: Ids, sampler: Sampler, max_new: int) -> Ids:
        """Read ids (B,), draw the next ids, read those, and so on; return the ids drawn (n, B), n from 1 to `max_new`."""


class StepwiseDecoder:
    """A `Decoder` for a model that only predicts logits: ids are drawn in numpy, one at a time.

    Args:
        prefill: the model's `Decoder.prefill`.
    """

    def __init__(self, prefill: Callable[[Ids], Floats]) -> None:
        self.prefill = prefill

    def decode(self, ids: Ids, sampler: Sampler, max_new: int) -> Ids:  # noqa: ARG002 (it always returns one)
        """See `Decoder`."""
        return sampler.draw(self.prefill(ids[:, None]))[None]  # (1, B)


class RollingDecoder:
    """A `Decoder` for texts of any length: sliding windows with stride `hop`, each with a KV cache.

    A window fills character by character. When it is full, the next window starts `hop` characters later, and prefills the
    characters that both windows share. Its context vector is the mean of an earlier window, taken where the new window
    starts. That earlier window is the longest one of at most the window's length: a full window if `hop` divides the length,
    and the beginning of the first window as long as there is no other. So every window looks as in training, and the time
    and memory for a character do not grow with the text. With `hop` 1 each character is predicted as if the whole text had
    been cut into windows again for it, the remainder first.

    Example with windows of 8 and hop 4; `c` is the snapshot of a window's mean that a later window starts from:

        window 0   [0 1 2 3 c 4 5 6 7 c]
        window 1           [4 5 6 7 8 9 10 11 c]        starts from window 0 after 4 characters
        window 2                   [8 9 10 11 ...]      starts from window 0 after 8 characters

    Args:
        engine: the model.
        hop: stride from one window's start to the next one's, from 1 to the window's length.
        batch: B, texts in the batch.
    """

    def __init__(self, engine: Engine, hop: int, batch: int = 1) -> None:
        self._context_len = engine.config.context_len
        assert 1 <= hop <= self._context_len, hop
        self._hop = hop
        self._window: Window = engine.window(batch)
        # The window's characters, for the next prefill.
        self._recent = np.zeros((batch, self._context_len), id_dtype(engine.config.vocab_size))
        self._contexts: deque[Floats] = deque()  # snapshots that later windows start from, oldest first
        # Each window snapshots its mean here, at its last whole hop. The first window does so at every hop, because the
        # windows that start before its end have no other window to start from.
        self._snapshot_at = self._context_len // hop * hop
        self._next_snapshot = hop

    def prefill(self, ids: Ids) -> Floats:
        """Append ids (B, k), k >= 1; return the logits (B, V) of the next characters."""
        return [self._window.prefill(part) for part in self._parts(ids)][-1]

    def prefill_all_logits(self, ids: Ids) -> Floats:
        """Append ids (B, k), k >= 1; return the logits (B, k, V) after each of them."""
        return np.concatenate([self._window.prefill(part, all_logits=True) for part in self._parts(ids)], axis=1)

    def decode(self, ids: Ids, sampler: Sampler, max_new: int) -> Ids:
        """Read ids (B,), draw the next ids, read those, and so on, at most `max_new` times and within one window.

        Returns:
            The ids drawn (n, B), n from 1 to `max_new`; the last row has not been read.
        """
        if not isinstance(self._window, NativeWindow):
            return StepwiseDecoder(self.prefill).decode(ids, sampler, max_new)
        n = min(max_new, self._chars_to_boundary())
        drawn = self._window.decode(ids, sampler.uniforms(n), sampler.native)
        # The window has read `ids` and all ids drawn but the last.
        end = len(self._window)
        self._recent[:, end - n : end] = np.concatenate((ids[None], drawn[:-1])).T
        self._take_snapshot()
        return drawn

    def fork(self, batch: int) -> RollingDecoder:
        """Return a decoder of `batch` texts that all continue this one (B = 1)."""
        other = RollingDecoder.__new__(RollingDecoder)
        other.__dict__.update(self.__dict__)  # everything that has a batch dimension is replaced below
        other._window = self._window.fork(batch)
        other._recent = np.repeat(self._recent, batch, axis=0)
        other._contexts = deque(np.repeat(context, batch, axis=0) for context in self._contexts)
        return other

    def _parts(self, ids: Ids) -> Iterator[Ids]:
        """Split `ids` at window ends and snapshots; the caller must prefill each part before it takes the next."""
        start = 0
        while start < ids.shape[1]:
            part = ids[:, start : start + self._chars_to_boundary()]
            n = len(self._window)
            self._recent[:, n : n + part.shape[1]] = part
            yield part
            start += part.shape[1]
            self._take_snapshot()

    def _chars_to_boundary(self) -> int:
        """Return how many characters fit before the next window end or snapshot, at least one; start a window if none fits."""
        if self._window.free == 0:
            self._start_window()
        n = len(self._window)
        return min(self._window.free, self._next_snapshot - n if n < self._next_snapshot else self._context_len)

    def _take_snapshot(self) -> None:
        if len(self._window) == self._next_snapshot:
            self._contexts.append(self._window.context())
            # In later windows the next one is beyond the end, so there is one snapshot for each window.
            self._next_snapshot = min(self._next_snapshot + self._hop, self._context_len + 1)

    def _start_window(self) -> None:
        self._window.reset(self._contexts.popleft())
        # The KV cache depends on positions in the window, so the shared characters are prefilled again.
        shared = self._recent[:, self._hop :].copy()
        if shared.size:  # none if the hop is a whole window
            self._window.prefill(shared)
            self._recent[:, : shared.shape[1]] = shared
        self._next_snapshot = self._snapshot_at


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


class StopSequenceFilter:
    """Holds back ids that may begin a stop sequence, and ends a text where a stop sequence is complete.

    Args:
        stops: the ids of each stop sequence.
    """

    def __init__(self, stops: Sequence[Sequence[int]]) -> None:
        self._stops = [tuple(stop) for stop in stops]
        self._held: list[int] = []
        self.stopped = False
        """Whether a stop sequence was found."""

    def push(self, token: int) -> list[int]:
        """Take the next id; return the ids that can no longer be part of a stop sequence."""
        if not self._stops:
            return [token]
        self._held.append(token)
        held = tuple(self._held)
        for stop in self._stops:
            if held[-len(stop) :] == stop:
                self.stopped = True
                return self._release(len(held) - len(stop))
        # Hold back the longest suffix that is a proper prefix of a stop sequence; everything before it is safe.
        longest = max((n for stop in self._stops for n in range(1, len(stop)) if held[-n:] == stop[:n]), default=0)
        return self._release(len(held) - longest)

    def _release(self, count: int) -> list[int]:
        released, self._held = self._held[:count], self._held[count:]
        return released

    def flush(self) -> list[int]:
        """Return the ids still held back at the end of the text; none if a stop sequence was found."""
        return [] if self.stopped else self._release(len(self._held))


def continue_prompt(
    engine: Engine, ids: Ids, n_new: int | None, *, hop: int, sampler: Sampler, stops: Sequence[Sequence[int]] = ()
) -> Iterator[tuple[list[list[int]], list[bool]]]:
    """Continue one prompt with as many texts as the sampler draws.

    Args:
        engine: the model.
        ids: the prompt's ids (k,), k >= 1.
        n_new: characters to generate for each text; None means no limit.
        hop: stride of the windows; see `RollingDecoder`.
        sampler: draws the ids.
        stops: the ids of each stop sequence.

    Yields:
        Several times a second: for each text its new ids, and whether a stop sequence has ended it.
    """
    decoder = RollingDecoder(engine, hop)
    logits = decoder.prefill(np.asarray(ids, id_dtype(engine.config.vocab_size))[None])  # (1, V)
    if sampler.batch > 1:  # the prompt is read once for all texts
        decoder, logits = decoder.fork(sampler.batch), np.repeat(logits, sampler.batch, axis=0)
    stop_filters = [StopSequenceFilter(stops) for _ in range(sampler.batch)]
    for new_ids in generate(decoder, logits, n_new, sampler=sampler, stop_filters=stop_filters):
        yield new_ids, [stop_filter.stopped for stop_filter in stop_filters]


def generate(
    decoder: Decoder, logits: Floats, n_new: int | None, *, sampler: Sampler, stop_filters: Sequence[StopSequenceFilter]
) -> Iterator[list[list[int]]]:
    """Continue B texts until each has `n_new` characters or ends in a stop sequence.

    Args:
        decoder: the model, which has read the prompt.
        logits: its logits after the prompt (B, V).
        n_new: characters to generate for each text; None means no limit.
        sampler: draws the ids.
        stop_filters: B filters, one for each text.

    Yields:
        For each text its new ids, several times a second.
    """
    left = math.inf if n_new is None else n_new
    # The first id comes from the prompt's logits; every later one from `decode`, which reads the id before it.
    drawn: Ids = sampler.draw(logits)[None] if left else np.empty((0, len(stop_filters)), np.intp)  # (n, B)
    max_new = 1
    while len(drawn):
        left -= len(drawn)
        yield [_push_all(stop_filter, ids) for stop_filter, ids in zip(stop_filters, drawn.T.tolist(), strict=True)]
        # The batch is decoded until its last text has stopped.
        if not left or all(stop_filter.stopped for stop_filter in stop_filters):
            break
        # The length of a call starts at one character and doubles until the call takes `_CALL_SECONDS`.
        start = time.perf_counter()
        drawn = decoder.decode(drawn[-1], sampler, int(min(left, max_new)))
        seconds = (time.perf_counter() - start) / len(drawn)
        max_new = max(1, min(2 * max_new, int(_CALL_SECONDS / seconds)))
    yield [stop_filter.flush() for stop_filter in stop_filters]


def _push_all(stop_filter: StopSequenceFilter, ids: Sequence[int]) -> list[int]:
    """Push `ids` up to a stop sequence; return the ids that come out."""
    released: list[int] = []
    for token in ids:
        if stop_filter.stopped:
            break
        released += stop_filter.push(token)
    return released
