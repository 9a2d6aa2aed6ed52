"""The Python interface of a trained model: generate, logits and scores. No torch.

`picogpt.load("wikipedia").generate("the history of")` is the shortest use; docs/python.md has more.
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

from picogpt.config import LOGS_DIR, EngineDType, GenerateConfig, GPTConfig, SampleConfig, TextConfig
from picogpt.errors import DataError
from picogpt.inference import Engine
from picogpt.inference.generate import MAX_PROMPT_WINDOWS, Sampler, continue_prompt, suppressed_ids
from picogpt.model.roll import window_spans
from picogpt.rng import sample_generator
from picogpt.runs.find import find_log, find_model
from picogpt.runs.folder import LossLog, load_text_config
from picogpt.runs.folder import read_log as read_log_file
from picogpt.tokenizer import CharTokenizer, TextEncoder, encode_stop
from picogpt.wording import Notify, say_nothing

__all__ = ["Model", "Score", "load", "read_log"]


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text, with its context vectors as in training."""

    losses: npt.NDArray[np.float32]
    """(T - 1,): the loss of each character after the first, in nats: minus the logarithm of its probability."""

    @property
    def nats(self) -> float:
        """The mean loss in nats per character."""
        return float(self.losses.mean(dtype=np.float64))

    @property
    def bits(self) -> float:
        """The mean loss in bits per character."""
        return self.nats / math.log(2)


class Model:
    """A trained model, ready to use. `picogpt.load` makes one.

    Args:
        engine: computes the model.
        text: what its file says of the training text; None allows all characters.
        path: the file that it came from.
    """

    def __init__(self, engine: Engine, text: TextConfig | None, path: Path) -> None:
        self.path = path
        self._engine, self._text = engine, text
        self._tokenizer = CharTokenizer()
        # As in `picogpt-generate`, a model from before there was folding gets folded text: it knows the letters all the same.
        self._encoder = TextEncoder(fold=text is None or text.fold)

    @property
    def config(self) -> GPTConfig:
        """The model's shape."""
        return self._engine.config

    @property
    def dtype(self) -> str:
        """Type of the weights: float32, bfloat16 or int8."""
        return self._engine.dtype

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, {self.dtype})"

    def encode(self, text: str) -> npt.NDArray[np.uint8]:
        """Token ids (T,) of a text: lower-cased, and folded to the characters that the model knows."""
        return self._encoder.encode(text)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode([int(token) for token in ids])

    def generate(self, prompt: str = "", **settings: Any) -> str:
        """Continue `prompt`; return the new text. For the settings see `stream`."""
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
            prompt: the text to continue; of a long one the last ten windows are read, as many as in training.
            max_new_tokens: characters to generate; None for no end.
            temperature: divides the logits; 0 always takes the likeliest character.
            top_k: sample from the k likeliest characters; 0 from all.
            top_p: sample from the likeliest characters that together reach this probability.
            min_p: sample from characters with at least this share of the likeliest one's probability.
            stop: texts that end the generation, and are not part of it.
            seed: of the samples; the same seed gives the same text. None takes a new one.
            hop: characters from one window's start to the next one's; None rereads a sixteenth of a window.

        Yields:
            The new text in pieces.

        Raises:
            ConfigError: a setting is out of its range.
        """
        make = GenerateConfig(max_new_tokens=max_new_tokens, hop=hop, stop=tuple(stop))
        draw = SampleConfig(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=secrets.randbits(32) if seed is None else seed
        )
        assert draw.seed is not None
        hop = make.hop_for(self.config.context_len)
        stops = [encode_stop(self._encoder, text) for text in make.stop]
        sampler = Sampler(draw, [sample_generator(draw.seed)], suppressed_ids(self._text))
        parts = continue_prompt(self._engine, self._prompt_ids(prompt), max_new_tokens, hop=hop, sampler=sampler, stops=stops)
        return (self.decode(part) for (part,), _ in parts if part)

    def _prompt_ids(self, prompt: str) -> npt.NDArray[np.uint8]:
        """The ids to read before the first new character: those of the prompt's end, or a newline, where a text starts."""
        ids = self.encode(prompt)[-MAX_PROMPT_WINDOWS * self.config.context_len :]
        return ids if len(ids) else self._tokenizer.encode("\n")

    def logits(self, text: str) -> npt.NDArray[np.float32]:
        """Predict the character after each one of `text`, as the torch model does.

        The text is cut into windows of which the first takes the remainder, and the context vector rolls from window to window.

        Returns:
            (T, V): row t holds the logits of the character after the first t + 1 characters.

        Raises:
            DataError: the text is empty.
        """
        ids = self._read(text, at_least=1)
        window, rows = self._engine.window(), []
        for i, (start, end) in enumerate(window_spans(len(ids), self.config.context_len)):
            if i:
                window.reset(window.context())
            rows.append(window.prefill(ids[None, start:end], all_logits=True)[0])  # (n, V)
        return np.concatenate(rows)

    def score(self, text: str) -> Score:
        """Score each character of `text` but the first, which nothing predicts.

        Raises:
            DataError: the text has fewer than two characters.
        """
        ids = self._read(text, at_least=2)
        context = np.zeros((1, self.config.n_embd), np.float32)
        losses = []
        for start, end in window_spans(len(ids) - 1, self.config.context_len):
            # The window's inputs are start..end - 1, its targets one further.
            found, context = self._engine.score(ids[None, start : end + 1], context)
            losses.append(found[0])
        return Score(np.concatenate(losses))

    def _read(self, text: str, *, at_least: int) -> npt.NDArray[np.uint8]:
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
        name: a run's name, its folder or a `.safetensors` file; None takes the newest run of your own, or else a bundled model.
        logs_dir: folder of all runs.
        dtype: type of the weights: float32, bfloat16, int8, or auto, which is bfloat16 with native kernels.
        threads: threads to compute with; None takes one a core. Results do not depend on them.
        notify: given a line where something was chosen, such as numpy instead of native kernels.

    Raises:
        RunError: there is no such model, or it is damaged.
        ConfigError: the type needs native kernels, and there is no compiler for them.
    """
    path, chosen = find_model(None if name is None else str(name), Path(logs_dir))
    notify(chosen)
    return Model(Engine.load(path, threads=threads, dtype=dtype, notify=notify), load_text_config(path), path)


def read_log(name: str | Path, *, logs_dir: str | Path = LOGS_DIR) -> LossLog:
    """Read the loss log of a run, by its name, its folder or the path of its `log.pkl`.

    Raises:
        RunError: there is no such log, or it is damaged.
    """
    return read_log_file(find_log(str(name), Path(logs_dir)))
