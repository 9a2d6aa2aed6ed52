"""Generation from prompts: text in, text out. Encodes prompts, samples texts, and keeps the conversation of a chat.

This module prints nothing and reads no files; `picogpt.inference.generate` below it knows ids only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from picogpt.config import GenerateConfig, SampleConfig, TextConfig, alphabet_of
from picogpt.inference import Engine
from picogpt.inference.generate import MAX_PROMPT_WINDOWS, continue_prompt
from picogpt.inference.predictions import Predictor
from picogpt.inference.sampling import Sampler, suppressed_ids
from picogpt.rng import sample_generator
from picogpt.tokenizer import CharTokenizer, Tally, TextEncoder, encode_stop
from picogpt.wording import Notify, say_nothing

__all__ = ["Character", "TextGenerator"]

_TOP = 10
"""Number of likeliest characters that are given with a character."""


@dataclass(frozen=True)
class Character:
    """A generated character, or special token, and what the model expected in its place.

    Probabilities are the model's own, at temperature 1 and before any filter of sampling.
    """

    text: str
    probability: float
    top: Sequence[tuple[str, float]]
    """The ten likeliest characters with their probabilities, the likeliest first; ids without a character are <?>."""


class TextGenerator:
    """Generates texts for prompts with one model; with `chat` it keeps the conversation from prompt to prompt.

    Args:
        engine: the inference engine with the model's weights.
        text: properties of the model's training text; None if its file has none.
        sampling: settings for sampling, with a seed.
        generation: settings for the length and the end of a text.
        chat: whether prompts are questions, <Q>...</Q>, and texts answers, <A>...</A>.
        notify: receives a line about a prompt that is not read as it is.

    Raises:
        ConfigError: the hop is longer than a window, or the model cannot generate a stop sequence.
    """

    def __init__(
        self,
        engine: Engine,
        text: TextConfig | None,
        sampling: SampleConfig,
        generation: GenerateConfig,
        *,
        chat: bool = False,
        notify: Notify = say_nothing,
    ) -> None:
        self._engine, self._sampling, self._generation, self._chat, self._notify = engine, sampling, generation, chat, notify
        self._hop = generation.hop_for(engine.config.context_len)
        alphabet = alphabet_of(text)
        self._tokenizer, self._special_ids = CharTokenizer(alphabet), alphabet.special_ids
        self._encoder = TextEncoder.for_model(text)
        self._suppressed = suppressed_ids(text, chat=chat)
        self._conversation: list[int] = []  # ids of all questions and answers so far
        self._turns = 0  # prompts so far
        # Stop sequences are matched as ids: they are lower-cased and folded like the text.
        self._stops = [encode_stop(self._encoder, stop) for stop in generation.stop]
        if chat:
            # An answer ends where the model closes its tag.
            self._stops.append([self._special_ids["</A>"]])
            if text is None or self._special_ids["<A>"] not in text.ids:
                notify("warning: --chat: this model is not known to be trained on questions and answers, so it may not answer")

    def normalize(self, prompt: str) -> str:
        """Return the prompt as the model sees it: in its alphabet, with unknown characters as <?>."""
        return self._tokenizer.decode(self._encoder.encode(prompt))

    def stream(self, prompt: str, stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Continue `prompt` by one text, until its end or until `stop` returns true; yield the text in pieces."""
        # Encoded now and not at the first piece, so that notices come before a caller prints the prompt.
        return map(self._tokenizer.decode, self._stream(self._prompt_ids(prompt), stop))

    def stream_characters(self, prompt: str, stop: Callable[[], bool] = lambda: False) -> Iterator[list[Character]]:
        """Like `stream`, and yield each character with its probability."""
        ids = self._prompt_ids(prompt)
        predictor = self._predictor(ids, 1)
        return (self._characters(predictor, 0, new) for new in self._stream(ids, stop))

    def _stream(self, prompt: Sequence[int], stop: Callable[[], bool]) -> Iterator[list[int]]:
        answer: list[int] = []
        for (ids,), _ in self._continue(prompt, 1):
            answer += ids
            yield ids
            if stop():
                break
        if self._chat:
            # The tag that ended the answer was a stop sequence and so is not part of it, but the next question follows it.
            self._conversation += [*answer, self._special_ids["</A>"], *self._newline()]

    def samples(self, prompt: str) -> list[tuple[str, bool]]:
        """Continue `prompt` by `num_samples` texts; return each with whether a stop sequence ended it."""
        return [(self._tokenizer.decode(ids), ended) for ids, ended in self._samples(self._prompt_ids(prompt))]

    def sample_characters(self, prompt: str) -> list[tuple[list[Character], bool]]:
        """Like `samples`, and return each character with its probability."""
        ids = self._prompt_ids(prompt)
        predictor = self._predictor(ids, self._generation.num_samples)
        return [(self._characters(predictor, i, new), ended) for i, (new, ended) in enumerate(self._samples(ids))]

    def _samples(self, prompt: Sequence[int]) -> list[tuple[list[int], bool]]:
        steps = list(self._continue(prompt, self._generation.num_samples))
        _, stopped = steps[-1]  # the state after the last step
        # Each step has a few ids for every sample: concatenate them by sample.
        texts = [[token for parts, _ in steps for token in parts[i]] for i in range(self._generation.num_samples)]
        return list(zip(texts, stopped, strict=True))

    @cached_property
    def _names(self) -> list[str]:
        """The character of each id."""
        return [self._tokenizer.decode([i]) for i in range(self._engine.config.vocab_size)]

    def _predictor(self, prompt: Sequence[int], texts: int) -> Predictor:
        return Predictor(self._engine, np.array(prompt), self._hop, texts)

    def _characters(self, predictor: Predictor, text: int, ids: Sequence[int]) -> list[Character]:
        """Return the next characters of a text with their probabilities."""
        probabilities = predictor.read(text, ids)  # (n, V)
        order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :_TOP]  # (n, 10)
        names = self._names
        return [
            Character(names[token], float(row[token]), [(names[i], float(row[i])) for i in likeliest])
            for token, row, likeliest in zip(ids, probabilities, order.tolist(), strict=True)
        ]

    def _continue(self, prompt: Sequence[int], count: int) -> Iterator[tuple[list[list[int]], list[bool]]]:
        """Generate `count` texts after `prompt`; yield the new ids of each as they become final, and which have stopped."""
        assert self._sampling.seed is not None
        # Each prompt has its own random numbers, or the same prompt would get the same answer again.
        first = self._turns * self._generation.num_samples
        self._turns += 1
        sampler = Sampler(
            self._sampling,
            [sample_generator(self._sampling.seed, first + i) for i in range(count)],
            self._suppressed,
            vocab_size=self._engine.config.vocab_size,
        )
        ids = np.array(prompt)  # (k,)
        return continue_prompt(
            self._engine, ids, self._generation.max_new_tokens, hop=self._hop, sampler=sampler, stops=self._stops
        )

    def _prompt_ids(self, prompt: str) -> Sequence[int]:
        """Return the ids to read before generation: the end of the prompt, or of the conversation with the new question."""
        self._encoder.tally = Tally()  # count this prompt's losses only
        ids: list[int] = self._encoder.encode(prompt).tolist()
        if losses := self._encoder.tally.losses():
            self._notify(f"prompt: {'; '.join(losses)}")
        if self._chat:
            special = self._special_ids
            self._conversation += [special["<Q>"], *ids, special["</Q>"], *self._newline(), special["<A>"]]
            ids = self._conversation
        longest = MAX_PROMPT_WINDOWS * self._engine.config.context_len
        if len(ids) > longest:
            self._notify(f"the prompt has {len(ids):,} characters; the model reads the last {longest:,}")
        return ids[-longest:] or self._newline()  # without a prompt, start where a line starts

    def _newline(self) -> list[int]:
        ids: list[int] = self._tokenizer.encode("\n").tolist()
        return ids
