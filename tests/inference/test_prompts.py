"""Text in, text out: prompts, samples and conversations of `TextGenerator`."""

from __future__ import annotations

import torch

from picogpt.config import GenerateConfig, SampleConfig
from picogpt.inference import Engine
from picogpt.inference.prompts import TextGenerator
from picogpt.model.gpt import GPT
from tests.conftest import TINY


def make_generator(*, chat: bool = False, num_samples: int = 1, notices: list[str] | None = None) -> TextGenerator:
    """A generator of eight characters by a model with random weights."""
    torch.manual_seed(0)
    make = GenerateConfig(max_new_tokens=8, num_samples=num_samples)
    heard: list[str] = [] if notices is None else notices
    return TextGenerator(
        Engine(TINY, GPT(TINY).arrays()), None, SampleConfig(temperature=1.0, seed=1), make, chat=chat, notify=heard.append
    )


def test_stream_and_samples_agree() -> None:
    """The first of several samples is the text that is streamed for the same seed, and no stop sequence ended it."""
    text = "".join(make_generator().stream("one"))
    samples = make_generator(num_samples=3).samples("one")

    assert len(text) == 8
    assert samples[0] == (text, False)
    assert len({sample for sample, _ in samples}) == 3


def test_each_prompt_has_its_own_random_numbers() -> None:
    """The same prompt again gets another text."""
    generator = make_generator()

    assert "".join(generator.stream("one")) != "".join(generator.stream("one"))


def test_stop_ends_a_text() -> None:
    """A text ends after the piece in which `stop` became true."""
    assert len("".join(make_generator().stream("one", lambda: True))) == 1


def test_a_chat_is_remembered() -> None:
    """The second question is read after the first and its answer; notices come at the call, before the first piece."""
    notices: list[str] = []
    generator = make_generator(chat=True, notices=notices)
    assert notices == ["warning: --chat: this model is not known to be trained on questions and answers, so it may not answer"]
    answer = "".join(generator.stream("x" * 30))
    del notices[0]
    generator.stream("x" * 50)

    # <Q>, </Q>, a newline and <A> around each question; </A> and a newline after the answer.
    n_read = 30 + 4 + len(answer) + 2 + 50 + 4
    assert notices == [f"the prompt has {n_read} characters; the model reads the last 80"]


def test_normalize() -> None:
    """The prompt as the model sees it: lower case, accents dropped, unknown characters marked."""
    assert make_generator().normalize("Caf\u00e9 \u65e5") == "cafe <?>"
