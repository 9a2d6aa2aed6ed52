"""Render `log.html`: loss curves of one or several runs, the samples of each epoch, and a text shaded by its probabilities.

The curve is rendered here as SVG, so that the page works without JavaScript; the script adds the cursor, the slider and shades.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from string import Template

from picogpt.runs.folder import LossLog
from picogpt.wording import format_seconds

__all__ = ["EpochView", "RunView", "render_curve", "render_page"]

RELOAD_SECONDS = 15
"""Seconds after which the page of a run in training reloads itself."""

# Size of the chart and its margins, in units of the SVG's view box.
_WIDTH, _HEIGHT = 880, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 56, 16, 40
# Colours of the runs, repeated after six. Labels name the runs too, so that colour is not needed to read the chart.
_COLOURS = ("var(--blue)", "var(--red)", "#2c8a57", "#8a5fb0", "#b08a1f", "#4a7f8a")
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
    excerpt: str = ""
    """A piece of the validation text."""
    marks: Mapping[str, float] = field(default_factory=dict)
    """Losses of baselines on the same text, by name, in nats per character."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings of the run as text, by name."""
    in_training: bool = False
    """Whether the run is training, so that the page should reload itself."""


def render_page(runs: Sequence[RunView]) -> str:
    """Return the page of one run, or of several to compare: a single HTML file that needs no network."""
    # Only the page of a single run has samples and a cursor.
    single = runs[0] if len(runs) == 1 else None
    title = " and ".join(run.name for run in runs)
    in_training = any(run.in_training for run in runs)
    chart = _Chart(runs)
    # Read by the script.
    data = {
        "points": chart.points(single) if single else [],
        "epochs": _epoch_data(single) if single else [],
        "excerpt": single.excerpt if single else "",
    }
    parts = {
        "refresh": f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">' if in_training else "",
        "title": html.escape(title),
        "status": html.escape(_status(runs)),
        "chart": chart.svg(),
        "hint": " Move over the curve, or use the arrow keys on it, to read an epoch." if single else "",
        "table": _table(runs),
        "watch": _watch(single) if single and single.epochs else "",
        "settings": "".join(_settings(run, named=not single) for run in runs),
        # Without "<", no text can contain "</script>" and end the element early.
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        "style": _resource("css"),
        "script": _resource("js"),
    }
    return Template(_resource("html")).substitute(parts)


def render_curve(run: RunView) -> str:
    """Return the loss curve of one run with its table, for another page."""
    # That page has no script for the cursor, so the caption explains the lines only.
    hint = "<figcaption>Validation solid, training dashed.</figcaption>"
    return f'<figure class="scroll">{_Chart([run]).svg()}{hint}</figure>{_table([run])}'


def _resource(kind: str) -> str:
    return (files("picogpt.export") / f"log_page.{kind}").read_text("utf-8")


def _status(runs: Sequence[RunView]) -> str:
    """Return the line below the title."""
    if len(runs) > 1:
        return f"{len(runs)} runs, by their loss logs."
    (run,) = runs
    log = run.log
    if not log.val:
        return "No epoch has ended yet."
    state = f"In training; this page reloads itself every {RELOAD_SECONDS} seconds." if run.in_training else "Not in training."
    best = f"best validation loss {log.best_loss:.4f} nats per character. " if log.best_loss else ""
    return f"{len(log.val)} epochs, {log.chars[-1]:,} characters in {format_seconds(log.seconds[-1])}; {best}{state}"


def _epoch_data(run: RunView) -> list[dict[str, str]]:
    """Return the data of the slider, one entry per epoch."""
    # A byte per probability is enough for shades, and keeps the page small.
    return [
        {
            "label": _epoch_label(run.log, number),
            "sample": view.sample,
            "probabilities": base64.b64encode(bytes(round(255 * p) for p in view.probabilities)).decode(),
        }
        # The last epoch of the log is the last view; earlier epochs may have none.
        for number, view in enumerate(run.epochs, start=len(run.log.val) - len(run.epochs) + 1)
    ]


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
        "the more probable the model found it; dotted lines mark those below 5 %.</p>\n"
        f'<p class="excerpt" id="excerpt" lang="">{html.escape(run.excerpt)}</p>\n'
        if run.excerpt
        else ""
    )
    return (
        '<section aria-labelledby="writes">\n<h2 id="writes">What it writes</h2>\n<div class="epoch">\n'
        f'<label for="epoch">Epoch</label><input type="range" id="epoch" min="0" max="{last}" value="{last}">\n'
        f'<output id="epoch-label" for="epoch" aria-live="polite">{label}</output>\n</div>\n'
        f'<pre id="sample" lang="">{html.escape(run.epochs[-1].sample)}</pre>\n{excerpt}</section>'
    )


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
    names = [*(["run"] if len(runs) > 1 else []), "epoch", "characters", "time", "train", "validation", "bits"]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        '<details><summary>All figures</summary><div class="scroll"><table><thead><tr>'
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
        # A diverged run may have infinite losses, which cannot be drawn; the rest of its curve can.
        losses = [loss for run in runs for loss in (*run.log.train, *run.log.val, *run.marks.values()) if math.isfinite(loss)]
        # At least 1: before the first epoch there is nothing to scale by.
        self._most = max([1, *(chars for run in runs for chars in run.log.chars)])
        low, high = min(losses, default=0.0), max(losses, default=1.0)
        margin = 0.06 * (high - low) or 0.1  # equal losses would give a range of 0
        self._low, self._high = low - margin, high + margin

    def _x(self, chars: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * chars / self._most

    def _y(self, loss: float) -> float:
        # SVG's y axis points down.
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (self._high - loss) / (self._high - self._low)

    def points(self, run: RunView) -> list[dict[str, float | str]]:
        """Return the x coordinate of each epoch and its text, for the cursor."""
        log = run.log
        return [
            {
                "x": round(self._x(chars), 1),
                "text": f"epoch {i}: {chars:,} characters in {format_seconds(seconds)}, train {train:.4f}, "
                f"validation {val:.4f} nats per character ({val / math.log(2):.4f} bits)",
            }
            for i, (chars, seconds, train, val) in enumerate(
                zip(log.chars, log.seconds, log.train, log.val, strict=True), start=1
            )
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
        marks = sorted(((name, value) for run in self._runs for name, value in run.marks.items()), key=lambda mark: -mark[1])
        for name, value in marks:
            y = self._y(value)
            label = max(y - 4, above + _LABEL_GAP)
            above = label
            yield f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{_WIDTH - _RIGHT - 4}" y="{label:.1f}" text-anchor="end">{html.escape(name)} {value:.2f}</text>'

    def _curves(self) -> Iterator[str]:
        for i, run in enumerate(self._runs):
            colour = _COLOURS[i % len(_COLOURS)]
            for kind, losses in (("train", run.log.train), ("val", run.log.val)):
                places = [
                    f"{self._x(chars):.1f},{self._y(loss):.1f}"
                    for chars, loss in zip(run.log.chars, losses, strict=True)
                    if math.isfinite(loss)
                ]
                if len(places) == 1:  # a line of one point is invisible
                    x, y = places[0].split(",")
                    yield f'<circle cx="{x}" cy="{y}" r="{4 if kind == "val" else 2}" style="fill: {colour}"/>'
                elif places:
                    yield f'<polyline class="curve {kind}" style="stroke: {colour}" points="{" ".join(places)}"/>'
            if len(self._runs) > 1 and run.log.val:
                label = f"{html.escape(run.name)} {run.log.val[-1]:.4f}"
                place = f'x="{_WIDTH - _RIGHT - 8}" y="{_TOP + 16 * (i + 1)}"'
                yield f'<text {place} text-anchor="end" style="fill: {colour}">{label}</text>'


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
