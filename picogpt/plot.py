"""Pictures of a run. The only module that imports matplotlib, and only to draw into memory."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence

os.environ["MPLBACKEND"] = "agg"  # matplotlib refuses to be imported under a name it does not know

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from picogpt.run import LossLog
from picogpt.scores import CONDITIONS, Estimate, Scores, position_bins

__all__ = ["draw_losses", "draw_scores"]

_INCHES = (8.0, 5.0)
_DPI = 160  # 1280 x 800 pixels, with letters that stay readable at half of it
_MOST_MARKED = 40
"""Epochs up to which each one is marked by a point."""

_SCORES_INCHES = (12.0, 8.5)
_SCORES_DPI = 120  # 1440 x 1020 pixels
_BINS_PER_OCTAVE = 2
_LINEAR_NATS = 0.01
"""Differences up to which their axis is linear."""
_DIFFERENCE_TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_MARKERS: Mapping[str, str] = {"as_is": "o", "zeroed": "s", "other": "^", "sliding": "D"}


def draw_losses(logs: Mapping[str, LossLog]) -> bytes:
    """Draw the losses of one run or several, by their names: training dashed, validation solid.

    One run is drawn over its epochs, several over the characters they were trained on, which is what they share.

    Returns:
        The picture as a JPG.
    """
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    by_epoch = len(logs) == 1
    for i, (name, log) in enumerate(logs.items()):
        _draw_run(axes, name, log, colour=f"C{i}", by_epoch=by_epoch)
    _label(axes, by_epoch=by_epoch, title=" and ".join(logs) if len(logs) <= 3 else f"{len(logs)} runs")
    return _jpg(figure)


def _plain(name: str) -> str:
    """`name` for a picture: what stands between two dollars would be drawn as a formula."""
    return name.replace("$", r"\$")


def _jpg(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="jpg", pil_kwargs={"quality": 90})
    return picture.getvalue()


def _draw_run(axes: Axes, name: str, log: LossLog, *, colour: str, by_epoch: bool) -> None:
    x = list(range(1, len(log.val) + 1)) if by_epoch else [chars / 1e6 for chars in log.chars]
    marker = "o" if len(x) <= _MOST_MARKED else ""
    prefix = "" if by_epoch else f"{_plain(name)}: "
    best = "" if log.best_loss is None else f", best {log.best_loss:.3f}"
    axes.plot(x, log.train, color=colour, linestyle="--", linewidth=1.8, label=f"{prefix}train")
    axes.plot(x, log.val, color=colour, linewidth=2.2, marker=marker, markersize=4, label=f"{prefix}val{best}")


def _label(axes: Axes, *, by_epoch: bool, title: str) -> None:
    axes.set_title(_plain(title), fontsize=15)
    axes.set_xlabel("epoch" if by_epoch else "characters trained on (millions)", fontsize=14)
    axes.set_ylabel("loss (nats per character)", fontsize=14)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    if by_epoch:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _show_bits(axes)
    axes.legend(fontsize=13)


def _show_bits(axes: Axes) -> None:
    bits = axes.secondary_yaxis("right", functions=(_to_bits, _to_nats))
    bits.set_ylabel("bits per character", fontsize=14)
    bits.tick_params(labelsize=12)


def _to_bits(nats: npt.ArrayLike) -> npt.ArrayLike:
    return np.asarray(nats) / math.log(2)


def _to_nats(bits: npt.ArrayLike) -> npt.ArrayLike:
    return np.asarray(bits) * math.log(2)


def draw_scores(scores: Scores, title: str) -> bytes:
    """Draw the loss under each condition, by window of the roll and by position in the window.

    Above the losses, with the standard error over articles of the roll as it is; below how much more each other condition
    costs, paired by character, with its own.

    Returns:
        The picture as a JPG.
    """
    figure = Figure(figsize=_SCORES_INCHES, dpi=_SCORES_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    losses, differences = figure.subplots(2, 2, sharex="col", height_ratios=(3, 2))
    _, windows, context_len = scores.losses["as_is"].shape
    bins = position_bins(context_len, _BINS_PER_OCTAVE)
    numbers = np.arange(windows, dtype=np.float64)
    middles = np.array([math.sqrt(first * last) for first, last in bins])
    for i, name in enumerate(CONDITIONS):
        _draw_losses(losses[0], numbers, scores.by_window(name), i)
        _draw_losses(losses[1], middles, scores.by_position(name, bins), i)
        if name != "as_is":
            # Side by side, or the bars would hide each other.
            _draw_differences(differences[0], numbers + (i - 2) / 8, scores.by_window(name, minus="as_is"), i)
            _draw_differences(differences[1], middles * 2 ** ((i - 2) / 12), scores.by_position(name, bins, minus="as_is"), i)
    _label_scores(losses, differences, context_len)
    figure.suptitle(_plain(title), fontsize=15)
    return _jpg(figure)


def _draw_losses(axes: Axes, x: npt.NDArray[np.float64], estimates: Sequence[Estimate], condition: int) -> None:
    values, errors = _columns(estimates)
    name, label = list(CONDITIONS.items())[condition]
    # What comes first is drawn last, above the others, which lie close to it.
    order = 10 - condition
    axes.plot(x, values, color=f"C{condition}", marker=_MARKERS[name], markersize=5, linewidth=1.8, label=label, zorder=order)
    if name == "as_is":
        axes.fill_between(x, values - errors, values + errors, color=f"C{condition}", alpha=0.15, linewidth=0)


def _draw_differences(axes: Axes, x: npt.NDArray[np.float64], estimates: Sequence[Estimate], condition: int) -> None:
    values, errors = _columns(estimates)
    marker = _MARKERS[list(CONDITIONS)[condition]]
    axes.errorbar(x, values, yerr=errors, color=f"C{condition}", marker=marker, markersize=5, linewidth=1.2, capsize=2)


def _columns(estimates: Sequence[Estimate]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Means and standard errors."""
    return np.array([estimate.nats for estimate in estimates]), np.array([estimate.error for estimate in estimates])


def _label_scores(losses: Sequence[Axes], differences: Sequence[Axes], context_len: int) -> None:
    for axes in (*losses, *differences):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=12)
    for axes in losses:
        _show_bits(axes)
    for axes in differences:
        axes.axhline(0, color="C0", linewidth=1.8)
        # Linear around nothing, logarithmic beyond: the conditions differ by hundredths here and by halves there.
        axes.set_yscale("symlog", linthresh=_LINEAR_NATS)
        axes.yaxis.set_major_locator(FixedLocator([0, *(sign * tick for sign in (-1, 1) for tick in _DIFFERENCE_TICKS)]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda nats, _: f"{nats:+g}" if nats else "0"))
    losses[0].set_ylabel("loss (nats per character)", fontsize=14)
    differences[0].set_ylabel("more than with the roll\n(nats per character)", fontsize=14)
    losses[1].legend(fontsize=12)
    differences[0].set_xlabel("window of the roll", fontsize=14)
    differences[0].xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    differences[1].set_xlabel("characters of the window seen, from window 1 on", fontsize=14)
    differences[1].set_xscale("log", base=2)
    ticks = [2**i for i in range(context_len.bit_length())]
    differences[1].set_xticks(ticks, labels=[str(tick) for tick in ticks])
    differences[1].xaxis.set_minor_locator(NullLocator())
