"""The plain way to generate: the torch model, with the windows of the whole text cut anew for every character.

This is what the original project does, and what the model was trained to give at every position. Nothing is kept from
one character to the next, so the time of each one grows with the text.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from picogpt.model import GPT
from picogpt.run import load_model

__all__ = ["ReferenceModel"]


class ReferenceModel:
    """The torch model as a function from the ids so far to the logits of the next one."""

    def __init__(self, model: GPT) -> None:
        self.model = model.eval()

    @classmethod
    def load(cls, path: Path) -> ReferenceModel:
        """Read the model of a run's folder or a `.safetensors` file.

        Raises:
            RunError: there is none, or it is damaged.
        """
        config, weights = load_model(path)
        model = GPT(config)
        model.load_arrays(weights)
        return cls(model)

    @torch.no_grad()
    def __call__(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits (V,) of the character after `ids`, a list of at least one."""
        logits, _ = self.model(torch.tensor([ids]))
        last: npt.NDArray[np.float32] = logits[0, -1].float().numpy()
        return last
