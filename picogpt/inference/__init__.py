"""The inference engine: prefill, decode and scoring with a KV cache, in C or numpy, without torch."""

from picogpt.inference.engine import Engine, EngineBackend, load_engine_backend
from picogpt.inference.native_window import NativeWindow, Sampling
from picogpt.inference.window import Ids, Window

__all__ = ["Engine", "EngineBackend", "Ids", "NativeWindow", "Sampling", "Window", "load_engine_backend"]
