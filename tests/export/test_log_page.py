"""The page of a run: its curve, samples and excerpt, with hostile text in all of them, in a browser too."""

from __future__ import annotations

import base64
import json
import math
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from picogpt.export.log_page import EpochView, RunView, render_page
from picogpt.files import atomic_write
from picogpt.runs.loss_log import LossLog
from tests.browser import Browser

HOSTILE = "</script><script>document.title = 'run'</script> \"quotes\" & 'more' <b>\u202eright to left \U0001f600"
LOG = LossLog(
    train=[3.0, 2.5, 2.0], val=[2.9, 2.4, 2.1], chars=[1000, 2000, 3000], seconds=[1.0, 2.0, 3.0], best_loss=2.1, iter_num=30
)


def view(**changes: object) -> RunView:
    """A run of three epochs with hostile text everywhere."""
    epochs = [EpochView(f"sample {i} {HOSTILE}", [0.5] * (len(HOSTILE) - 1)) for i in (1, 2, 3)]
    fields = {"name": "a<b>", "log": LOG, "epochs": epochs, "excerpt": HOSTILE, "settings": {"k<i>": HOSTILE}} | changes
    return RunView(**fields)  # type: ignore[arg-type]


def data_of(page: str) -> dict[str, Any]:
    """What the script reads."""
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(content)  # type: ignore[no-any-return]


def test_hostile_text_is_text() -> None:
    """Nothing that a text holds becomes an element: there are the page's two scripts and no more, and no bold letter."""
    page = render_page([view()])

    assert page.count("<script") == 2
    assert "<b>" not in page
    assert data_of(page)["epochs"][2]["sample"] == f"sample 3 {HOSTILE}"


def test_no_network() -> None:
    """A policy forbids all but the page's own style and script, and no address stands in it."""
    page = render_page([view()])

    assert "default-src 'none'" in page
    assert not re.search(r"https?://|src=|href=|@import|url\(", page)


def test_reloads_in_training_alone() -> None:
    """The page of a run in training loads itself again, without a script too; that of one that has ended does not."""
    assert '<meta http-equiv="refresh" content="15">' in render_page([view(in_training=True)])
    assert 'http-equiv="refresh"' not in render_page([view()])
    assert data_of(render_page([view()]))["reload"] is None


def test_patience() -> None:
    """News are waited for ten times as long as the longest epoch took, and five minutes at least."""
    slow = replace(LOG, seconds=[10.0, 70.0, 110.0])
    pages = [render_page([view(in_training=True, written=1234.5, log=log)]) for log in (LOG, slow)]

    assert [data_of(page)["reload"] for page in pages] == [
        {"every": 15, "written": 1234, "patience": 300},
        {"every": 15, "written": 1234, "patience": 600},
    ]


def test_probabilities_of_an_epoch() -> None:
    """A byte for each character but the first: 255 is certainty."""
    epochs = [EpochView("s", [0.0, 1.0, 0.25])]
    (epoch,) = data_of(render_page([view(epochs=epochs, excerpt="abcd")]))["epochs"]

    assert base64.b64decode(epoch["probabilities"]) == bytes([0, 255, 64])
    assert epoch["label"] == "epoch 3, 3,000 characters, val 2.1000"  # the last epochs are kept, whatever their number


def test_points_of_the_curve() -> None:
    """Epochs stand at their characters, from the axis at 56 to the right margin at 824, and losses go down the page."""
    page = render_page([view()])
    (line,) = re.findall(r'class="curve val"[^>]*points="([^"]*)"', page)
    points = [tuple(map(float, point.split(","))) for point in line.split()]

    assert [x for x, _ in points] == pytest.approx([56 + 768 / 3, 56 + 2 * 768 / 3, 824], abs=0.1)
    assert points[0][1] < points[1][1] < points[2][1]
    assert data_of(page)["points"][2]["x"] == 824


def test_marks() -> None:
    """Other predictors are lines with a name and a value."""
    assert re.search(r">lzma 2\.50</text>", render_page([view(marks={"lzma": 2.5})]))


def test_odd_logs() -> None:
    """No epoch, one epoch, equal losses and losses that are no numbers make pages too."""
    one = LossLog(train=[2.0], val=[2.0], chars=[10], seconds=[1.0], best_loss=2.0)
    broken = LossLog(train=[math.nan, 2.0], val=[math.inf, 2.0], chars=[10, 20], seconds=[1.0, 2.0])

    assert "No epoch has ended yet." in render_page([view(log=LossLog(), epochs=[])])
    assert render_page([view(log=one, epochs=[])]).count("<circle") == 2
    assert "nan" not in re.findall(r"<svg.*?</svg>", render_page([view(log=broken, epochs=[])]), re.DOTALL)[0]


def test_several_runs() -> None:
    """Two runs are two pairs of curves; there is no slider, and each has its last sample and its settings."""
    page = render_page([view(name="one"), view(name="two", epochs=[])])

    assert page.count('class="curve val"') == 2
    assert page.count("<pre") == 1
    assert "<h3>one</h3>\n<p>epoch 3, 3,000 characters, val 2.1000</p>\n" in page
    assert "sample 3" in page
    assert "sample 2" not in page
    assert 'type="range"' not in page
    assert page.count("<h3>") == 3
    assert "What they write" not in render_page([view(name="one", epochs=[]), view(name="two", epochs=[])])


def test_runs_are_told_apart_without_colour() -> None:
    """Each run has its own shape of points, on its curve and in the legend, and pairs of shape and colour differ up to thirty."""
    page = render_page([view(name=f"run {i}") for i in range(30)])
    points = re.findall(r'<path class="point" style="([^"]*)" transform="[^"]*" d="([^"]*)"/>', page)
    legend = re.findall(
        r'<li><svg.*?<path class="point" style="([^"]*)"[^>]* d="([^"]*)"/></svg>(run \d+): validation 2.1000</li>', page
    )

    assert [name for *_, name in legend] == [f"run {i}" for i in range(30)]
    assert len({(style, shape) for style, shape, _ in legend}) == 30
    assert len({shape for _, shape, _ in legend[:5]}) == 5
    assert Counter(points) == {(style, shape): 4 for style, shape, _ in legend}  # three epochs and the legend


def test_points_of_a_long_run() -> None:
    """A long run has at most fifteen points, the last epoch among them."""
    log = LossLog(train=[2.0] * 100, val=[2.0] * 100, chars=[*range(1, 101)], seconds=[1.0] * 100, best_loss=2.0)
    page = render_page([view(log=log), view()])
    points = re.findall(r'class="point" style="fill: var\(--blue\)[^"]*" transform="translate\(([\d.]+) ', page)

    assert len(points) == 15 + 1


def test_baselines_of_several_runs() -> None:
    """They are drawn where the runs share them."""
    assert "lzma 2.50" in render_page([view(marks={"lzma": 2.5}), view(marks={"lzma": 2.5})])
    assert "lzma" not in render_page([view(marks={"lzma": 2.5}), view(marks={"lzma": 2.6})])


def test_size() -> None:
    """Twenty epochs with samples and an excerpt of 400 characters stay far below 300 kB."""
    log = LossLog(train=[2.0] * 20, val=[2.0] * 20, chars=[*range(1, 21)], seconds=[1.0] * 20, best_loss=2.0)
    epochs = [EpochView("x" * 160, [0.5] * 400)] * 20

    assert len(render_page([view(log=log, epochs=epochs, excerpt="y" * 401)]).encode()) < 60_000


@pytest.mark.parametrize(("fragment", "epoch"), [("", 3), ("#epoch=2", 2), ("#epoch=99", 3), ("#<b>", 3)])
def test_in_a_browser(tmp_path: Path, fragment: str, epoch: int, browser: Browser) -> None:
    """From a file, without network: the slider's epoch shows its sample and a shaded excerpt, and the console stays empty."""
    page = tmp_path / "log.html"
    page.write_text(render_page([view()]))
    with browser.tab() as tab:
        tab.open(page, fragment)
        document = tab.evaluate("document.documentElement.outerHTML")
        assert tab.complaints() == []

    assert f">sample {epoch} &lt;/script&gt;" in document
    assert document.count('style="--p: 0.502;"') == len(HOSTILE) - 1
    assert "<title>a&lt;b&gt;</title>" in document


FAST_CLOCK = "window.name = Number(window.name || 0) + 1; const wait = setTimeout; window.setTimeout = (call, time) => wait(call, time / 100);"
"""Counts how often a tab has loaded its page, and lets timers run a hundred times as fast."""


def test_reloads_until_there_is_no_news(tmp_path: Path, browser: Browser) -> None:
    """While news come the page loads itself again; where a killed process left it, it says so in words and stays."""
    page = tmp_path / "log.html"

    def write(age: float) -> None:
        atomic_write(page, render_page([view(in_training=True, written=time.time() - age)]).encode())

    def wait_for_state(text: str) -> None:
        tab.wait_for(f"document.getElementById('state')?.textContent === {json.dumps(text)}")  # none while the page loads

    write(0)
    with browser.tab(script=FAST_CLOCK) as tab:
        tab.open(page)
        tab.wait_for("Number(window.name) >= 4")  # 15 seconds are 150 milliseconds here
        wait_for_state("In training; this page reloads itself every 15 seconds.")

        tab.evaluate("document.querySelector('details').open = true")
        loaded = tab.evaluate("window.name")
        time.sleep(1)
        assert tab.evaluate("window.name") == loaded  # someone reads the table
        tab.evaluate("document.querySelector('details').open = false")

        write(1500)
        wait_for_state("No news for 25 minutes, so this page no longer reloads itself. Start the run again, or reload the page.")
        loaded = tab.evaluate("window.name")
        time.sleep(1)
        assert tab.evaluate("window.name") == loaded

        write(86400)
        tab.evaluate("location.reload()")
        wait_for_state("No news for 24 hours, so this page no longer reloads itself. Start the run again, or reload the page.")
        assert tab.complaints() == []


@pytest.mark.parametrize("width", [1280, 360])
def test_comparison_in_a_browser(tmp_path: Path, width: int, browser: Browser) -> None:
    """Two runs fit the window, with both names beside their lines, and the console stays empty."""
    page = tmp_path / "compare.html"
    page.write_text(render_page([view(name="one"), view(name="x" * 64)]))
    with browser.tab(width=width) as tab:
        tab.open(page)
        tab.evaluate("document.querySelector('details').open = true")

        assert tab.evaluate(
            "(table => table.scrollWidth <= table.closest('.scroll').clientWidth)(document.querySelector('.figures'))"
        )
        assert tab.evaluate("[...document.querySelectorAll('.runs li')].map(item => item.textContent)") == [
            "one: validation 2.1000",
            f"{'x' * 64}: validation 2.1000",
        ]
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.complaints() == []
