"""`picogpt-eval`: score a text with a trained model, with and without the context roll."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from picogpt.checks import ENGINE_DTYPES, check_picture, check_threads
from picogpt.cli.common import end_process, notice, run_command
from picogpt.cli.parser import Parser, add_model, add_setting
from picogpt.config import EvalConfig, TextRequest
from picogpt.signals import deferred_interrupt
from picogpt.wording import format_seconds

__all__ = ["build_parser", "command", "main"]

# Not auto: a score depends on the type, so the user chooses it.
DTYPES = tuple(name for name in ENGINE_DTYPES if name != "auto")


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "picogpt-eval",
        "Score a text with a trained model, in nats and bits per character: with its\n"
        "context vectors, with zeroed ones, with those of another article, and in\n"
        "overlapping windows without a roll; next to compressors and a character n-gram.",
        "Prints a table and saves a plot next to the model (docs/evaluation.md).",
    )
    add_model(parser)
    _add_text(parser)
    _add_machine(parser)
    _add_output(parser)
    return parser


def _add_text(parser: Parser) -> None:
    defaults = EvalConfig()
    group = parser.add_argument_group("text (default: the run's validation text)")
    # One text: several would need several reports.
    text = group.add_mutually_exclusive_group()
    text.add_argument(
        "--dataset",
        metavar="NAME",
        help="a data set as in picogpt-train: all of a text, or a stream's validation articles (default: the run's)",
    )
    text.add_argument(
        "--text",
        metavar="PATH",
        nargs="+",
        default=[],
        help="files, folders of .txt and .md, or - for stdin: all of it (default: none)",
    )
    group.add_argument("--text-column", metavar="NAME", help="text column of a streamed data set (default: text)")
    meaning = "characters to score at most, evenly spaced over the text; two sequences at least (default: %(default)s)"
    add_setting(group, "--chars", default=defaults.chars, meaning=meaning)
    group.add_argument(
        "--ngram-text",
        metavar="PATH",
        nargs="+",
        default=[],
        help="training text of the n-gram (default: the run's, if it is on this machine, or the stream of --dataset)",
    )
    add_setting(group, "--windows", default=defaults.windows, meaning="windows in a sequence (default: %(default)s)")


def _add_machine(parser: Parser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--dtype",
        metavar="TYPE",
        choices=DTYPES,
        default="float32",
        help=f"type of the weights: {', '.join(DTYPES)}; with the last two the text is also scored in float32, which shows what "
        "rounding costs (default: float32)",
    )
    add_setting(machine, "--threads", meaning="threads; scores do not depend on their number (default: one per core)")


def _add_output(parser: Parser) -> None:
    # Results: the table or JSON on stdout, and a plot.
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="file of the plot, .jpg or .png (default: eval.jpg next to the model; wikipedia-eval.jpg for a bundled model)",
    )
    output.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")


def main(argv: list[str] | None = None) -> int:
    """Run the command on `argv` (None: the process's own arguments) and return its exit code."""
    return run_command(_evaluate, build_parser(), argv)


def command() -> NoReturn:
    """Run `picogpt-eval` as a process."""
    end_process(main())


def _evaluate(arguments: argparse.Namespace) -> int:
    # Validate before the work starts.
    config = EvalConfig(chars=arguments.chars, windows=arguments.windows)
    check_threads(arguments.threads)
    check_picture(arguments.output)
    # Imported after the checks, so that a wrong flag answers at once.
    with deferred_interrupt():
        from picogpt.cli.bar import DownloadBar
        from picogpt.data.resolve import Console
        from picogpt.evaluation.run import Evaluation
        from picogpt.files import atomic_write
        from picogpt.runs.find import find_model, picture_path

    path, chosen = find_model(arguments.model, arguments.logs_dir)
    notice(chosen)  # without --model, the choice was ours
    # Everything from here to the report is the same for a caller in Python.
    report = Evaluation(
        path=path,
        text=TextRequest(paths=tuple(arguments.text), dataset=arguments.dataset, column=arguments.text_column),
        ngram_paths=arguments.ngram_text,
        config=config,
        dtype=arguments.dtype,
        threads=arguments.threads,
        console=Console(notice, DownloadBar),
        progress=_progress,
    ).report()
    output = arguments.output or picture_path(path, "eval.jpg")
    # The table before the plot: it is out even if the plot cannot be written.
    print(json.dumps({**report.to_json(), "picture": str(output)}) if arguments.json else report.table(), flush=True)
    from picogpt.plot import draw_scores

    atomic_write(output, draw_scores(report.scores, report.title(), suffix=output.suffix))
    notice(f"picture: {output}")
    return 0


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of scoring `total` characters; yield a function that takes the number of characters read."""
    from picogpt.cli.bar import ProgressBar

    # At least one call has been scored when a line is printed, so the rate is not 0.
    def describe(done: int, seconds: float) -> str:
        rate = done / seconds
        return f"{done / total:.0%} read, {rate:,.0f} characters/s, {format_seconds((total - done) / rate)} left"

    with ProgressBar(total, "char", describe=describe) as bar:
        yield bar.advance


if __name__ == "__main__":
    command()
