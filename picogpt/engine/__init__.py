"""The inference engine: prefill, decode and scoring with a KV cache, in C or numpy, without torch."""

from picogpt.engine.engine import Backend, Engine, find_backend
from picogpt.engine.native_window import NativeWindow, Sampling
from picogpt.engine.window import Ids, Window

__all__ = ["Backend", "Engine", "Ids", "NativeWindow", "Sampling", "Window", "find_backend"]
