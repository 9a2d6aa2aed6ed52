"""The inference engine: a model's weights, packed for the native kernels where there is a C compiler, and for numpy elsewhere."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# torch is not imported here, so that generation starts in a fraction of a second.
from picogpt.config import EngineDType, GPTConfig
from picogpt.errors import BuildError, ConfigError
from picogpt.inference.native import MAX_WORKERS, NativeModel
from picogpt.inference.native_window import NativeWindow, score_windows
from picogpt.inference.tensors import Floats, WeightReader
from picogpt.inference.weights import Weights
from picogpt.inference.window import Ids, NumpyWindow, Window
from picogpt.kernels.build import load_library
from picogpt.kernels.processor import vector_instructions
from picogpt.runs.model_file import open_model
from picogpt.threads import choose_threads
from picogpt.wording import Notify, say_nothing

__all__ = ["Engine", "EngineBackend", "load_engine_backend"]

SOURCE = Path(__file__).parents[1] / "kernels" / "csrc" / "decode.c"
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-pthread")
"""Flags of the C compiler. Without `-ffast-math` sums keep their order, so results do not depend on the number of threads."""
# gcc prefers 256-bit vectors on many AVX-512 processors unless it is told otherwise.
_INSTRUCTIONS = {"AVX512": ("-march=native", "-mprefer-vector-width=512"), "AVX2": ("-mavx2", "-mfma")}


@dataclass(frozen=True)
class EngineBackend:
    """Native kernels (`decode.c`) or numpy."""

    library: ctypes.CDLL | None
    """The compiled `decode.c`; None selects numpy."""
    reason: str
    """Compiler of the library, or why there is none."""


NUMPY = EngineBackend(None, "as requested")
_NUMPY_DTYPES = ("auto", "float32")


def load_engine_backend(notify: Notify = say_nothing) -> EngineBackend:
    """Load the native kernels, compiling them if they are not cached; fall back to numpy with the reason.

    Args:
        notify: called with a line before anything is compiled.
    """
    # A processor with neither instruction set gets none of these flags, and so the compiler's default.
    flags = [*_FLAGS, *_INSTRUCTIONS.get(vector_instructions(), ())]
    try:
        built = load_library(SOURCE, {}, flags=flags, link_flags=("-lm", "-pthread"), notify=notify)
    except BuildError as error:
        # No compiler, or one that fails: numpy gives the same text, only more slowly, so this is no error.
        return EngineBackend(None, str(error))
    return EngineBackend(built.functions, f"compiled by {built.compiler}")


class Engine:
    """A model, ready to generate and score text.

    Args:
        config: the model's shape.
        arrays: its state dict as arrays, nanoGPT's names; `lm_head.weight` may be missing, as it is tied to the embedding.
        backend: native kernels or numpy.
        threads: maximum number of threads; the native kernels take at most `picogpt.inference.native.MAX_WORKERS`.
        dtype: type of the matrices; `auto` is bfloat16 in C. numpy supports float32 only.

    Raises:
        RunError: a weight is missing, has another shape, is not finite or has diverged.
        ConfigError: `dtype` needs the native kernels, and `backend` has none.
    """

    def __init__(
        self,
        config: GPTConfig,
        arrays: Mapping[str, npt.NDArray[Any]],
        *,
        backend: EngineBackend = NUMPY,
        threads: int = 1,
        dtype: EngineDType = "auto",
    ) -> None:
        tensors = WeightReader(config, arrays)
        self.config, self.threads, self.backend = config, threads, backend
        self._native: NativeModel | None = None
        # Either way the weights are packed once, here, and the arrays of the file can be freed.
        if backend.library is not None:
            self.dtype = "bfloat16" if dtype == "auto" else dtype
            self.threads = min(threads, MAX_WORKERS)
            self._native = NativeModel(backend.library, tensors, self.dtype, self.threads)
        elif dtype in _NUMPY_DTYPES:
            self.dtype = "float32"
            self._weights = Weights(tensors)
        else:
            raise ConfigError(f"dtype {dtype} needs the native kernels, which are not available: {backend.reason}", "dtype")

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        threads: int | None = None,
        dtype: EngineDType = "auto",
        backend: EngineBackend | None = None,
        notify: Notify = say_nothing,
    ) -> Engine:
        """Load the model from a `.safetensors` file.

        Args:
            path: the file.
            threads: see `picogpt.threads.choose_threads`.
            dtype: see `Engine`.
            backend: native kernels or numpy; None uses C if it is available, and calls `notify` if it is not.
            notify: called with a line that a user should see.

        Raises:
            RunError: the model is missing or damaged.
            ConfigError: see `Engine`.
        """
        if backend is None:
            backend = load_engine_backend(notify)
            if backend.library is None and dtype in _NUMPY_DTYPES:
                notify(f"numpy computes the model, several times more slowly than C: {backend.reason}")
        count = choose_threads(threads).count
        # The file stays open while the weights are packed, each read on demand: they need not all be in memory at once.
        with open_model(path) as model:
            engine = cls(model.config, model.weights, backend=backend, threads=count, dtype=dtype)
        if backend.library is None:
            limit_numpy_threads(count)
        return engine

    def window(self, batch: int = 1) -> Window:
        """Return an empty window of `batch` texts, whose context vectors are zero."""
        if self._native is not None:
            return NativeWindow(self._native, self.threads, batch)
        return NumpyWindow(self._weights, batch)

    def score(self, ids: Ids, contexts: Floats) -> tuple[Floats, Floats]:
        """Return the losses of W independent windows; each thread takes whole windows.

        Args:
            ids: (W, n + 1), n from 1 to the window's length: n inputs, and the last target.
            contexts: the context vectors (W, C) that the windows start from.

        Returns:
            The losses (W, n) in nats, and the context vectors (W, C) for the windows that follow.
        """
        if self._native is not None:
            return score_windows(self._native, self.threads, ids, contexts)
        window = NumpyWindow(self._weights, len(ids))
        window.reset(contexts)
        logits = window.prefill(ids[:, :-1], all_logits=True)  # (W, n, V)
        # Cross-entropy: log(sum exp(logits)) - logits[target], with the row maximum subtracted so that exp cannot overflow.
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(logits, ids[:, 1:, None].astype(np.intp), axis=-1)[..., 0]  # (W, n)
        losses: Floats = np.log(np.exp(logits).sum(axis=-1)) - chosen
        return losses, window.context()


def limit_numpy_threads(count: int) -> None:
    """Limit numpy's matrix products (BLAS) to `count` threads."""
    # Imported late: with the native kernels it is not needed.
    from threadpoolctl import threadpool_limits

    threadpool_limits(count, user_api="blas")
