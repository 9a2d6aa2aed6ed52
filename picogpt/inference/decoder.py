"""Decoders: texts of any length, read and continued by a model with a window of fixed length.

Ids in, ids out: this module knows no characters, no files and no torch.

Dimensions: B texts in the batch, k new characters, V = vocab_size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from picogpt.ids import id_dtype
from picogpt.inference import Engine, Ids, NativeWindow, Window
from picogpt.inference.sampling import Sampler
from picogpt.inference.tensors import Floats

__all__ = ["Decoder", "RollingDecoder", "StepwiseDecoder"]


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
