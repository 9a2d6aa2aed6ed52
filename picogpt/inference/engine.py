"""The inference engine: a model's weights, packed for the functions in C where there is a compiler, and for numpy elsewhere."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.config import EngineDType, GPTConfig
from picogpt.errors import BuildError, ConfigError
from picogpt.inference.native import NativeModel
from picogpt.inference.native_window import NativeWindow, score_windows
from picogpt.inference.tensors import Floats, Tensors
from picogpt.inference.weights import Weights
from picogpt.inference.window import Ids, NumpyWindow, Window
from picogpt.kernels.build import load_library
from picogpt.kernels.processor import vector_instructions
from picogpt.runs.folder import open_model
from picogpt.threads import choose_threads
from picogpt.wording import Notify, say_nothing

__all__ = ["Backend", "Engine", "find_backend"]

SOURCE = Path(__file__).parents[1] / "kernels" / "csrc" / "decode.c"
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-pthread")
"""Sums keep their order, so that a result does not depend on how rows are dealt out to threads."""
_INSTRUCTIONS = {"AVX512": ("-march=native", "-mprefer-vector-width=512"), "AVX2": ("-mavx2", "-mfma")}


@dataclass(frozen=True)
class Backend:
    """What computes: the functions of `decode.c`, or numpy where there is no library."""

    library: ctypes.CDLL | None
    reason: str
    """What compiled the library, or why there is none."""


NUMPY = Backend(None, "as the caller asked")


def find_backend(notify: Notify = say_nothing) -> Backend:
    """The functions in C, compiled now or at an earlier start, or numpy and why.

    Args:
        notify: is given a line before something is compiled.
    """
    flags = [*_FLAGS, *_INSTRUCTIONS.get(vector_instructions(), ())]
    try:
        built = load_library(SOURCE, {}, flags=flags, link_flags=("-lm", "-pthread"), notify=notify)
    except BuildError as error:
        return Backend(None, str(error))
    return Backend(built.functions, f"compiled by {built.compiler}")


class Engine:
    """A model, ready to generate and to score text.

    Args:
        config: the model's shape.
        arrays: its state dict as arrays, nanoGPT's names; `lm_head.weight` may be missing, as it is the embedding.
        backend: what computes it.
        threads: how many threads do, at most.
        dtype: the type of the matrices; `auto` is bfloat16 in C. numpy knows float32 alone.

    Raises:
        RunError: a weight is missing, of another shape, not finite or beyond all bounds, or the vocabulary is another.
        ConfigError: numpy cannot compute in `dtype`.
    """

    def __init__(
        self,
        config: GPTConfig,
        arrays: Mapping[str, npt.NDArray[Any]],
        *,
        backend: Backend = NUMPY,
        threads: int = 1,
        dtype: EngineDType = "auto",
    ) -> None:
        tensors = Tensors(config, arrays)
        self.config, self.threads, self.backend = config, threads, backend
        self._native: NativeModel | None = None
        if backend.library is not None:
            self.dtype = "bfloat16" if dtype == "auto" else dtype
            self._native = NativeModel(backend.library, tensors, self.dtype)
        elif dtype in {"auto", "float32"}:
            self.dtype = "float32"
            self._weights = Weights(tensors)
        else:
            raise ConfigError(f"dtype {dtype} needs the functions in C, and there are none: {backend.reason}", "dtype")

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        threads: int | None = None,
        dtype: EngineDType = "auto",
        backend: Backend | None = None,
        notify: Notify = say_nothing,
    ) -> Engine:
        """Read the model of a `.safetensors` file.

        Args:
            path: the file.
            threads: see `picogpt.threads.choose_threads`.
            dtype: see `Engine`.
            backend: what computes it; None takes C where it can be had, and tells `notify` if it cannot.
            notify: takes a line that a user should see.

        Raises:
            RunError: there is no model, or it is damaged.
            ConfigError: see `Engine`.
        """
        if backend is None:
            backend = find_backend(notify)
            if backend.library is None:
                notify(f"numpy computes the model, several times more slowly than C: {backend.reason}")
        count = choose_threads(threads).count
        with open_model(path) as (config, arrays):
            engine = cls(config, arrays, backend=backend, threads=count, dtype=dtype)
        if backend.library is None:
            limit_numpy_threads(count)
        return engine

    def window(self, batch: int = 1) -> Window:
        """An empty window of `batch` texts, whose context vectors are zero."""
        if self._native is not None:
            return NativeWindow(self._native, self.threads, batch)
        return NumpyWindow(self._weights, batch)

    def score(self, ids: Ids, contexts: Floats) -> tuple[Floats, Floats]:
        """The losses of W windows, each by itself; every thread takes whole windows.

        Args:
            ids: (W, n + 1), n from 1 to the window's length: what is read, and behind it the last target.
            contexts: the context vectors (W, C) that they begin with.

        Returns:
            The losses (W, n) in nats, and the context vectors (W, C) for windows that begin where these end.
        """
        if self._native is not None:
            return score_windows(self._native, self.threads, ids, contexts)
        window = NumpyWindow(self._weights, len(ids))
        window.reset(contexts)
        logits = window.prefill(ids[:, :-1], every=True)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(logits, ids[:, 1:, None].astype(np.intp), axis=-1)[..., 0]
        losses: Floats = np.log(np.exp(logits).sum(axis=-1)) - chosen
        return losses, window.context()


def limit_numpy_threads(count: int) -> None:
    """Have numpy's matrix products take at most `count` threads."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(count, user_api="blas")
