"""Reference generation: the torch model, run over the whole text again for every character.

This is how the original project generates, and the function that the model was trained on at every position. There is no
KV cache, so the time for a character grows with the length of the text. Tests and benchmarks compare the engine with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from picogpt.model.gpt import GPT
from picogpt.runs.model_file import load_model

__all__ = ["ReferenceModel"]


class ReferenceModel:
    """The torch model without a KV cache; `picogpt.inference.decoder.StepwiseDecoder` makes a decoder of it."""

    def __init__(self, model: GPT) -> None:
        self.model = model.eval()  # no dropout
        self._ids: torch.Tensor | None = None

    @classmethod
    def load(cls, path: Path) -> ReferenceModel:
        """Load the model from a `.safetensors` file.

        Raises:
            RunError: the model is missing or damaged.
        """
        stored = load_model(path)
        model = GPT(stored.config)
        model.load_arrays(stored.weights)
        return cls(model)

    @torch.no_grad()
    def prefill(self, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """Append ids (B, k) to the text; return the logits (B, V) of the next character."""
        new = torch.from_numpy(ids.astype(np.int64))
        self._ids = new if self._ids is None else torch.cat((self._ids, new), dim=1)
        # The model cuts the text into windows itself: the first takes the remainder, all others are full.
        logits, _ = self.model(self._ids)  # (B, 1, V): without targets, the last position alone
        last: npt.NDArray[np.float32] = logits[:, -1].numpy()
        return last
