"""The plain way to generate: the torch model, with the windows of the whole text cut anew for every character.

This is what the original project does, and what the model was trained to give at every position. Nothing is kept from
one character to the next, so the time of each one grows with the text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from picogpt.model.gpt import GPT
from picogpt.runs.folder import load_model

__all__ = ["ReferenceModel"]


class ReferenceModel:
    """The torch model; `picogpt.inference.generate.OneByOne` makes a reader of it."""

    def __init__(self, model: GPT) -> None:
        self.model = model.eval()
        self._ids: torch.Tensor | None = None

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
    def prefill(self, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """Read ids (B, k) behind those read before; return the logits (B, V) of the characters after them."""
        new = torch.from_numpy(ids.astype(np.int64))
        self._ids = new if self._ids is None else torch.cat((self._ids, new), dim=1)
        logits, _ = self.model(self._ids)
        last: npt.NDArray[np.float32] = logits[:, -1].numpy()
        return last
