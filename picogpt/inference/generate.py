"""Generation: characters one after the other, until each text is long enough or ends in a stop sequence.

Ids in, ids out: this module knows no characters, no files and no torch.

Dimensions: B texts in the batch, V = vocab_size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np

from picogpt.ids import id_dtype
from picogpt.inference import Engine, Ids
from picogpt.inference.decoder import Decoder, RollingDecoder
from picogpt.inference.sampling import Sampler
from picogpt.inference.tensors import Floats

__all__ = ["MAX_PROMPT_WINDOWS", "StopSequenceFilter", "continue_prompt", "generate"]

MAX_PROMPT_WINDOWS = 10
"""Maximum number of windows read of a prompt, counted from its end: 1,280 characters, as far as the original's roll reaches."""

_CALL_SECONDS = 0.02
"""Target duration of one call of `Decoder.decode`: text appears smoothly, and Ctrl-C is handled between two calls."""


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
