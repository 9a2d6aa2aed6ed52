"""The model that a new run starts from: another run's weights, or those of a log of the original project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.config import GPTConfig
from picogpt.runs.find import find_model
from picogpt.runs.import_original import read_original
from picogpt.runs.loss_log import LossLog
from picogpt.runs.model_file import load_model
from picogpt.training.request import TrainRequest

__all__ = ["InitFrom"]


@dataclass(frozen=True)
class InitFrom:
    """The model whose weights a new run starts from."""

    path: Path
    config: GPTConfig
    weights: Mapping[str, npt.NDArray[np.generic]]
    log: LossLog | None
    """The loss log of an imported run of the original project; None for a model of ours."""
    alphabet: Alphabet = PICOGPT
    """Characters of the model."""

    @classmethod
    def find(cls, request: TrainRequest) -> InitFrom | None:
        """Read the requested model or log, or return None.

        Raises:
            RunError: the model or log is missing, damaged or of another kind.
        """
        if request.init_from is not None:
            path, _ = find_model(request.init_from, request.logs_dir)  # by name, like --model of the other commands
            model = load_model(path)
            return cls(path.absolute(), model.config, model.weights, None, model.alphabet)
        if request.import_original is not None:
            # Heads share one matrix, so their number cannot be read from the weights.
            original = read_original(request.import_original, request.model.get("n_head", GPTConfig().n_head))
            return cls(request.import_original.absolute(), original.config, original.weights, original.log)
        return None
