"""From predictions to characters: windows that hop through a text of any length, and sampling, pure and seeded.

Ids in, ids out; knows no characters, no files and no torch.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from picogpt.config import SampleConfig, TextConfig
from picogpt.inference import Engine, NativeWindow, Sampling, Window
from picogpt.tokenizer import SPECIAL_IDS, TEXT_IDS, UNKNOWN_ID, VOCAB_SIZE

__all__ = [
    "OneByOne",
    "Reader",
    "RollingDecoder",
    "Sampler",
    "StopWatcher",
    "filters_of",
    "generate",
    "min_p_filter",
    "never_drawn",
    "temperature_filter",
    "top_k_filter",
    "top_p_filter",
]

Floats = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Ids = npt.NDArray[np.integer[Any]]
Filter = Callable[[Scores], Scores]

ROLL_WINDOWS = 10
"""Windows of a prompt that are read, counted from its end: as many as training rolls over."""

_SHOWN_EVERY = 0.02
"""Seconds in which what is drawn at once should be done: text is to appear smoothly, and Ctrl-C to be heard."""


class Reader(Protocol):
    """A model that reads B texts side by side and predicts what follows."""

    def prefill(self, ids: Ids) -> Floats:
        """Read ids (B, k) behind those read before; return the logits (B, V) of the characters after them."""

    def decode(self, ids: Ids, sampler: Sampler, most: int) -> Ids:
        """Read ids (B,), draw the next ones, and so on up to `most` times; return what was drawn (n, B), n from 1 to `most`."""


class OneByOne:
    """A `Reader` made of a model that only predicts: ids are drawn in numpy.

    Args:
        prefill: the model's; see `Reader`.
    """

    def __init__(self, prefill: Callable[[Ids], Floats]) -> None:
        self.prefill = prefill

    def decode(self, ids: Ids, sampler: Sampler, most: int) -> Ids:  # noqa: ARG002 (one is allowed)
        """See `Reader`."""
        return sampler.draw(self.prefill(ids[:, None]))[None]


class RollingDecoder:
    """The rolling text: windows with a KV cache, each beginning `hop` characters after the one before it.

    A window fills character by character. When it is full the next one begins `hop` characters further on: what the two
    have in common, the newest characters, is read again in one go. Its context vector is that of an earlier window up to
    the place where it begins itself: the longest stretch of at most a window's length, so a whole window where `hop` divides
    that length, and the beginning of the first window while there is no other. So every window is one that training
    knows, and time and memory for a character do not grow with the text. With `hop` 1 every character is predicted as if
    the whole text had been cut anew for it, remainder first.

    Args:
        engine: the model.
        hop: characters from one window's beginning to the next one's, from 1 to the window's length.
        batch: B, how many texts go side by side.
    """

    def __init__(self, engine: Engine, hop: int, batch: int = 1) -> None:
        self._context_len = engine.config.context_len
        assert 1 <= hop <= self._context_len, hop
        self._hop = hop
        self._window: Window = engine.window(batch)
        self._recent = np.zeros((batch, self._context_len), np.uint8)  # the window's characters
        self._contexts: deque[Floats] = deque()  # for the windows to come
        # Of each window the mean up to here is kept; of the first one also those of the hops on the way.
        self._kept_at = self._context_len // hop * hop
        self._next_kept = hop

    def prefill(self, ids: Ids) -> Floats:
        """Read ids (B, k), k >= 1; return the logits (B, V) of the characters after them."""
        return [self._window.prefill(part) for part in self._parts(ids)][-1]

    def prefill_every(self, ids: Ids) -> Floats:
        """Read ids (B, k), k >= 1; return the logits (B, k, V) after each of them."""
        return np.concatenate([self._window.prefill(part, every=True) for part in self._parts(ids)], axis=1)

    def decode(self, ids: Ids, sampler: Sampler, most: int) -> Ids:
        """Read ids (B,), draw the next ones, and so on up to `most` times, within one window.

        Returns:
            The ids drawn (n, B), n from 1 to `most`, of which the last have not been read.
        """
        if not isinstance(self._window, NativeWindow):
            return OneByOne(self.prefill).decode(ids, sampler, most)
        n = min(most, self._make_space())
        drawn = self._window.decode(ids, sampler.numbers(n), sampler.native)
        end = len(self._window)
        self._recent[:, end - n : end] = np.concatenate((ids[None], drawn[:-1])).T
        self._keep_context()
        return drawn

    def fork(self, batch: int) -> RollingDecoder:
        """`batch` texts that all continue this one (B = 1)."""
        other = RollingDecoder.__new__(RollingDecoder)
        other.__dict__.update(self.__dict__)
        other._window = self._window.fork(batch)
        other._recent = np.repeat(self._recent, batch, axis=0)
        other._contexts = deque(np.repeat(context, batch, axis=0) for context in self._contexts)
        return other

    def _parts(self, ids: Ids) -> Iterator[Ids]:
        """Cut `ids` where a window is full or a mean is to be kept; the caller reads each part before asking for the next."""
        start = 0
        while start < ids.shape[1]:
            part = ids[:, start : start + self._make_space()]
            n = len(self._window)
            self._recent[:, n : n + part.shape[1]] = part
            yield part
            start += part.shape[1]
            self._keep_context()

    def _make_space(self) -> int:
        """How many characters can be read before a window is full or a mean is to be kept; at least one."""
        if self._window.free == 0:
            self._begin_next()
        n = len(self._window)
        return min(self._window.free, self._next_kept - n if n < self._next_kept else self._context_len)

    def _keep_context(self) -> None:
        if len(self._window) == self._next_kept:
            self._contexts.append(self._window.context())
            self._next_kept = min(self._next_kept + self._hop, self._context_len + 1)

    def _begin_next(self) -> None:
        self._window.reset(self._contexts.popleft())
        kept = self._recent[:, self._hop :].copy()
        if kept.size:
            self._window.prefill(kept)
            self._recent[:, : kept.shape[1]] = kept
        self._next_kept = self._kept_at


def never_drawn(text: TextConfig | None, *, chat: bool = False) -> npt.NDArray[np.intp]:
    """Ids that a model never draws: all but those of its training text, without unknown and the special tokens.

    The model has learned nothing of an id that its text did not hold.

    Args:
        text: what is known of the training text; None allows all characters.
        chat: whether to allow the special tokens.
    """
    specials = set(SPECIAL_IDS.values())
    drawn = set(TEXT_IDS if text is None else text.ids) - specials - {UNKNOWN_ID}
    return np.array(sorted(set(range(VOCAB_SIZE)) - drawn - (specials if chat else set())), np.intp)


def never_filter(scores: Scores, ids: npt.NDArray[np.intp]) -> Scores:
    """Leave all but `ids` of the scores (..., V)."""
    left: Scores = scores.copy()
    left[..., ids] = -np.inf
    return left


def temperature_filter(scores: Scores, temperature: float) -> Scores:
    """Divide logits `scores` (..., V), less the largest, by `temperature`; 0 leaves only the likeliest, the first of equals."""
    if temperature == 0:
        best = np.full_like(scores, -np.inf)
        np.put_along_axis(best, scores.argmax(axis=-1, keepdims=True), 0.0, axis=-1)
        return best
    # The maximum goes first, so that a tiny temperature makes no infinity less infinity.
    with np.errstate(over="ignore"):
        divided: Scores = (scores - scores.max(axis=-1, keepdims=True)) / temperature
    return divided


def top_k_filter(scores: Scores, k: int) -> Scores:
    """Leave the `k` largest of `scores` (..., V), of equals the first; 0 leaves all."""
    if not 0 < k < scores.shape[-1]:
        return scores
    order = np.argsort(-scores, axis=-1, kind="stable")
    return _without(scores, order[..., k:])


def top_p_filter(scores: Scores, p: float) -> Scores:
    """Leave the likeliest of `scores` (..., V) that together reach probability `p` (nucleus: Holtzman et al., 2020)."""
    if p >= 1:
        return scores
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(_softmax(scores), order, axis=-1)
    before = ranked.cumsum(axis=-1) - ranked
    kept = np.where(before < p, np.take_along_axis(scores, order, axis=-1), -np.inf)
    result = np.empty_like(scores)
    np.put_along_axis(result, order, kept, axis=-1)
    return result


def min_p_filter(scores: Scores, p: float) -> Scores:
    """Leave those of `scores` (..., V) at least `p` times as likely as the likeliest (Nguyen et al., 2025)."""
    if p <= 0:
        return scores
    kept: Scores = np.where(scores >= scores.max(axis=-1, keepdims=True) + math.log(p), scores, -np.inf)
    return kept


def _without(scores: Scores, indices: npt.NDArray[np.intp]) -> Scores:
    left: Scores = scores.copy()
    np.put_along_axis(left, indices, -np.inf, axis=-1)
    return left


def _softmax(scores: Scores) -> Scores:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities: Scores = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities


def filters_of(config: SampleConfig, never: npt.NDArray[np.intp] | None = None) -> list[Filter]:
    """The filters of `config` that do anything, in the order in which they are applied; ids of `never` are left out first."""
    chosen: list[Filter] = [] if never is None else [lambda scores: never_filter(scores, never)]
    chosen.append(lambda scores: temperature_filter(scores, config.temperature))
    if config.top_k:
        chosen.append(lambda scores: top_k_filter(scores, config.top_k))
    if config.top_p < 1:
        chosen.append(lambda scores: top_p_filter(scores, config.top_p))
    if config.min_p > 0:
        chosen.append(lambda scores: min_p_filter(scores, config.min_p))
    return chosen


class Sampler:
    """Draws ids, each with one number of its own text's generator.

    Args:
        config: how.
        generators: one for each of B texts; see `picogpt.rng.sample_generator`.
        never: ids that are not drawn (`never_drawn`).
    """

    def __init__(
        self,
        config: SampleConfig,
        generators: Sequence[np.random.Generator],
        never: npt.NDArray[np.intp] | None = None,
    ) -> None:
        self._filters, self._generators = filters_of(config, never), generators
        allowed = np.zeros(VOCAB_SIZE)
        allowed[[] if never is None else never] = -np.inf
        self.native = Sampling(config.temperature, config.top_k, config.top_p, config.min_p, allowed)
        """The same for the functions in C, which come to the same ids."""

    def numbers(self, count: int) -> Scores:
        """The next `count` numbers of each generator, (count, B)."""
        numbers: Scores = np.stack([generator.random(count) for generator in self._generators], axis=1)
        return numbers

    def draw(self, logits: Floats) -> npt.NDArray[np.intp]:
        """An id for each row of `logits` (B, V)."""
        scores = logits.astype(np.float64)
        for apply in self._filters:
            scores = apply(scores)
        cumulative = np.exp(scores - scores.max(axis=-1, keepdims=True)).cumsum(axis=-1)
        draws = self.numbers(1)[0] * cumulative[:, -1]
        drawn: npt.NDArray[np.intp] = (cumulative > draws[:, None]).argmax(axis=-1)
        return drawn


class StopWatcher:
    """Holds back characters that may be the beginning of a stop text, and ends a sample where one is complete.

    Args:
        stops: the ids of each stop text.
    """

    def __init__(self, stops: Sequence[Sequence[int]]) -> None:
        self._stops = [tuple(stop) for stop in stops]
        self._held: list[int] = []
        self.stopped = False
        """Whether a stop text has come."""

    def pass_on(self, token: int) -> list[int]:
        """Take the next id; return those that are now certain to be no part of a stop text."""
        if not self._stops:
            return [token]
        self._held.append(token)
        held = tuple(self._held)
        for stop in self._stops:
            if held[-len(stop) :] == stop:
                self.stopped = True
                return self._release(len(held) - len(stop))
        longest = max((n for stop in self._stops for n in range(1, len(stop)) if held[-n:] == stop[:n]), default=0)
        return self._release(len(held) - longest)

    def _release(self, count: int) -> list[int]:
        released, self._held = self._held[:count], self._held[count:]
        return released

    def finish(self) -> list[int]:
        """What is still held back when no more comes; nothing once a stop text has come."""
        return [] if self.stopped else self._release(len(self._held))


def generate(
    reader: Reader, logits: Floats, n_new: int | None, *, sampler: Sampler, watchers: Sequence[StopWatcher]
) -> Iterator[list[list[int]]]:
    """Continue B texts until each has `n_new` characters or a stop text.

    Args:
        reader: the model, which has read the prompt.
        logits: what it predicts after the prompt (B, V).
        n_new: characters of each text; None for no end.
        sampler: how they are drawn.
        watchers: B watchers for stop texts.

    Yields:
        Several times a second, for each text the ids that are now certain to be part of it.
    """
    left = math.inf if n_new is None else n_new
    drawn: Ids = sampler.draw(logits)[None] if left else np.empty((0, len(watchers)), np.intp)
    at_once = 1
    while len(drawn):
        left -= len(drawn)
        yield [_pass_on(watcher, ids) for watcher, ids in zip(watchers, drawn.T.tolist(), strict=True)]
        if not left or all(watcher.stopped for watcher in watchers):
            break
        start = time.perf_counter()
        drawn = reader.decode(drawn[-1], sampler, int(min(left, at_once)))
        seconds = (time.perf_counter() - start) / len(drawn)
        at_once = max(1, min(2 * at_once, int(_SHOWN_EVERY / seconds)))
    yield [watcher.finish() for watcher in watchers]


def _pass_on(watcher: StopWatcher, ids: Sequence[int]) -> list[int]:
    """The ids that are certain once `ids` have come, up to a stop text."""
    certain: list[int] = []
    for token in ids:
        if watcher.stopped:
            break
        certain += watcher.pass_on(token)
    return certain
