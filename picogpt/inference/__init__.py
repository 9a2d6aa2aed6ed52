"""The inference engine: prefill, decode and scoring with a KV cache, in C or numpy, without torch."""

from picogpt.inference.engine import Backend, Engine, find_backend
from picogpt.inference.native_window import NativeWindow, Sampling
from picogpt.inference.window import Ids, Window

__all__ = ["Backend", "Engine", "Ids", "NativeWindow", "Sampling", "Window", "find_backend"]
