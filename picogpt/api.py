"""The Python interface of a trained model: generate, logits and scores, without torch.

The shortest use is `picogpt.load("wikipedia").generate("the history of")`; docs/python.md has more.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.alphabet import Alphabet
from picogpt.checks import ENGINE_DTYPES, check_choice, check_threads
from picogpt.config import LOGS_DIR, EngineDType, GenerateConfig, GPTConfig, SampleConfig, TextConfig, alphabet_of
from picogpt.errors import DataError
from picogpt.ids import Ids
from picogpt.inference import Engine
from picogpt.inference.prompts import TextGenerator
from picogpt.model.roll import window_spans
from picogpt.runs.find import find_log, find_model
from picogpt.runs.loss_log import LossLog
from picogpt.runs.loss_log import read_log as read_log_file
from picogpt.runs.model_file import load_text_config
from picogpt.tokenizer import CharTokenizer, TextEncoder
from picogpt.wording import Notify, say_nothing

__all__ = ["Model", "Score", "load", "read_log"]


@dataclass(frozen=True)
class Score:
    """Loss of each character of a text, with context vectors as in training."""

    losses: npt.NDArray[np.float32]
    """(T - 1,): loss of each character after the first, in nats: minus the logarithm of its probability."""

    @property
    def nats(self) -> float:
        """Mean loss in nats per character."""
        # Added up in float64: a float32 sum over a long text would lose digits.
        return float(self.losses.mean(dtype=np.float64))

    @property
    def bits(self) -> float:
        """Mean loss in bits per character."""
        return self.nats / math.log(2)


class Model:
    """A trained model, created by `picogpt.load`.

    Args:
        engine: the inference engine with the model's weights.
        text: properties of the training text, from the model file; None allows all characters.
        path: the model file.
    """

    def __init__(self, engine: Engine, text: TextConfig | None, path: Path) -> None:
        self.path = path  # public: which model was chosen for None
        self._engine, self._text = engine, text
        self._tokenizer = CharTokenizer(self.alphabet)
        self._encoder = TextEncoder.for_model(text)

    @property
    def alphabet(self) -> Alphabet:
        """The characters that the model knows."""
        return alphabet_of(self._text)

    @property
    def config(self) -> GPTConfig:
        """Shape of the model."""
        return self._engine.config

    @property
    def dtype(self) -> str:
        """Type of the weights: float32, bfloat16 or int8."""
        return self._engine.dtype

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, {self.dtype})"

    def encode(self, text: str) -> Ids:
        """Return the token ids (T,) of a text, one for each of its characters, lower-cased and folded as in training."""
        return self._encoder.encode(text)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode([int(token) for token in ids])

    def generate(self, prompt: str = "", **settings: Any) -> str:
        """Continue `prompt`; return the new text. `stream` describes the settings."""
        return "".join(self.stream(prompt, **settings))

    def stream(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int | None = GenerateConfig.max_new_tokens,
        temperature: float = SampleConfig.temperature,
        top_k: int = SampleConfig.top_k,
        top_p: float = SampleConfig.top_p,
        min_p: float = SampleConfig.min_p,
        stop: Sequence[str] = (),
        seed: int | None = None,
        hop: int | None = None,
    ) -> Iterator[str]:
        """Continue `prompt`, a few characters at a time.

        Args:
            prompt: the text to continue; of a long one the last ten windows are read.
            max_new_tokens: characters to generate; None for no end.
            temperature: divides the logits; 0 always takes the likeliest character.
            top_k: sample from the k likeliest characters; 0 from all.
            top_p: sample from the likeliest characters that together reach this probability.
            min_p: sample from characters with at least this share of the likeliest one's probability.
            stop: stop sequences, which end the text and are not part of it.
            seed: seed of the samples; the same seed gives the same text. None takes a new one.
            hop: stride from one window's start to the next; None rereads a sixteenth of a window.

        Yields:
            The new text in pieces.

        Raises:
            ConfigError: a setting is out of its range.
        """
        # Not a generator function, so that an invalid setting raises here and not when the first piece is requested.
        generation = GenerateConfig(max_new_tokens=max_new_tokens, hop=hop, stop=tuple(stop))
        sampling = SampleConfig(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=secrets.randbits(32) if seed is None else seed
        )
        # The same class as in `picogpt-generate`, so that both give the same text for a seed.
        return filter(None, TextGenerator(self._engine, self._text, sampling, generation).stream(prompt))

    def logits(self, text: str) -> npt.NDArray[np.float32]:
        """Compute the logits after each character of `text`, as the torch model does.

        The text is cut into windows; the first one takes the remainder, and the context vector is passed from window to window.

        Returns:
            (T, V): row t holds the logits of the character after the first t + 1 characters.

        Raises:
            DataError: the text is empty.
        """
        # A new window for each call: the model itself has no state.
        ids = self._read(text, at_least=1)
        window, rows = self._engine.window(), []
        for i, (start, end) in enumerate(window_spans(len(ids), self.config.context_len)):
            # The first window starts from the zero vector, each other from the previous one's outputs.
            if i:
                window.reset(window.context())
            rows.append(window.prefill(ids[None, start:end], all_logits=True)[0])  # (n, V)
        return np.concatenate(rows)

    def score(self, text: str) -> Score:
        """Compute the loss of each character of `text` except the first, which has no prediction.

        Raises:
            DataError: the text has fewer than two characters.
        """
        ids = self._read(text, at_least=2)
        context = np.zeros((1, self.config.n_embd), np.float32)  # (B, C), zero as at the start of each training sequence
        # Targets are shifted by one, so the last character is only a target.
        losses = []
        for start, end in window_spans(len(ids) - 1, self.config.context_len):
            # Inputs are the characters start..end - 1, targets the same shifted by one.
            found, context = self._engine.score(ids[None, start : end + 1], context)
            losses.append(found[0])  # (n,)
        return Score(np.concatenate(losses))

    def _read(self, text: str, *, at_least: int) -> Ids:
        ids = self.encode(text)
        if len(ids) < at_least:
            raise DataError(f"the text has {len(ids)} characters, and at least {at_least} are needed")
        return ids


def load(
    name: str | Path | None = None,
    *,
    logs_dir: str | Path = LOGS_DIR,
    dtype: EngineDType = "auto",
    threads: int | None = None,
    notify: Notify = say_nothing,
) -> Model:
    """Load a trained model.

    Args:
        name: a run's name, its folder or a `.safetensors` file; None takes your most recent run, or else a bundled model.
        logs_dir: folder of all runs.
        dtype: type of the weights: float32, bfloat16, int8, or auto, which is bfloat16 with native kernels.
        threads: number of threads; None takes one per core. Results do not depend on it.
        notify: receives a line for each automatic choice, such as numpy instead of native kernels.

    Raises:
        RunError: there is no such model, or it is damaged.
        ConfigError: there is no such type or number of threads, or the type needs native kernels and there is no compiler.
    """
    check_choice("dtype", dtype, ENGINE_DTYPES)
    check_threads(threads)
    path, chosen = find_model(None if name is None else str(name), Path(logs_dir))
    notify(chosen)  # with name None, the caller should know which model it is
    return Model(Engine.load(path, threads=threads, dtype=dtype, notify=notify), load_text_config(path), path)


def read_log(name: str | Path, *, logs_dir: str | Path = LOGS_DIR) -> LossLog:
    """Read the loss log of a run, by its name, its folder or the path of its `log.pkl`.

    Raises:
        RunError: there is no such log, or it is damaged.
    """
    return read_log_file(find_log(str(name), Path(logs_dir)))
