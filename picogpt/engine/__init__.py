"""The model in numpy alone, cached, on one process or several: what generation runs on."""

from picogpt.engine.window import Engine, Window

__all__ = ["Engine", "Window"]
