"""The model file, `model.safetensors`: weights, the model's shape, and the properties of its training text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.config import GPTConfig, TextConfig, alphabet_of
from picogpt.errors import ConfigError, RunError
from picogpt.runs.tensor_file import FORMAT_VERSION, StoredTensors, open_tensors

__all__ = ["StoredModel", "load_model", "load_text_config", "model_metadata", "open_model"]


def model_metadata(config: GPTConfig, text: TextConfig | None = None) -> dict[str, str]:
    """Return the metadata of `model.safetensors`: the model's shape, and the properties of its training text if known."""
    metadata = {"format": str(FORMAT_VERSION), "config": json.dumps(asdict(config))}
    if text is None:
        return metadata
    content: dict[str, Any] = {"fold": text.fold, "ids": text.ids}
    if text.alphabet != PICOGPT:
        content["alphabet"] = text.alphabet.to_json()
    return {**metadata, "text": json.dumps(content)}


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """Content of a model file."""

    config: GPTConfig
    """The model's shape."""
    text: TextConfig | None
    """Properties of the training text; None in files that are older than these."""
    weights: Mapping[str, npt.NDArray[Any]]
    """State dict with nanoGPT's names; weights stored in bfloat16 are read as float32."""

    @property
    def alphabet(self) -> Alphabet:
        """Characters of the model."""
        return alphabet_of(self.text)


@contextlib.contextmanager
def open_model(path: Path) -> Iterator[StoredModel]:
    """Open a `.safetensors` model file; yield its content, in which each weight is read on access.

    Raises:
        RunError: the file is missing, damaged or not a picogpt model, or its alphabet is that of another model.
    """
    with open_tensors(path) as tensors:
        try:
            config = GPTConfig(**json.loads(tensors.metadata["config"]))
        except (KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
            # A safetensors file of another project: readable, but without our config.
            raise RunError(
                f"{path}: no picogpt model (its metadata has no valid config); train one with picogpt-train"
            ) from error
        model = StoredModel(config=config, text=_text_config_of(tensors), weights=tensors)
        # With another vocabulary, ids would be read and written as the wrong characters.
        if config.vocab_size != model.alphabet.vocab_size:
            raise RunError(
                f"{path}: the weights are of another model: a vocabulary of {config.vocab_size:,}, expected "
                f"{model.alphabet.vocab_size:,} for the alphabet {model.alphabet.describe()}"
            )
        yield model


def load_model(path: Path) -> StoredModel:
    """Read a model file with all of its weights.

    Raises:
        RunError: see `open_model`.
    """
    with open_model(path) as model:
        return replace(model, weights=dict(model.weights))


def load_text_config(path: Path) -> TextConfig | None:
    """Return the properties of the training text from a model file, without a look at its shape; None if it has none.

    Raises:
        RunError: the file is missing or damaged.
    """
    with open_tensors(path) as tensors:
        return _text_config_of(tensors)


def _text_config_of(tensors: StoredTensors) -> TextConfig | None:
    if "text" not in tensors.metadata:
        return None
    try:
        content = json.loads(tensors.metadata["text"])
        return TextConfig(
            fold=content["fold"],
            alphabet=Alphabet.from_json(content.get("alphabet")),
            ids=tuple(int(i) for i in content["ids"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
        raise RunError(f"{tensors.path}: damaged (the text in its metadata is not valid)") from error
