"""The pictures can be opened and show what they should."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from picogpt import plot
from picogpt.checks import X_AXES
from picogpt.evaluation.scores import CONDITIONS, Scores, position_bins
from picogpt.plot import draw_losses, draw_scores
from picogpt.runs.loss_log import LossLog
from tests.programs import program


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


def keep(figures: list[Figure], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each figure that is drawn put into `figures`."""
    picture = plot._picture

    def kept(figure: Figure, suffix: str) -> bytes:
        figures.append(figure)
        return picture(figure, suffix)

    monkeypatch.setattr(plot, "_picture", kept)


def test_scores_are_drawn_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above each condition's losses, below what it costs more than the roll as it is: by window left, by position right."""
    figures: list[Figure] = []

    keep(figures, monkeypatch)
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


NAMES = ["_hidden", "a$5_vs_$6", "caf\udce9-run", "日本", "e", "my-long-named-run.with-parts_3", "g", "h", "i", "j", "k", "_l"]


@pytest.mark.parametrize("count", [1, 2, 6, 12])
def test_legend(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Every run is in the legend, whatever its name; of more than two it stands below the axes, which keep their size."""
    figures: list[Figure] = []
    keep(figures, monkeypatch)
    draw_losses({name: make_log(5, 1.0) for name in NAMES[:count]})
    (figure,) = figures
    axes = figure.axes[0]
    legend = axes.get_legend() if count <= 2 else figure.legends[0]
    assert legend is not None
    shown = [text.get_text() for text in legend.get_texts()]

    if count > 1:
        assert shown == ["train", "val", *(f"{plot._plain(name)}, best 1.200" for name in NAMES[:count])]
    else:
        assert shown == ["train", "val, best 1.200"]
    box, below = axes.get_window_extent(), legend.get_window_extent()
    assert box.height > 500
    assert box.width > 900
    assert count <= 2 or below.y1 < box.y0
    assert below.x0 >= 0
    assert below.x1 <= 1280
    assert len({line.get_color() for line in axes.lines}) == count


@pytest.mark.parametrize(
    ("x", "places"), [("epochs", [1, 2, 3]), ("characters", [0, 0.001, 0.002]), ("seconds", [2.0, 1.5, 1 + 1 / 3])]
)
def test_x_axis(monkeypatch: pytest.MonkeyPatch, x: str, places: list[float]) -> None:
    """The x axis counts what is asked for."""
    figures: list[Figure] = []
    keep(figures, monkeypatch)
    draw_losses({"a": make_log(3, 1.0)}, x=x)
    axes = figures[0].axes[0]

    np.testing.assert_allclose(np.asarray(axes.lines[1].get_xdata(), float), places)
    assert axes.get_xlabel() == X_AXES[x]


def test_png() -> None:
    """A suffix of .png gives a PNG."""
    losses = {name: np.ones((2, 2, 8), np.float32) for name in CONDITIONS}
    pictures = [
        draw_losses({"a": make_log(3, 1.0)}, suffix=".png"),
        draw_scores(Scores(losses, np.array([0, 1])), "a", suffix=".PNG"),
    ]

    assert all(picture.startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.parametrize("changes", [{"HOME": "/dev/null"}, {"HOME": "/dev/null", "MPLCONFIGDIR": "/dev/null/x"}], ids=len)
def test_unwritable_home(tmp_path: Path, changes: dict[str, str]) -> None:
    """Where matplotlib cannot keep anything, nothing is left in the temporary folder, even if the process ends at once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL"))}
    environment = {**kept, **changes, "TMPDIR": str(tmp_path)}
    done = subprocess.run(program("import_plot"), env=environment, capture_output=True, text=True, check=True)

    assert list(tmp_path.iterdir()) == []
    assert (done.stdout, done.stderr) == (f"{changes.get('MPLCONFIGDIR')}\n", "")
