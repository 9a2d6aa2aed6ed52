"""Sampling on distributions worked out by hand, and the reference against the vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from picogpt.config import SampleConfig
from picogpt.generate import generate_ids, make_generator, probabilities, sample_id
from picogpt.model import GPT
from picogpt.reference import ReferenceModel
from picogpt.run import RunFolder
from tests.conftest import TINY

FOUR = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SampleConfig(temperature=1.0), [0.1, 0.2, 0.3, 0.4]),
        (SampleConfig(temperature=0.5), [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        (SampleConfig(temperature=0.0), [0, 0, 0, 1]),
        (SampleConfig(temperature=1.0, top_k=2), [0, 0, 3 / 7, 4 / 7]),
        (SampleConfig(temperature=1.0, top_k=9), [0.1, 0.2, 0.3, 0.4]),
        (SampleConfig(temperature=1e-6), [0, 0, 0, 1]),
    ],
)
def test_probabilities(config: SampleConfig, expected: list[float]) -> None:
    """Softmax of the logits over the temperature, over the k likeliest."""
    np.testing.assert_allclose(probabilities(FOUR, config), expected, atol=1e-6)


def test_what_is_no_text_is_never_drawn() -> None:
    """Unknown and spare ids get nothing, however likely the model finds them."""
    logits = np.zeros(88, np.float32)
    logits[[0, 82, 87]] = 100
    drawn = probabilities(logits, SampleConfig(temperature=1.0))

    assert drawn[[0, 82, 83, 84, 85, 86, 87]].sum() == 0
    assert drawn[1:82] == pytest.approx(1 / 81)


def test_draws_follow_the_distribution() -> None:
    """Ten thousand draws come out in proportion."""
    generator = make_generator(0)
    counts = np.bincount([sample_id(FOUR, SampleConfig(temperature=1.0), generator) for _ in range(10_000)])

    np.testing.assert_allclose(counts / 10_000, [0.1, 0.2, 0.3, 0.4], atol=0.015)


def test_seed_decides() -> None:
    """The same seed gives the same ids, 0 included, and another one others."""

    def draw(seed: int) -> list[int]:
        return list(generate_ids(lambda _: np.zeros(88, np.float32), [1], 50, SampleConfig(), make_generator(seed)))

    assert draw(0) == draw(0) != draw(1)


def test_number_of_ids() -> None:
    """As many as asked; none for 0; without end for None."""

    def stream(n_new: int | None) -> list[int]:
        ids = generate_ids(lambda ids: np.eye(88, dtype=np.float32)[ids[-1] % 50 + 1], [1], n_new, greedy, make_generator(0))
        return [next(ids) for _ in range(100)] if n_new is None else list(ids)

    greedy = SampleConfig(temperature=0.0)
    assert stream(0) == []
    assert stream(3) == [2, 3, 4]
    assert len(stream(None)) == 100


def test_reference_is_the_model(tmp_path: Path) -> None:
    """Loaded from a file, it predicts what the model predicts for the whole text so far."""
    torch.manual_seed(0)
    model = GPT(TINY)
    run = RunFolder(tmp_path)
    run.save_model(model.arrays(), TINY)
    ids = [i % 70 + 1 for i in range(30)]

    logits = ReferenceModel.load(tmp_path / "model.safetensors")(ids)

    np.testing.assert_array_equal(logits, model(torch.tensor([ids]))[0][0, 0].detach().numpy())
