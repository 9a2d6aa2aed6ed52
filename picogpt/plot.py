"""Pictures of a run. The only module that imports matplotlib, and only to draw into memory."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping

os.environ["MPLBACKEND"] = "agg"  # matplotlib refuses to be imported under a name it does not know

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from picogpt.run import LossLog

__all__ = ["draw_losses"]

_INCHES = (8.0, 5.0)
_DPI = 160  # 1280 x 800 pixels, with letters that stay readable at half of it
_MOST_MARKED = 40
"""Epochs up to which each one is marked by a point."""


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
    picture = io.BytesIO()
    figure.savefig(picture, format="jpg", pil_kwargs={"quality": 90})
    return picture.getvalue()


def _draw_run(axes: Axes, name: str, log: LossLog, *, colour: str, by_epoch: bool) -> None:
    x = list(range(1, len(log.val) + 1)) if by_epoch else [chars / 1e6 for chars in log.chars]
    marker = "o" if len(x) <= _MOST_MARKED else ""
    prefix = "" if by_epoch else f"{name}: "
    best = "" if log.best_loss is None else f", best {log.best_loss:.3f}"
    axes.plot(x, log.train, color=colour, linestyle="--", linewidth=1.8, label=f"{prefix}train")
    axes.plot(x, log.val, color=colour, linewidth=2.2, marker=marker, markersize=4, label=f"{prefix}val{best}")


def _label(axes: Axes, *, by_epoch: bool, title: str) -> None:
    axes.set_title(title, fontsize=15)
    axes.set_xlabel("epoch" if by_epoch else "characters trained on (millions)", fontsize=14)
    axes.set_ylabel("loss (nats per character)", fontsize=14)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    if by_epoch:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    bits = axes.secondary_yaxis("right", functions=(_to_bits, _to_nats))
    bits.set_ylabel("bits per character", fontsize=14)
    bits.tick_params(labelsize=12)
    axes.legend(fontsize=13)


def _to_bits(nats: npt.ArrayLike) -> npt.ArrayLike:
    return np.asarray(nats) / math.log(2)


def _to_nats(bits: npt.ArrayLike) -> npt.ArrayLike:
    return np.asarray(bits) * math.log(2)
