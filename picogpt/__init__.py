"""picogpt: a 6.34M-parameter character GPT with a context roll, trained and run on a laptop's CPU.

    import picogpt

    model = picogpt.load("wikipedia")
    print(model.generate("the history of", seed=1))

docs/python.md shows more: logits, scores, loss logs, and your own training loop. Public names are imported on first use, so that
only training loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# For type checkers and editors only; at run time `__getattr__` imports them.
if TYPE_CHECKING:
    from picogpt.api import Model, Score, load, read_log
    from picogpt.config import GPTConfig, TrainConfig
    from picogpt.data import TextSource, read_texts
    from picogpt.errors import PicoGPTError
    from picogpt.schedule import learning_rate
    from picogpt.training.build import make_trainer
    from picogpt.training.trainer import Trainer

__version__ = "0.2.0"

__all__ = [
    "GPTConfig",
    "Model",
    "PicoGPTError",
    "Score",
    "TextSource",
    "TrainConfig",
    "Trainer",
    "__version__",
    "learning_rate",
    "load",
    "make_trainer",
    "read_log",
    "read_texts",
]

# Modules of the public names.
_HOMES = {
    "picogpt.api": ("Model", "Score", "load", "read_log"),
    "picogpt.config": ("GPTConfig", "TrainConfig"),
    "picogpt.data": ("TextSource", "read_texts"),
    "picogpt.errors": ("PicoGPTError",),
    "picogpt.schedule": ("learning_rate",),
    "picogpt.training.build": ("make_trainer",),  # imports torch
    "picogpt.training.trainer": ("Trainer",),  # imports torch
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    for module, names in _HOMES.items():
        if name in names:
            # Stored as a global, so the next access does not come here.
            value = globals()[name] = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module 'picogpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, also those not yet imported, for tab completion."""
    return sorted(__all__)
