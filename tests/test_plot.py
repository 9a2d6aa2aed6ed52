"""The pictures can be opened and show what they should."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from picogpt.plot import draw_losses, draw_scores
from picogpt.run import LossLog
from picogpt.scores import CONDITIONS, Scores


def make_log(n: int, level: float) -> LossLog:
    """A log of `n` epochs."""
    losses = [level + 1 / (i + 1) for i in range(n)]
    return LossLog(
        train=losses, val=losses, chars=[1000 * i for i in range(n)], seconds=losses, best_loss=min(losses, default=None)
    )


@pytest.mark.parametrize(
    "logs", [{"a": make_log(5, 1.0)}, {"a": make_log(100, 1.0), "b": make_log(3, 2.0)}, {"empty": make_log(0, 0.0)}], ids=len
)
def test_is_a_picture(logs: dict[str, LossLog]) -> None:
    """A JPG of 1280 x 800 with something on it."""
    with Image.open(io.BytesIO(draw_losses(logs))) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (1280, 800)
        assert np.asarray(picture.convert("L")).std() > 10


def test_runs_look_different() -> None:
    """Another curve is another picture."""
    assert draw_losses({"a": make_log(5, 1.0)}) != draw_losses({"a": make_log(6, 1.0)})


def test_scores_are_a_picture() -> None:
    """A JPG of 1440 x 1020, in which a condition that costs more is seen."""
    losses = {name: np.linspace(1, 2, 4 * 3 * 8, dtype=np.float32).reshape(4, 3, 8) for name in CONDITIONS}
    even = draw_scores(Scores(losses, np.array([0, 0, 1, 2])), "even")
    with Image.open(io.BytesIO(even)) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (1440, 1020)
        assert np.asarray(picture.convert("L")).std() > 10

    losses["zeroed"] = losses["zeroed"] + np.float32(0.1)
    assert draw_scores(Scores(losses, np.array([0, 0, 1, 2])), "even") != even
