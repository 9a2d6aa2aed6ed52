"""Plots of losses and scores, drawn into memory. The only module that imports matplotlib."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from picogpt.checks import X_AXES
from picogpt.evaluation.scores import CONDITIONS, Estimate, Scores, position_bins
from picogpt.runs.loss_log import LossLog


def _has_config_folder() -> bool:
    """Return whether matplotlib can write to the folders of its settings and its font cache."""
    # The same search as matplotlib's own, which prints warnings of several lines if it fails.
    try:
        home = Path.home()
        if "MPLCONFIGDIR" in os.environ:
            folders = [Path(os.environ["MPLCONFIGDIR"])]
        elif sys.platform.startswith(("linux", "freebsd")):
            names = {"XDG_CONFIG_HOME": ".config", "XDG_CACHE_HOME": ".cache"}
            folders = [Path(os.environ.get(variable) or home / name) / "matplotlib" for variable, name in names.items()]
        else:
            folders = [home / ".matplotlib"]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return False
    return all(os.access(folder, os.W_OK) for folder in folders)


@contextlib.contextmanager
def _config_folder() -> Iterator[None]:
    """Give matplotlib a temporary config folder during its import if it has none."""
    # Matplotlib would create one itself and remove it at exit, which `os._exit` skips.
    with contextlib.ExitStack() as stack:
        before = os.environ.get("MPLCONFIGDIR")
        if not _has_config_folder():
            os.environ["MPLCONFIGDIR"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="picogpt-matplotlib-"))
        yield
        if before is not None:
            os.environ["MPLCONFIGDIR"] = before
        else:
            os.environ.pop("MPLCONFIGDIR", None)


# Draws into memory and needs no display. An unknown backend in the environment would make the import fail.
os.environ["MPLBACKEND"] = "agg"
with _config_folder():
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

__all__ = ["draw_losses", "draw_scores"]

_INCHES = (8.0, 5.0)
_DPI = 160  # 1280 x 800 pixels; the text stays readable at half that size
_AXES = (0.1, 0.12, 0.8, 0.8)  # left, bottom, width and height in the figure, without a legend below
_MOST_INSIDE = 2  # up to this number of runs the legend is inside the axes, else below them
_LEGEND_ROW_INCHES = 0.27
_LEGEND_LETTERS = 84  # letters that fit into a row of the legend
_MOST_MARKED = 40  # up to this number of epochs each one has a marker

_SCORES_INCHES = (12.0, 8.5)
_SCORES_DPI = 120  # 1440 x 1020 pixels
_BINS_PER_OCTAVE = 2  # positions in the window, on a logarithmic axis
_LINEAR_NATS = 0.01  # the axis of differences is linear up to this value
_DIFFERENCE_TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_MARKERS: Mapping[str, str] = {"as_is": "o", "zeroed": "s", "other": "^", "sliding": "D"}


def draw_losses(logs: Mapping[str, LossLog], *, x: str | None = None, suffix: str = ".jpg") -> bytes:
    """Plot the losses of one or several runs: training dashed, validation solid.

    Args:
        logs: the runs' logs, by name.
        x: unit of the x axis, one of `X_AXES`; None takes epochs for one run, and characters for several.
        suffix: `.png` for a PNG, anything else for a JPG.

    Returns:
        The content of the image file.
    """
    # Epochs of different runs have different lengths; characters can be compared.
    x = x or ("epochs" if len(logs) == 1 else "characters")
    labels = [_label_of(name, log, alone=len(logs) == 1) for name, log in logs.items()]
    # A legend below the axes: as many columns as the longest label allows, and a figure that is higher by its rows.
    columns = max(1, min(4, _LEGEND_LETTERS // (max(map(len, labels), default=0) + 6)))
    rows = 0 if len(logs) <= _MOST_INSIDE else math.ceil((len(logs) + 2) / columns)
    # A legend below the axes needs a layout that knows its size. All else has fixed margins: at each end of an epoch a picture is
    # drawn, and finding margins for it would double the time.
    size = (_INCHES[0], _INCHES[1] + rows * _LEGEND_ROW_INCHES)
    figure = Figure(size, dpi=_DPI, layout="constrained" if rows else None)
    FigureCanvasAgg(figure)  # without pyplot, whose figures stay in memory until they are closed
    axes = figure.add_subplot() if rows else figure.add_axes(_AXES)
    colours = colormaps["tab10" if len(logs) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    drawn = [_draw_run(axes, log, colours[i % len(colours)], x) for i, log in enumerate(logs.values())]
    _label(axes, x, title=_title(logs))
    # The legend explains the line styles once, then the colour of each run; a single run has its own labels.
    styles = [Line2D([], [], color="0.3", linestyle="--"), Line2D([], [], color="0.3")]
    lines, texts = [*styles, *drawn], ["train", "val", *labels]
    if len(logs) == 1:
        lines, texts = [axes.lines[0], *drawn], ["train", *labels]
    legend = (
        figure.legend(lines, [""] * len(lines), loc="outside lower center", ncols=columns, fontsize=11)
        if rows
        else axes.legend(lines, [""] * len(lines), fontsize=13)
    )
    # Labels are set afterwards: matplotlib leaves out entries whose label begins with an underscore.
    for entry, text in zip(legend.get_texts(), texts, strict=True):
        entry.set_text(text)
    return _picture(figure, suffix)


def _title(names: Sequence[str] | Mapping[str, LossLog]) -> str:
    joined = " and ".join(names)
    return joined if len(names) == 1 or (len(names) <= 3 and len(joined) <= 60) else f"{len(names)} runs"


def _label_of(name: str, log: LossLog, *, alone: bool) -> str:
    best = "" if log.best_loss is None else f", best {log.best_loss:.3f}"
    return f"val{best}" if alone else f"{_plain(name)}{best}"


def _plain(name: str) -> str:
    """Escape a name for matplotlib, which draws text between two dollars as a formula and rejects surrogates."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("$", r"\$")


def _picture(figure: Figure, suffix: str) -> bytes:
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a letter without a glyph is drawn as a box
        if suffix.lower() == ".png":
            figure.savefig(picture, format="png")
        else:
            figure.savefig(picture, format="jpg", pil_kwargs={"quality": 90})
    return picture.getvalue()


def _draw_run(axes: Axes, log: LossLog, colour: tuple[float, ...], x: str) -> Line2D:
    """Plot both losses of a run; return the line of the validation loss, for the legend."""
    places = {"epochs": range(1, len(log.val) + 1), "characters": [chars / 1e6 for chars in log.chars], "seconds": log.seconds}[x]
    marker = "o" if len(log.val) <= _MOST_MARKED else ""
    axes.plot(places, log.train, color=colour, linestyle="--", linewidth=1.8)
    (line,) = axes.plot(places, log.val, color=colour, linewidth=2.2, marker=marker, markersize=4)
    return line


def _label(axes: Axes, x: str, title: str) -> None:
    axes.set_title(_plain(title), fontsize=15)
    axes.set_xlabel(X_AXES[x], fontsize=14)
    axes.set_ylabel("loss (nats per character)", fontsize=14)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    if x == "epochs":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _show_bits(axes)


def _show_bits(axes: Axes) -> None:
    bits = axes.secondary_yaxis("right", functions=(_to_bits, _to_nats))
    bits.set_ylabel("bits per character", fontsize=14)
    bits.tick_params(labelsize=12)


def _to_bits(nats: npt.ArrayLike) -> npt.ArrayLike:
    return np.asarray(nats) / math.log(2)


def _to_nats(bits: npt.ArrayLike) -> npt.ArrayLike:
    return np.asarray(bits) * math.log(2)


def draw_scores(scores: Scores, title: str, *, suffix: str = ".jpg") -> bytes:
    """Plot the loss under each condition, by window of the sequence and by position in the window.

    The upper row shows the losses, with the standard error over articles of the first condition. The lower row shows the
    differences to that condition, paired by character, with their standard errors.

    Args:
        scores: the losses.
        title: title of the figure.
        suffix: `.png` for a PNG, anything else for a JPG.

    Returns:
        The content of the image file.
    """
    figure = Figure(figsize=_SCORES_INCHES, dpi=_SCORES_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    losses, differences = figure.subplots(2, 2, sharex="col", height_ratios=(3, 2))
    _, windows, context_len = scores.losses["as_is"].shape
    bins = position_bins(context_len, _BINS_PER_OCTAVE)
    numbers = np.arange(windows, dtype=np.float64)
    # A bin of positions is drawn at its geometric mean, the middle on a logarithmic axis.
    middles = np.array([math.sqrt(first * last) for first, last in bins])
    for i, name in enumerate(CONDITIONS):
        _draw_losses(losses[0], numbers, scores.by_window(name), i)
        _draw_losses(losses[1], middles, scores.by_position(name, bins), i)
        if name != "as_is":
            # Shifted sideways, so that the error bars do not hide each other.
            _draw_differences(differences[0], numbers + (i - 2) / 8, scores.by_window(name, minus="as_is"), i)
            _draw_differences(differences[1], middles * 2 ** ((i - 2) / 12), scores.by_position(name, bins, minus="as_is"), i)
    _label_scores(losses, differences, context_len)
    figure.suptitle(_plain(title), fontsize=15)
    return _picture(figure, suffix)


def _draw_losses(axes: Axes, x: npt.NDArray[np.float64], estimates: Sequence[Estimate], condition: int) -> None:
    values, errors = _columns(estimates)
    name, label = list(CONDITIONS.items())[condition]
    # The first condition is drawn on top, as the lines are close together.
    order = 10 - condition
    axes.plot(x, values, color=f"C{condition}", marker=_MARKERS[name], markersize=5, linewidth=1.8, label=label, zorder=order)
    if name == "as_is":
        axes.fill_between(x, values - errors, values + errors, color=f"C{condition}", alpha=0.15, linewidth=0)


def _draw_differences(axes: Axes, x: npt.NDArray[np.float64], estimates: Sequence[Estimate], condition: int) -> None:
    values, errors = _columns(estimates)
    marker = _MARKERS[list(CONDITIONS)[condition]]
    axes.errorbar(x, values, yerr=errors, color=f"C{condition}", marker=marker, markersize=5, linewidth=1.2, capsize=2)


def _columns(estimates: Sequence[Estimate]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the means and the standard errors."""
    return np.array([estimate.nats for estimate in estimates]), np.array([estimate.error for estimate in estimates])


def _label_scores(losses: Sequence[Axes], differences: Sequence[Axes], context_len: int) -> None:
    for axes in (*losses, *differences):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=12)
    for axes in losses:
        _show_bits(axes)
    for axes in differences:
        axes.axhline(0, color="C0", linewidth=1.8)
        # Linear around zero, logarithmic beyond: the conditions differ by hundredths of a nat here and by halves there.
        axes.set_yscale("symlog", linthresh=_LINEAR_NATS)
        axes.yaxis.set_major_locator(FixedLocator([0, *(sign * tick for sign in (-1, 1) for tick in _DIFFERENCE_TICKS)]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda nats, _: f"{nats:+g}" if nats else "0"))
    losses[0].set_ylabel("loss (nats per character)", fontsize=14)
    differences[0].set_ylabel("difference to the first condition\n(nats per character)", fontsize=14)
    # Right column: positions double from tick to tick.
    losses[1].legend(fontsize=12)
    differences[0].set_xlabel("window of the sequence", fontsize=14)
    differences[0].xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    differences[1].set_xlabel("characters of the window seen, from window 1 on", fontsize=14)
    differences[1].set_xscale("log", base=2)
    ticks = [2**i for i in range(context_len.bit_length())]
    differences[1].set_xticks(ticks, labels=[str(tick) for tick in ticks])
    differences[1].xaxis.set_minor_locator(NullLocator())
