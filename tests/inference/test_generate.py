"""Sampling on distributions worked out by hand, stop texts, and the reference."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.reference import ReferenceModel
from picogpt.config import SampleConfig, TextConfig
from picogpt.inference.decoder import StepwiseDecoder
from picogpt.inference.generate import StopSequenceFilter, generate
from picogpt.inference.sampling import (
    Sampler,
    build_filters,
    min_p_filter,
    suppressed_ids,
    temperature_filter,
    top_k_filter,
    top_p_filter,
)
from picogpt.model.gpt import GPT
from picogpt.rng import sample_generator
from picogpt.runs.folder import RunFolder
from tests.conftest import TINY

FOUR = np.log(np.array([[0.1, 0.2, 0.3, 0.4]]))


def probabilities(scores: npt.NDArray[np.float64]) -> list[float]:
    """The distribution that scores stand for."""
    weights = np.exp(scores[0])
    return [round(float(weight), 6) for weight in weights / weights.sum()]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (temperature_filter(FOUR, 1.0), [0.1, 0.2, 0.3, 0.4]),
        (temperature_filter(FOUR, 0.5), [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        (temperature_filter(FOUR, 0.0), [0, 0, 0, 1]),
        (temperature_filter(np.zeros((1, 4)), 0.0), [1, 0, 0, 0]),
        (temperature_filter(FOUR, 1e-310), [0, 0, 0, 1]),
        (top_k_filter(FOUR, 0), [0.1, 0.2, 0.3, 0.4]),
        (top_k_filter(FOUR, 2), [0, 0, 3 / 7, 4 / 7]),
        (top_k_filter(FOUR, 9), [0.1, 0.2, 0.3, 0.4]),
        (top_k_filter(np.zeros((1, 4)), 2), [0.5, 0.5, 0, 0]),
        (top_p_filter(FOUR, 1.0), [0.1, 0.2, 0.3, 0.4]),
        (top_p_filter(FOUR, 0.39), [0, 0, 0, 1]),
        (top_p_filter(FOUR, 0.5), [0, 0, 3 / 7, 4 / 7]),
        (top_p_filter(FOUR, 0.71), [0, 2 / 9, 3 / 9, 4 / 9]),
        (top_p_filter(FOUR, 1e-9), [0, 0, 0, 1]),
        (min_p_filter(FOUR, 0.0), [0.1, 0.2, 0.3, 0.4]),
        (min_p_filter(FOUR, 0.6), [0, 0, 3 / 7, 4 / 7]),
        (min_p_filter(FOUR, 1.0), [0, 0, 0, 1]),
    ],
)
def test_filters(scores: npt.NDArray[np.float64], expected: list[float]) -> None:
    """Each filter on (0.1, 0.2, 0.3, 0.4)."""
    assert probabilities(scores) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # The square roots of 0.2, 0.3 and 0.4 are 0.447, 0.548 and 0.632 of 1.627: the largest has 0.389, so a second is needed.
        (SampleConfig(temperature=2.0, top_k=3, top_p=0.39), [0, 0, 0.464102, 0.535898]),
        # Of the two that top-k leaves, the largest has 0.536 and is enough; of all four it has 0.325.
        (SampleConfig(temperature=2.0, top_k=2, top_p=0.5), [0, 0, 0, 1]),
        # Of all four, top-p needs two, and both are above 0.6 times the top; of those two the largest alone has 4/7.
        (SampleConfig(temperature=1.0, top_k=0, top_p=0.5, min_p=0.6), [0, 0, 3 / 7, 4 / 7]),
    ],
    ids=["temperature, then top-p", "top-k, then top-p", "top-p, then min-p"],
)
def test_filters_are_applied_in_the_usual_order(settings: SampleConfig, expected: list[float]) -> None:
    """Temperature, top-k, top-p, min-p; each of these comes out differently where two of them change places."""
    scores = FOUR
    for apply in build_filters(settings):
        scores = apply(scores)

    assert probabilities(scores) == pytest.approx(expected, abs=1e-5)


def test_rows_are_filtered_each_by_itself() -> None:
    """Several texts side by side."""
    both = np.concatenate((FOUR, FOUR[:, ::-1]))

    for apply in build_filters(SampleConfig(top_k=2, top_p=0.9, min_p=0.1)):
        np.testing.assert_array_equal(apply(both)[0], apply(FOUR)[0])
        np.testing.assert_array_equal(apply(both)[1], apply(FOUR[:, ::-1].copy())[0])


@pytest.mark.parametrize(
    ("text", "chat", "expected"),
    [
        (None, False, set(range(1, 75))),
        (None, True, set(range(1, 82))),
        (TextConfig(fold=True, ids=(0, 5, 7, 70)), False, {5, 7, 70}),
        (TextConfig(fold=True, ids=(0, 5, 7, 70)), True, {5, 7, 70, *range(75, 82)}),
        (TextConfig(fold=True, ids=(5, 78, 79, 80, 81)), False, {5}),
    ],
    ids=["nothing known", "nothing known, chat", "three characters", "three characters, chat", "questions and answers"],
)
def test_only_what_the_text_held_is_drawn(text: TextConfig | None, chat: bool, expected: set[int]) -> None:
    """Unknown, spare ids, and what the text did not hold are not drawn, however likely; special tokens in a chat only."""
    logits = np.zeros((1, 88), np.float32)
    logits[0, [0, 82, 87, *(() if text is None else range(1, 5))]] = 100
    sampler = Sampler(SampleConfig(temperature=1.0), [sample_generator(0)], suppressed_ids(text, chat=chat))
    drawn = {int(sampler.draw(logits)[0]) for _ in range(2000)}

    assert drawn == expected


def test_large_seeds_are_told_apart() -> None:
    """Seeds that a float cannot hold are seeds of their own."""
    draws = {float(sample_generator(seed, stream).random()) for seed in (2**63, 2**63 + 1, 2**64 - 1) for stream in (0, 1)}

    assert len(draws) == 6


def test_draws_follow_the_distribution() -> None:
    """Ten thousand draws come out in proportion."""
    sampler = Sampler(SampleConfig(temperature=1.0), [sample_generator(0)])
    counts = np.bincount([sampler.draw(FOUR.astype(np.float32))[0] for _ in range(10_000)])

    np.testing.assert_allclose(counts / 10_000, [0.1, 0.2, 0.3, 0.4], atol=0.015)


class Counting:
    """A model that always predicts the next id of 1 to 50."""

    def prefill(self, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """The next one's logit is 20, the others' 0."""
        logits: npt.NDArray[np.float32] = 20 * np.eye(88, dtype=np.float32)[ids[:, -1] % 50 + 1]
        return logits


def run(
    n_new: int | None, *, stops: list[list[int]] | None = None, batch: int = 1, seed: int = 0, temperature: float = 0.0
) -> list[list[int]]:
    """All ids of each text that goes on from id 1."""
    logits = Counting().prefill(np.ones((batch, 1), dtype=np.int64))
    stop_filters = [StopSequenceFilter(stops or []) for _ in range(batch)]
    generators = [sample_generator(seed, i) for i in range(batch)]
    sampler = Sampler(SampleConfig(temperature=temperature), generators, suppressed_ids(None))
    steps = generate(StepwiseDecoder(Counting().prefill), logits, n_new, sampler=sampler, stop_filters=stop_filters)
    parts = list(itertools.islice(steps, 100))
    return [[token for part in parts for token in part[i]] for i in range(batch)]


def test_number_of_ids() -> None:
    """As many as asked; none for 0; without end for None."""
    assert run(0) == [[]]
    assert run(3) == [[2, 3, 4]]
    assert len(run(None)[0]) == 100


def test_stop_text_ends_a_sample() -> None:
    """A stop text is left out, and so is what would have come after it; one that never comes changes nothing."""
    assert run(20, stops=[[7, 8, 9]]) == [[2, 3, 4, 5, 6]]
    assert run(20, stops=[[99], [5]]) == [[2, 3, 4]]
    assert run(6, stops=[[7, 8, 9]]) == [[2, 3, 4, 5, 6, 7]]


@given(st.lists(st.integers(1, 2), max_size=30), st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=4), max_size=3))
def test_stop_filter_cuts_at_the_first_stop(tokens: list[int], stops: list[list[int]]) -> None:
    """Whatever comes and whatever is held back on the way, the text is cut before the stop that is complete first."""
    stop_filter = StopSequenceFilter(stops)
    text: list[int] = []
    for token in tokens:
        text += stop_filter.push(token)
        if stop_filter.stopped:
            break
    text += stop_filter.flush()
    expected, found = tokens, False
    for end in range(1, len(tokens) + 1):
        ends = [len(stop) for stop in stops if tokens[:end][-len(stop) :] == stop]
        if ends:
            first = next(len(stop) for stop in stops if tokens[:end][-len(stop) :] == stop)
            expected, found = tokens[: end - first], True
            break

    assert stop_filter.stopped == found
    assert text == expected


def test_seed_decides() -> None:
    """The same seed gives the same ids, 0 included; sample i is the same whatever stands beside it."""
    wild = {"temperature": 5.0}
    assert run(50, seed=0, **wild) == run(50, seed=0, **wild) != run(50, seed=1, **wild)  # type: ignore[arg-type]
    assert run(50, batch=3, **wild)[0] == run(50, **wild)[0]  # type: ignore[arg-type]
    assert run(50, batch=2, **wild)[0] != run(50, batch=2, **wild)[1]  # type: ignore[arg-type]


def test_reference_is_the_model(tmp_path: Path) -> None:
    """Loaded from a file and read in two parts, it predicts what the model predicts for the whole text."""
    torch.manual_seed(0)
    model = GPT(TINY)
    folder = RunFolder(tmp_path)
    folder.save_model(model.arrays(), TINY)
    ids = np.array([[i % 70 + 1 for i in range(30)]])
    reference = ReferenceModel.load(tmp_path / "model.safetensors")
    reference.prefill(ids[:, :11])

    np.testing.assert_array_equal(reference.prefill(ids[:, 11:]), model(torch.from_numpy(ids))[0][:, 0].detach().numpy())
