"""`picogpt-plot`: draw the loss curves of one or several runs, as a picture or as a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from picogpt.checks import X_AXES, check_choice, check_page, check_picture
from picogpt.cli.common import run_command
from picogpt.cli.parser import Parser
from picogpt.config import LOGS_DIR
from picogpt.errors import ConfigError

if TYPE_CHECKING:
    from picogpt.runs.loss_log import LossLog

__all__ = ["build_parser", "main"]


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "picogpt-plot",
        "Draw the loss curve of a run, or of several runs in one plot, as JPG or PNG,\n"
        "or as an HTML page with their samples. Prints the path of the plot.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's name, its folder, or a log.pkl")
    parser.add_argument("--logs-dir", metavar="DIR", type=Path, default=LOGS_DIR, help="folder of all runs (default: logs)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="file of the plot, .jpg or .png (default: log.jpg in the run's folder, or compare.jpg in the logs folder; "
        "wikipedia-log.jpg for a bundled model)",
    )
    output.add_argument(
        "--html",
        metavar="FILE",
        type=Path,
        help="write a page instead: of one run what training writes as log.html, of several runs a comparison (default: none)",
    )
    # No choices=: `check_choice` gives the message that all commands have.
    parser.add_argument(
        "--x",
        metavar="NAME",
        help="unit of the x axis: epochs, characters or seconds (default: epochs for one run, characters for several)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command on `argv` (None: the process's own arguments) and return its exit code."""
    return run_command(_plot, build_parser(), argv)


def _plot(arguments: argparse.Namespace) -> int:
    check_picture(arguments.output)
    x = check_choice("x", arguments.x, X_AXES)
    if arguments.html:
        check_page(arguments.html, "html")
        if x is not None:
            raise ConfigError("x is for a picture, as the page counts characters; leave it out with --html", "x")
    # Imported after the checks: numpy and matplotlib load slowly, and a wrong flag should answer at once.
    from picogpt.files import atomic_write
    from picogpt.runs.find import find_log, picture_path
    from picogpt.runs.loss_log import read_log
    from picogpt.runs.names import PLOT_FILE

    # All logs are found before the first is read: a mistyped last name is reported at once.
    paths = {run: find_log(run, arguments.logs_dir) for run in arguments.runs}
    logs = {run: read_log(path) for run, path in paths.items()}
    if arguments.html:
        atomic_write(arguments.html, _render(paths, logs).encode("utf-8", "replace"))
        print(arguments.html)
        return 0
    # Later still: a missing run is reported before matplotlib is loaded.
    from picogpt.plot import draw_losses

    # One run's plot belongs to the run, a comparison to none of them.
    default = picture_path(next(iter(paths.values())), PLOT_FILE) if len(logs) == 1 else arguments.logs_dir / "compare.jpg"
    output = arguments.output or default
    atomic_write(output, draw_losses(logs, x=x, suffix=output.suffix))
    print(output)  # the only output, so that it can be passed to another command
    return 0


def _render(paths: Mapping[str, Path], logs: Mapping[str, LossLog]) -> str:
    """Return the page of the runs; see `picogpt.export.log_page`."""
    from picogpt.export.log_page import render_page
    from picogpt.training.history import run_view

    # Several runs by the names that the user gave, which differ where those of the folders may not.
    names = {name: name if len(paths) > 1 else path.resolve().parent.name for name, path in paths.items()}
    return render_page([run_view(names[name], path.parent, logs[name]) for name, path in paths.items()])


if __name__ == "__main__":
    sys.exit(main())
