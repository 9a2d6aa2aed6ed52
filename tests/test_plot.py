"""The pictures can be opened and show what they should."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from picogpt import plot
from picogpt.plot import draw_losses, draw_scores
from picogpt.run import LossLog
from picogpt.scores import CONDITIONS, Scores, position_bins


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


def test_names_are_no_formulas() -> None:
    """A name with dollars in it is drawn as it is; as a formula this one is an error."""
    assert draw_losses({"a$5_vs_$6": make_log(3, 1.0), "b": make_log(3, 1.0)})
    losses = {name: np.ones((2, 2, 8), np.float32) for name in CONDITIONS}
    assert draw_scores(Scores(losses, np.array([0, 1])), "a$5_vs_$6")


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


def test_scores_are_drawn_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above each condition's losses, below what it costs more than the roll as it is: by window left, by position right."""
    figures: list[Figure] = []

    def keep(figure: Figure) -> bytes:
        figures.append(figure)
        return b""

    monkeypatch.setattr(plot, "_jpg", keep)
    generator = np.random.default_rng(0)
    scores = Scores({name: generator.random((4, 3, 8), np.float32) for name in CONDITIONS}, np.array([0, 0, 1, 2]))
    draw_scores(scores, "title")
    by_window, by_position, more_by_window, more_by_position = figures[0].axes[:4]
    bins = position_bins(8, 2)

    assert figures[0].get_suptitle() == "title"
    for axes, parts in ((by_window, scores.by_window), (by_position, lambda name: scores.by_position(name, bins))):
        assert [line.get_label() for line in axes.lines] == list(CONDITIONS.values())
        for line, name in zip(axes.lines, CONDITIONS, strict=True):
            np.testing.assert_allclose(np.asarray(line.get_ydata(), float), [estimate.nats for estimate in parts(name)])
    others = [name for name in CONDITIONS if name != "as_is"]
    paired = (lambda name: scores.by_window(name, minus="as_is"), lambda name: scores.by_position(name, bins, minus="as_is"))
    for axes, parts in zip((more_by_window, more_by_position), paired, strict=True):
        for bars, name in zip(axes.containers, others, strict=True):
            middle, _, (lengths,) = bars
            np.testing.assert_allclose(np.asarray(middle.get_ydata(), float), [estimate.nats for estimate in parts(name)])
            ends = np.array([segment[:, 1] for segment in lengths.get_segments()])
            np.testing.assert_allclose(np.diff(ends)[:, 0], [2 * estimate.error for estimate in parts(name)])
