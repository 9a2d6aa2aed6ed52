"""Windows of text whose KV cache the native kernels fill, and the losses of whole windows (`kernels/csrc/decode.c`).

Dimensions: L layers, B texts in the batch, k new characters, H heads of D entries, C = n_embd, S slots of a window, V ids,
W whole windows; D, S, C and V are padded in memory.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from picogpt.inference.layout import CacheType, DecodeStruct, PrefillStruct, SamplingStruct, ScoringStruct, WindowsStruct
from picogpt.inference.native import NativeModel, aligned, padded
from picogpt.inference.tensors import Floats, to_bfloat16
from picogpt.inference.tuner import ThreadTuner
from picogpt.inference.window import Ids

__all__ = ["NativeWindow", "Sampling", "score_windows"]

_BFLOAT16_BATCH = 8
"""Smallest batch with a KV cache in bfloat16, unless the model is in float32."""
_CHUNK_ROWS = 256
"""Rows of activations that the workspace holds, at least; longer inputs are read in chunks."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters for the native kernels; see `picogpt.config.SampleConfig`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    allowed: npt.NDArray[np.float64]
    """(V,): 0 for ids that may be drawn, -inf for suppressed ones; added to the logits."""

    def struct(self) -> SamplingStruct:
        """Return the C structure. It points into this object, which must outlive it."""
        parameters = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return SamplingStruct(**parameters, allowed=self.allowed.ctypes.data)


class NativeWindow:
    """A `picogpt.inference.window.Window` computed by the native kernels.

    Args:
        model: the packed model.
        threads: maximum number of threads.
        batch: B, texts in the batch.
    """

    def __init__(self, model: NativeModel, threads: int, batch: int = 1) -> None:
        config, self._model, self._threads, self._batch = model.config, model, threads, batch
        # At least two rows for each text: the context vector's slot and one character.
        self._rows = max(_CHUNK_ROWS, 2 * batch)
        heads, D, S = (config.n_layer, batch, config.n_head), model.head_size, config.context_len + 1
        # The KV cache of a large batch exceeds the processor's caches: half the bytes are read faster.
        in_bfloat16 = batch >= _BFLOAT16_BATCH and model.dtype != "float32"
        cache_type = np.uint16 if in_bfloat16 else np.float32
        self._keys = aligned((*heads, D, padded(S)), cache_type)  # (L, B, H, D * SP), in panels of slots within a head
        self._values = aligned((*heads, S, padded(D)), cache_type)  # (L, B, H, S, DP)
        self._contexts: Floats = aligned((batch, padded(config.n_embd)), np.float32)
        self._sums: Floats = aligned((batch, padded(config.n_embd)), np.float32)
        # Activations and each thread's scratch buffers, allocated once: no call allocates memory in C.
        self._workspace = aligned((model.library.workspace_bytes(model.address, self._rows, threads),), np.uint8)
        self._tuner = ThreadTuner(threads)
        arrays = {"keys": self._keys, "values": self._values, "sums": self._sums, "contexts": self._contexts}
        cache = CacheType.CACHE_BFLOAT16 if in_bfloat16 else CacheType.CACHE_FLOAT32
        self._struct = WindowsStruct(**{name: array.ctypes.data for name, array in arrays.items()}, texts=batch, cache=cache)

    def reset(self, contexts: Floats) -> None:
        """See `Window`."""
        self._struct.filled = 0
        self._contexts[:, : contexts.shape[1]] = contexts  # the padding behind them stays zero
        self._sums[...] = 0

    def fork(self, batch: int) -> NativeWindow:
        """See `Window`."""
        other = NativeWindow(self._model, self._threads, batch)
        # Assignment broadcasts the one text over the batch. The larger batch may store its cache in bfloat16.
        for target, source in ((other._keys, self._keys), (other._values, self._values)):
            target[...] = source if target.dtype == source.dtype else to_bfloat16(source)
        other._contexts[...], other._sums[...] = self._contexts, self._sums
        other._struct.filled = self._struct.filled
        return other

    def __len__(self) -> int:
        """See `Window`."""
        return max(0, int(self._struct.filled) - 1)  # the context vector takes the first slot

    @property
    def free(self) -> int:
        """See `Window`."""
        return self._model.config.context_len - len(self)

    def context(self) -> Floats:
        """See `Window`."""
        mean: Floats = self._sums[:, : self._model.config.n_embd] / np.float32(self._struct.filled)
        return mean

    def prefill(self, ids: Ids, *, all_logits: bool = False) -> Floats:
        """See `Window`."""
        assert 1 <= ids.shape[1] <= self.free, (ids.shape, self.free)
        size = self._rows // self._batch - 1  # one row of each text is for the context vector's slot
        chunks = [self._prefill(ids[:, i : i + size], all_logits=all_logits) for i in range(0, ids.shape[1], size)]
        logits: Floats = np.concatenate(chunks, axis=1) if all_logits else chunks[-1]
        return logits

    def _prefill(self, ids: Ids, *, all_logits: bool) -> Floats:
        V = self._model.config.vocab_size
        # C gets only the addresses of the arrays, so these names must stay referenced until the call returns.
        ids = _checked(ids, V)  # (B, k)
        logits: Floats = aligned((*ids.shape, padded(V)) if all_logits else (len(ids), padded(V)), np.float32)
        request = PrefillStruct(
            **self._request_fields(ids, self._tuner.threads), logits=logits.ctypes.data, length=ids.shape[1], every=all_logits
        )
        self._model.library.prefill(ctypes.addressof(request))
        # The first prefill of a window fills the context vector's slot too.
        self._struct.filled += ids.shape[1] + (self._struct.filled == 0)
        return logits[..., :V]

    def decode(self, ids: Ids, uniforms: npt.NDArray[np.float64], sampling: Sampling) -> npt.NDArray[np.int32]:
        """Read `ids` (B,), draw the next ids, read those, and so on, once for each row of `uniforms`.

        Args:
            ids: ids drawn last and not read yet.
            uniforms: (n, B) random numbers in [0, 1); n from 1 to `free`.
            sampling: the sampling parameters.

        Returns:
            The ids drawn (n, B); the last row has not been read.
        """
        assert 1 <= len(uniforms) <= self.free, (len(uniforms), self.free)
        assert len(sampling.allowed) == self._model.config.vocab_size, len(sampling.allowed)  # C reads all of it
        if self._struct.filled == 0:
            self._prefill(np.empty((self._batch, 0), np.int32), all_logits=False)  # only the context vector's slot
        ids, drawn = _checked(ids, self._model.config.vocab_size), np.empty(uniforms.shape, np.int32)
        parameters, done = sampling.struct(), 0
        # Each block is one call of C; the tuner chooses its length and the number of threads.
        while done < len(uniforms):
            with self._tuner.block(len(uniforms) - done) as (threads, count):
                request = DecodeStruct(
                    **self._request_fields(ids if done == 0 else drawn[done - 1], threads),
                    sampling=ctypes.addressof(parameters),
                    uniforms=uniforms[done:].ctypes.data,
                    drawn=drawn[done:].ctypes.data,
                    count=count,
                )
                self._model.library.decode(ctypes.addressof(request))
            self._struct.filled += count
            done += count
        return drawn

    def _request_fields(self, ids: Ids, threads: int) -> dict[str, int]:
        """Return the fields that prefill and decode requests share."""
        return {
            "model": self._model.address,
            "windows": ctypes.addressof(self._struct),
            "ids": ids.ctypes.data,
            "workspace": self._workspace.ctypes.data,
            "threads": threads,
        }


def _checked(ids: Ids, vocab_size: int) -> npt.NDArray[np.int32]:
    """Return `ids` as C reads them: it looks embeddings and logits up without a check."""
    assert not ids.size or 0 <= int(ids.min()) <= int(ids.max()) < vocab_size, "an id is not in the vocabulary"
    return np.ascontiguousarray(ids, np.int32)


def score_windows(model: NativeModel, threads: int, ids: Ids, contexts: Floats) -> tuple[Floats, Floats]:
    """Return the losses of W independent windows; see `picogpt.inference.Engine.score`."""
    C, (windows, length) = model.config.n_embd, (ids.shape[0], ids.shape[1] - 1)
    assert 1 <= length <= model.config.context_len, ids.shape
    ids = _checked(ids, model.config.vocab_size)
    losses = np.empty((windows, length), np.float32)
    starts, means = aligned((2, windows, padded(C)), np.float32)
    starts[:, :C] = contexts
    # A thread takes whole windows, and each has its own part of the workspace.
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
