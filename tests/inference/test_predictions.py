"""Probabilities of generated characters: those of the model that sampled them, window by window."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from picogpt.config import GenerateConfig, SampleConfig
from picogpt.inference import Engine, EngineBackend
from picogpt.inference.engine import NUMPY
from picogpt.inference.predictions import Predictor
from picogpt.inference.prompts import TextGenerator
from picogpt.inference.sampling import Sampler, softmax
from picogpt.model.gpt import GPT
from tests.conftest import TINY, needs_any_compiler

PROMPT = "a prompt longer than a window"


@pytest.fixture(params=["numpy", pytest.param("c", marks=needs_any_compiler)])
def engine(request: pytest.FixtureRequest, compiled_backend: EngineBackend) -> Engine:
    """A tiny model that has learned nothing, computed in both ways."""
    torch.manual_seed(3)
    backend = compiled_backend if request.param == "c" else NUMPY
    return Engine(TINY, GPT(TINY).arrays(), backend=backend, dtype="float32")


def make_generator(engine: Engine, **settings: Any) -> TextGenerator:
    """A generator of forty characters, which are five windows."""
    draw = SampleConfig(seed=1, temperature=1.5, top_k=20)
    return TextGenerator(engine, None, draw, GenerateConfig(max_new_tokens=40, **settings))


@pytest.mark.parametrize("hop", [1, 3, 8])
def test_probabilities_are_those_that_were_sampled_from(hop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each place they are the softmax of the logits that the sampler was given, at temperature 1 and without top-k."""
    torch.manual_seed(3)
    engine = Engine(TINY, GPT(TINY).arrays())
    given: list[npt.NDArray[np.float64]] = []
    drawn: list[int] = []
    draw = Sampler.draw

    def spy(self: Sampler, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
        given.append(softmax(logits[0].astype(np.float64)))
        ids = draw(self, logits)
        drawn.append(int(ids[0]))
        return ids

    monkeypatch.setattr(Sampler, "draw", spy)
    characters = [c for piece in make_generator(engine, hop=hop).stream_characters(PROMPT) for c in piece]

    assert len(characters) == len(given) == 40
    for character, probabilities, index in zip(characters, given, drawn, strict=True):
        assert [value for _, value in character.top] == pytest.approx(sorted(probabilities, reverse=True)[:10], rel=1e-4)
        assert character.probability == pytest.approx(probabilities[index], abs=1e-6)


def test_the_text_is_the_same(engine: Engine) -> None:
    """With and without probabilities a seed gives the same texts, also where stop sequences hold back some characters."""
    for settings in ({"num_samples": 1}, {"num_samples": 3}, {"num_samples": 3, "stop": ("e", "ab")}):
        plain = make_generator(engine, **settings).samples(PROMPT)
        found = make_generator(engine, **settings).sample_characters(PROMPT)

        assert [("".join(c.text for c in characters), ended) for characters, ended in found] == plain
    characters = [c for piece in make_generator(engine).stream_characters(PROMPT) for c in piece]
    assert "".join(c.text for c in characters) == "".join(make_generator(engine).stream(PROMPT))


def test_samples_are_read_apart(engine: Engine) -> None:
    """Each of several texts has the probabilities that it has alone, in whatever pieces it is read."""
    prompt = np.arange(1, 12, dtype=np.uint8)
    together, alone = Predictor(engine, prompt, 5, 2), Predictor(engine, prompt, 5, 1)
    texts = [list(range(20, 45)), list(range(45, 20, -1))]
    found = [together.read(0, texts[0][:4]), together.read(1, texts[1]), together.read(0, []), together.read(0, texts[0][4:])]
    expected = alone.read(0, texts[0])

    np.testing.assert_allclose(np.concatenate((found[0], found[2], found[3])), expected, atol=1e-6)
    np.testing.assert_allclose(found[1], Predictor(engine, prompt, 5, 1).read(0, texts[1]), atol=1e-6)
    np.testing.assert_allclose(expected.sum(axis=1), 1)


def test_probabilities_of_a_whole_text(engine: Engine) -> None:
    """Within the first window they are the softmax of the engine's logits after the characters before each."""
    window = engine.window()
    logits = window.prefill(np.arange(1, 8)[None], all_logits=True)[0]

    np.testing.assert_allclose(
        Predictor(engine, np.array([1, 2], np.uint8), 8, 1).read(0, [3, 4, 5, 6, 7]),
        softmax(logits[1:6].astype(float)),
        atol=1e-6,
    )
