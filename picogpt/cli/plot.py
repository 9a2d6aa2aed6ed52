"""`picogpt-plot`: draw the loss curves of one or several runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from picogpt.checks import X_AXES, check_choice
from picogpt.cli.common import check_picture, run_command
from picogpt.cli.parser import Parser
from picogpt.config import LOGS_DIR

__all__ = ["build_parser", "main"]


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "picogpt-plot",
        "Draw the loss curve of a run, or of several runs in one plot, as JPG or PNG.\nPrints the path of the plot.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's name, its folder, or a log.pkl")
    parser.add_argument("--logs-dir", metavar="DIR", type=Path, default=LOGS_DIR, help="folder of all runs (default: logs)")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="file of the plot, .jpg or .png (default: log.jpg in the run's folder, or compare.jpg in the logs folder; "
        "wikipedia-log.jpg for a wheel's model)",
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
    # Imported after the checks: numpy and matplotlib load slowly, and a wrong flag should answer at once.
    from picogpt.files import atomic_write
    from picogpt.runs.find import find_log, picture_path
    from picogpt.runs.folder import read_log

    # All logs are found before the first is read: a mistyped last name is reported at once.
    paths = {run: find_log(run, arguments.logs_dir) for run in arguments.runs}
    logs = {run: read_log(path) for run, path in paths.items()}
    # Later still: a missing run is reported before matplotlib is loaded.
    from picogpt.plot import draw_losses

    # One run's plot belongs to the run, a comparison to none of them.
    default = picture_path(next(iter(paths.values())), "log.jpg") if len(logs) == 1 else arguments.logs_dir / "compare.jpg"
    output = arguments.output or default
    atomic_write(output, draw_losses(logs, x=x, suffix=output.suffix))
    print(output)  # the only output, so that it can be passed to another command
    return 0


if __name__ == "__main__":
    sys.exit(main())
