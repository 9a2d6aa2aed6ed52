"""Render `log.html`: loss curves of one or several runs, the samples of each epoch, and a text shaded by its probabilities.

The curve is rendered here as SVG, so that the page works without JavaScript; the script adds the cursor, the slider and shades.
"""

from __future__ import annotations

import base64
import html
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Template

from picogpt.export.page import resource, script_json
from picogpt.runs.loss_log import LossLog
from picogpt.wording import format_seconds

__all__ = ["EpochView", "RunView", "pack_probabilities", "render_curve", "render_page"]

RELOAD_SECONDS = 15
"""Seconds after which the page of a run in training reloads itself."""
PATIENCE_EPOCHS = 10
"""Number of epochs without news after which it stops to reload itself: the process has been killed."""
MIN_PATIENCE_SECONDS = 300
"""Seconds without news that are always waited for."""

# Size of the chart and its margins, in units of the SVG's view box.
_WIDTH, _HEIGHT = 880, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 56, 16, 40
# Colours of the runs, and outlines of their points: circle, square, triangle, diamond, cross. Colour is not needed to tell runs
# apart, and thirty runs have different pairs.
_COLOURS = ("var(--blue)", "var(--red)", "#2c8a57", "#8a5fb0", "#b08a1f", "#4a7f8a")
_SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "M-4-4h8v8h-8z",
    "M0-5L5 4h-10z",
    "M0-6L6 0 0 6-6 0z",
    "M-4-4L4 4M-4 4L4-4",
)
_MAX_POINTS = 15  # of a run in a comparison
_LABEL_GAP = 14  # minimum vertical distance of two labels


@dataclass(frozen=True)
class EpochView:
    """Output of a model at an epoch's end."""

    sample: str
    """Generated text."""
    probabilities: Sequence[float] = ()
    """Probability of each character of the run's excerpt after the first, given the characters before it."""


@dataclass(frozen=True, kw_only=True)
class RunView:
    """Content of a run's page."""

    name: str
    log: LossLog
    epochs: Sequence[EpochView] = ()
    """The last epochs of the log; epochs trained by an older version of picogpt are missing."""
    excerpt: Sequence[str] = ()
    """A piece of the validation text, one string for each id."""
    marks: Mapping[str, float] = field(default_factory=dict)
    """Losses of baselines on the same text, by name, in nats per character."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings of the run as text, by name."""
    in_training: bool = False
    """Whether the run is training, so that the page should reload itself."""
    written: float = 0.0
    """Unix time at which the page of a run in training is written."""


def render_page(runs: Sequence[RunView]) -> str:
    """Return the page of one run, or of several to compare: a single HTML file that needs no network."""
    # Only the page of a single run has a slider and a cursor.
    single = runs[0] if len(runs) == 1 else None
    title = " and ".join(run.name for run in runs)
    chart = _Chart(runs)
    # Read by the script.
    data = {
        "points": chart.points(single) if single else [],
        "epochs": _epoch_data(single) if single else [],
        "excerpt": list(single.excerpt) if single else [],
        "reload": _reload(single) if single and single.in_training else None,
    }
    parts = {
        # The script reloads the page, as it can stop; without JavaScript the page reloads itself forever.
        "refresh": f'<noscript><meta http-equiv="refresh" content="{RELOAD_SECONDS}"></noscript>' if data["reload"] else "",
        "title": html.escape(title),
        "status": _status(runs),
        "chart": chart.svg(),
        "legend": "" if single else _legend(runs),
        "hint": _hint(runs, has_baselines=chart.has_baselines),
        "table": _table(runs),
        "watch": _samples(runs) if not single else _watch(single) if single.epochs else "",
        "settings": "".join(_settings(run, named=not single) for run in runs),
        "data": script_json(data),
        "style": resource("log_page.css"),
        "script": resource("log_page.js"),
    }
    return Template(resource("log_page.html")).substitute(parts)


def render_curve(run: RunView) -> str:
    """Return the loss curve of one run with its table, for another page."""
    # That page has no script for the cursor, so the caption explains the lines only.
    hint = "<figcaption>Validation solid, training dashed.</figcaption>"
    return f'<figure class="scroll">{_Chart([run]).svg()}{hint}</figure>{_table([run])}'


def _hint(runs: Sequence[RunView], *, has_baselines: bool) -> str:
    """Return what the caption of the chart says beyond its curves."""
    hints = []
    if has_baselines:
        hints.append("Level lines: what a compressor (lzma) and a table of character counts (n-gram) reach on the same text.")
    if len(runs) == 1:
        hints.append("Move over the curve, or use the arrow keys on it, to read an epoch.")
    return "".join(f" {hint}" for hint in hints)


def _status(runs: Sequence[RunView]) -> str:
    """Return the line below the title, as HTML."""
    if len(runs) > 1:
        return f"{len(runs)} runs, by their loss logs."
    (run,) = runs
    log = run.log
    if not log.val:
        return "No epoch has ended yet."
    state = f"In training; this page reloads itself every {RELOAD_SECONDS} seconds." if run.in_training else ""
    best = f"best validation loss {log.best_loss:.4f} nats per character. " if log.best_loss else ""
    summary = f"{len(log.val)} epochs, {log.chars[-1]:,} characters in {format_seconds(log.seconds[-1])}; {best}"
    return f'{summary}<span id="state" role="status">{state}</span>'


def _reload(run: RunView) -> dict[str, float]:
    """Return when a page reloads itself, and for how many seconds it does so without news."""
    starts = [0.0, *run.log.seconds]
    longest = max((end - start for start, end in itertools.pairwise(starts)), default=0.0)
    patience = max(MIN_PATIENCE_SECONDS, PATIENCE_EPOCHS * longest)
    return {"every": RELOAD_SECONDS, "written": round(run.written), "patience": round(patience)}


def _epoch_data(run: RunView) -> list[dict[str, str]]:
    """Return the data of the slider, one entry per epoch."""
    return [
        {
            "label": _epoch_label(run.log, number),
            "sample": view.sample,
            "probabilities": pack_probabilities(view.probabilities),
        }
        # The last epoch of the log is the last view; earlier epochs may have none.
        for number, view in enumerate(run.epochs, start=len(run.log.val) - len(run.epochs) + 1)
    ]


def pack_probabilities(probabilities: Iterable[float]) -> str:
    """Encode probabilities as base64, a byte each: enough for shades of a colour, and it keeps files small."""
    return base64.b64encode(bytes(round(255 * p) for p in probabilities)).decode()


def _epoch_label(log: LossLog, number: int) -> str:
    """Return the label of an epoch of the log, counted from 1."""
    return f"epoch {number}, {log.chars[number - 1]:,} characters, val {log.val[number - 1]:.4f}"


def _rows(log: LossLog) -> Iterator[tuple[int, int, float, float, float]]:
    """Yield number, characters, seconds, training loss and validation loss of each epoch."""
    return zip(range(1, len(log.val) + 1), log.chars, log.seconds, log.train, log.val, strict=True)


def _watch(run: RunView) -> str:
    """Return the section with the slider; without JavaScript it shows the last epoch."""
    # All text is escaped: a model can generate markup. lang="" as its language is unknown to the page.
    last = len(run.epochs) - 1
    label = html.escape(_epoch_label(run.log, len(run.log.val)))
    excerpt = (
        '<h2 id="expects">What it expects</h2>\n<p class="legend">Text it has not trained on. The darker a character, '
        "the more probable the model found it; dotted lines mark those below 5&nbsp;%.</p>\n"
        f'<p class="excerpt" id="excerpt" lang="">{html.escape("".join(run.excerpt))}</p>\n'
        if run.excerpt
        else ""
    )
    return (
        '<section aria-labelledby="writes">\n<h2 id="writes">What it writes</h2>\n<div class="epoch">\n'
        f'<label for="epoch">Epoch</label><input type="range" id="epoch" min="0" max="{last}" value="{last}">\n'
        f'<output id="epoch-label" for="epoch" aria-live="polite">{label}</output>\n</div>\n'
        f'<pre id="sample" lang="">{html.escape(run.epochs[-1].sample)}</pre>\n{excerpt}</section>'
    )


def _samples(runs: Sequence[RunView]) -> str:
    """Return the section with the last sample of each run that has one."""
    samples = "".join(
        f"<h3>{html.escape(run.name)}</h3>\n<p>{_epoch_label(run.log, len(run.log.val))}</p>\n"
        f'<pre lang="">{html.escape(run.epochs[-1].sample)}</pre>\n'
        for run in runs
        if run.epochs
    )
    return f'<section aria-labelledby="writes">\n<h2 id="writes">What they write</h2>\n{samples}</section>' if samples else ""


def _legend(runs: Sequence[RunView]) -> str:
    """Return the list of the runs with their lines."""
    items = []
    for i, run in enumerate(runs):
        line = f'<line x2="40" y1="8" y2="8" style="stroke: {_COLOURS[i % len(_COLOURS)]}"/>{_point(20, 8, i)}'
        loss = f": validation {run.log.val[-1]:.4f}" if run.log.val else ""
        items.append(f'<li><svg viewBox="0 0 40 16" aria-hidden="true">{line}</svg>{html.escape(run.name)}{loss}</li>')
    return f'<ul class="runs">{"".join(items)}</ul>'


def _point(x: float, y: float, run: int) -> str:
    """Return a point of a run, counted from 0, in its colour and shape."""
    colour, shape = _COLOURS[run % len(_COLOURS)], _SHAPES[run % len(_SHAPES)]
    return f'<path class="point" style="fill: {colour}; stroke: {colour}" transform="translate({x:g} {y:g})" d="{shape}"/>'


def _table(runs: Sequence[RunView]) -> str:
    """Return a collapsed table of all losses, for readers who cannot see the chart."""
    rows = []
    for run in runs:
        log = run.log
        for i, chars, seconds, train, val in _rows(log):
            cells = (str(i), f"{chars:,}", format_seconds(seconds), f"{train:.4f}", f"{val:.4f}", f"{val / math.log(2):.4f}")
            # The first column is needed only to tell runs apart.
            name = [f"<td>{html.escape(run.name)}</td>"] if len(runs) > 1 else []
            rows.append("<tr>" + "".join([*name, *(f"<td>{cell}</td>" for cell in cells)]) + "</tr>")
    names = [*(["run"] if len(runs) > 1 else []), "epoch", "characters", "time", "train (nats)", "validation (nats)", "in bits"]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        '<details><summary>All figures</summary><div class="scroll"><table class="figures"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _settings(run: RunView, *, named: bool) -> str:
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in run.settings.items())
    title = f"<h3>{html.escape(run.name)}</h3>" if named else ""
    return f"{title}<dl>{items}</dl>" if items else f"{title}<p>Not recorded.</p>"


class _Chart:
    """The chart of losses: characters on the x axis, nats on the left axis, bits on the right one.

    Args:
        runs: the runs to draw.
    """

    def __init__(self, runs: Sequence[RunView]) -> None:
        self._runs = runs
        # Baselines of another text would say nothing about a run.
        marks = [run.marks for run in runs]
        self._baselines = marks[0] if all(other == marks[0] for other in marks) else {}
        # A diverged run may have infinite losses, which cannot be drawn; the rest of its curve can.
        values = [*self._baselines.values(), *(loss for run in runs for loss in (*run.log.train, *run.log.val))]
        losses = [loss for loss in values if math.isfinite(loss)]
        # At least 1: before the first epoch there is nothing to scale by.
        self._most = max([1, *(chars for run in runs for chars in run.log.chars)])
        low, high = min(losses, default=0.0), max(losses, default=1.0)
        margin = 0.06 * (high - low) or 0.1  # equal losses would give a range of 0
        self._low, self._high = low - margin, high + margin

    @property
    def has_baselines(self) -> bool:
        """Whether the chart has level lines."""
        return bool(self._baselines)

    def _x(self, chars: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * chars / self._most

    def _y(self, loss: float) -> float:
        # SVG's y axis points down.
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (self._high - loss) / (self._high - self._low)

    def points(self, run: RunView) -> list[dict[str, float | str]]:
        """Return the x coordinate of each epoch and its text, for the cursor."""
        return [
            {
                "x": round(self._x(chars), 1),
                "text": f"epoch {i}: {chars:,} characters in {format_seconds(seconds)}, train {train:.4f}, "
                f"validation {val:.4f} nats per character ({val / math.log(2):.4f} bits)",
            }
            for i, chars, seconds, train, val in _rows(run.log)
        ]

    def svg(self) -> str:
        """Return the chart as an SVG element."""
        # Grid first and curves last, so that nothing hides the curves.
        parts = [*self._axes(), *self._marks(), *self._curves()]
        described = "Loss by characters trained on: validation solid, training dashed."
        return (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" data-left="{_LEFT}" tabindex="0" role="img" aria-label="{described}">'
            f'{"".join(parts)}<line class="cursor" x1="0" x2="0" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/></svg>'
        )

    def _axes(self) -> Iterator[str]:
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        for value in _ticks(self._low, self._high):
            y = self._y(value)
            yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        # Round numbers of bits, at the heights of their nats.
        for bits in _ticks(self._low / math.log(2), self._high / math.log(2)):
            yield f'<text x="{right + 8}" y="{self._y(bits * math.log(2)) + 4:.1f}">{bits:g}</text>'
        for chars in _ticks(0, self._most):
            x = self._x(chars)
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_short(chars)}</text>'
        yield f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">characters trained on</text>'
        yield f'<text x="4" y="{_TOP - 4}">nats</text><text x="{_WIDTH - 4}" y="{_TOP - 4}" text-anchor="end">bits</text>'

    def _marks(self) -> Iterator[str]:
        # From top to bottom; a label that would cover the one above moves down.
        above = -math.inf
        for name, value in sorted(self._baselines.items(), key=lambda mark: -mark[1]):
            y = self._y(value)
            label = max(y - 4, above + _LABEL_GAP)
            above = label
            yield f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{_WIDTH - _RIGHT - 4}" y="{label:.1f}" text-anchor="end">{html.escape(name)} {value:.2f}</text>'

    def _curves(self) -> Iterator[str]:
        for i, run in enumerate(self._runs):
            colour = _COLOURS[i % len(_COLOURS)]
            for kind, losses in (("train", run.log.train), ("val", run.log.val)):
                places = self._places(run.log, losses)
                if len(places) == 1:  # a line of one point is invisible
                    x, y = places[0]
                    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 if kind == "val" else 2}" style="fill: {colour}"/>'
                elif places:
                    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
                    yield f'<polyline class="curve {kind}" style="stroke: {colour}" points="{line}"/>'
            if len(self._runs) > 1:
                yield from self._points_of(run.log, i)

    def _places(self, log: LossLog, losses: Sequence[float]) -> list[tuple[float, float]]:
        """Return the coordinates of the losses that can be drawn."""
        return [(self._x(chars), self._y(loss)) for chars, loss in zip(log.chars, losses, strict=True) if math.isfinite(loss)]

    def _points_of(self, log: LossLog, run: int) -> Iterator[str]:
        """Yield points on the validation curve of a run: the last epoch, and others at equal distances before it."""
        places = self._places(log, log.val)
        for x, y in places[:: -max(1, math.ceil(len(places) / _MAX_POINTS))]:
            yield _point(round(x, 1), round(y, 1), run)


def _ticks(low: float, high: float) -> list[float]:
    """Return four to nine round numbers between `low` and `high`."""
    # The step is the next of 1, 2, 5 times a power of ten that gives at most six intervals.
    raw = (high - low) / 6
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    return [round(step * i, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]  # 0.30000000000000004 -> 0.3


def _short(chars: float) -> str:
    """Format a number of characters for an axis: 250k, 1.5M."""
    if chars >= 1e6:
        return f"{chars / 1e6:g}M"
    return f"{chars / 1e3:g}k" if chars >= 1e3 else f"{chars:g}"
