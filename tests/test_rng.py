"""The registry of random streams: numbers that are on disk stay, and draws depend on seed, stream and counter alone."""

from __future__ import annotations

import numpy as np
import pytest

from picogpt.rng import Stream, philox, sample_generator, stream_generator


def test_numbers_stay() -> None:
    """Each use keeps the number that runs on disk were made with; no two share one."""
    assert {stream.name: stream.value for stream in Stream} == {
        "TEXT_ORDER": 1,
        "DROPOUT": 2,
        "SHARD_ORDER": 3,
        "POOL_DRAW": 4,
    }


@pytest.mark.parametrize(("counter", "expected"), [((7,), [0, 0, 0, 7]), ((2, 7), [0, 0, 2, 7])])
def test_counter(counter: tuple[int, ...], expected: list[int]) -> None:
    """Counters stand in the highest words, so that draws of two counters never overlap."""
    state = philox(5, Stream.DROPOUT, *counter).state["state"]

    assert state["counter"].tolist() == expected
    assert state["key"].tolist() == [5, 2]


def test_streams_differ() -> None:
    """Seed, stream and counter each lead to other draws; the same ones to the same."""

    def draw(seed: int, stream: Stream, counter: int) -> int:
        return int(stream_generator(seed, stream, counter).integers(2**60))

    first = draw(1, Stream.TEXT_ORDER, 0)
    assert first == draw(1, Stream.TEXT_ORDER, 0)
    assert len({first, draw(2, Stream.TEXT_ORDER, 0), draw(1, Stream.POOL_DRAW, 0), draw(1, Stream.TEXT_ORDER, 1)}) == 4


def test_samples_differ() -> None:
    """Each of several generated texts has draws of its own; a negative seed is one too."""
    draws = [sample_generator(seed, sample).random(3) for seed, sample in ((1, 0), (1, 1), (-1, 0))]

    assert len({tuple(draw) for draw in draws}) == 3
    np.testing.assert_array_equal(sample_generator(1).random(3), draws[0])
