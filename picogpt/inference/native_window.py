"""Windows of text whose KV cache `kernels/decode.c` fills, and the losses of whole windows.

Dimensions: L layers, B texts side by side, k new characters, H heads of D entries, C = n_embd, S slots of a window, V ids,
W whole windows; D, S, C and V are padded in memory.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.inference.layout import CacheType, DecodeStruct, PrefillStruct, SamplingStruct, ScoringStruct, WindowsStruct
from picogpt.inference.native import NativeModel, aligned, padded
from picogpt.inference.tensors import Floats
from picogpt.inference.tuner import ThreadTuner
from picogpt.inference.window import Ids

__all__ = ["NativeWindow", "Sampling", "score_windows"]

_MANY_TEXTS = 8
"""From so many texts on the KV cache is in bfloat16, unless float32 is asked for."""
_ROWS = 256
"""Rows of activations at once, at least; longer inputs are read in pieces."""


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn; see `picogpt.config.SampleConfig`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    allowed: npt.NDArray[np.float64]
    """(V,): 0 for ids that may be drawn, and -inf for others."""

    def struct(self) -> SamplingStruct:
        """The structure for C, which this object has to outlive."""
        numbers = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return SamplingStruct(**numbers, allowed=self.allowed.ctypes.data)


class NativeWindow:
    """A `picogpt.inference.window.Window` in C.

    Args:
        model: the packed model.
        threads: how many compute it, at most.
        batch: B, how many texts go side by side.
    """

    def __init__(self, model: NativeModel, threads: int, batch: int = 1) -> None:
        config, self._model, self._threads, self._batch = model.config, model, threads, batch
        self._rows = max(_ROWS, 2 * batch)
        heads, D, S = (config.n_layer, batch, config.n_head), model.head_size, config.context_len + 1
        # Many texts have more keys and values than the processor's caches hold; in half the size they are read in half the time.
        in_bfloat16 = batch >= _MANY_TEXTS and model.dtype != "float32"
        cache_type = np.uint16 if in_bfloat16 else np.float32
        self._keys = aligned((*heads, D, padded(S)), cache_type)  # reordered within a head, see decode.c
        self._values = aligned((*heads, S, padded(D)), cache_type)
        self._contexts: Floats = aligned((batch, padded(config.n_embd)), np.float32)
        self._sums: Floats = aligned((batch, padded(config.n_embd)), np.float32)
        self._workspace = aligned((model.library.workspace_bytes(model.address, self._rows, threads),), np.uint8)
        self._tuner = ThreadTuner(threads)
        arrays = {"keys": self._keys, "values": self._values, "sums": self._sums, "contexts": self._contexts}
        cache = CacheType.CACHE_BFLOAT16 if in_bfloat16 else CacheType.CACHE_FLOAT32
        self._struct = WindowsStruct(**{name: array.ctypes.data for name, array in arrays.items()}, texts=batch, cache=cache)

    def reset(self, contexts: Floats) -> None:
        """See `Window`."""
        self._struct.filled = 0
        self._contexts[:, : contexts.shape[1]] = contexts
        self._sums[...] = 0

    def fork(self, batch: int) -> NativeWindow:
        """See `Window`."""
        other = NativeWindow(self._model, self._threads, batch)
        for theirs, ours in ((other._keys, self._keys), (other._values, self._values)):
            theirs[...] = ours if theirs.dtype == ours.dtype else _bfloat16(ours)
        other._contexts[...], other._sums[...] = self._contexts, self._sums
        other._struct.filled = self._struct.filled
        return other

    def __len__(self) -> int:
        """See `Window`."""
        return max(0, int(self._struct.filled) - 1)

    @property
    def free(self) -> int:
        """See `Window`."""
        return self._model.config.context_len - len(self)

    def context(self) -> Floats:
        """See `Window`."""
        mean: Floats = self._sums[:, : self._model.config.n_embd] / np.float32(self._struct.filled)
        return mean

    def prefill(self, ids: Ids, *, every: bool = False) -> Floats:
        """See `Window`."""
        assert 1 <= ids.shape[1] <= self.free, (ids.shape, self.free)
        most = self._rows // self._batch - 1  # beside the context vector's slot
        parts = [self._prefill(ids[:, i : i + most], every=every) for i in range(0, ids.shape[1], most)]
        logits: Floats = np.concatenate(parts, axis=1) if every else parts[-1]
        return logits

    def _prefill(self, ids: Ids, *, every: bool) -> Floats:
        V = self._model.config.vocab_size
        ids = np.ascontiguousarray(ids, np.int32)
        logits: Floats = aligned((*ids.shape, padded(V)) if every else (len(ids), padded(V)), np.float32)
        request = PrefillStruct(
            **self._common(ids, self._tuner.threads), logits=logits.ctypes.data, length=ids.shape[1], every=every
        )
        self._model.library.prefill(ctypes.addressof(request))
        self._struct.filled += ids.shape[1] + (self._struct.filled == 0)
        return logits[..., :V]

    def decode(self, ids: Ids, numbers: npt.NDArray[np.float64], sampling: Sampling) -> npt.NDArray[np.int32]:
        """Read `ids` (B,) and draw the next ones, read those and draw again, and so on.

        Args:
            ids: drawn before and not read yet.
            numbers: (n, B), each from 0 to 1; n from 1 to `free`.
            sampling: how ids are drawn.

        Returns:
            The ids drawn (n, B), of which the last have not been read.
        """
        assert 1 <= len(numbers) <= self.free, (len(numbers), self.free)
        if self._struct.filled == 0:
            self._prefill(np.empty((self._batch, 0), np.int32), every=False)  # the context vectors' slot
        ids, drawn = np.ascontiguousarray(ids, np.int32), np.empty(numbers.shape, np.int32)
        how, made = sampling.struct(), 0
        while made < len(numbers):
            with self._tuner.block(len(numbers) - made) as (threads, count):
                request = DecodeStruct(
                    **self._common(ids if made == 0 else drawn[made - 1], threads),
                    sampling=ctypes.addressof(how),
                    uniforms=numbers[made:].ctypes.data,
                    drawn=drawn[made:].ctypes.data,
                    count=count,
                )
                self._model.library.decode(ctypes.addressof(request))
            self._struct.filled += count
            made += count
        return drawn

    def _common(self, ids: Ids, threads: int) -> dict[str, int]:
        return {
            "model": self._model.address,
            "windows": ctypes.addressof(self._struct),
            "ids": ids.ctypes.data,
            "workspace": self._workspace.ctypes.data,
            "threads": threads,
        }


def _bfloat16(array: Floats) -> npt.NDArray[np.integer[Any]]:
    """The upper halves of `array`, rounded to nearest, ties to even."""
    bits = array.view(np.uint32)
    rounded: npt.NDArray[np.integer[Any]] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return rounded


def score_windows(model: NativeModel, threads: int, ids: Ids, contexts: Floats) -> tuple[Floats, Floats]:
    """The losses of W windows, each by itself; see `picogpt.inference.Engine.score`."""
    C, (windows, length) = model.config.n_embd, (ids.shape[0], ids.shape[1] - 1)
    assert 1 <= length <= model.config.context_len, ids.shape
    ids = np.ascontiguousarray(ids, np.int32)
    losses = np.empty((windows, length), np.float32)
    starts, means = aligned((2, windows, padded(C)), np.float32)
    starts[:, :C] = contexts
    threads = min(threads, windows)
    workspace = aligned((model.library.scoring_bytes(model.address, length, threads),), np.uint8)
    arrays = {"ids": ids, "contexts": starts, "losses": losses, "means": means, "workspace": workspace}
    request = ScoringStruct(
        model=model.address,
        **{name: array.ctypes.data for name, array in arrays.items()},
        windows=windows,
        length=length,
        threads=threads,
    )
    model.library.score(ctypes.addressof(request))
    return losses, means[:, :C]
