"""`picogpt-eval`: score a text with a trained model, with and without the context roll."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from picogpt.checks import ENGINE_DTYPES, check_threads
from picogpt.cli.common import check_picture, end_process, notice, run_command
from picogpt.cli.parser import Parser, add_model, add_setting
from picogpt.config import EvalConfig, TextRequest
from picogpt.threads import choose_threads
from picogpt.wording import format_seconds, plural

if TYPE_CHECKING:
    from picogpt.cli.bar import ProgressBar
    from picogpt.config import EngineDType
    from picogpt.data.articles import Ids
    from picogpt.evaluation.report import Report
    from picogpt.evaluation.scores import EvalSequences, Losses
    from picogpt.evaluation.texts import EvalText
    from picogpt.inference import Engine

__all__ = ["build_parser", "command", "main"]

# Not auto: a score depends on the type, so the user chooses it.
DTYPES = tuple(name for name in ENGINE_DTYPES if name != "auto")


def build_parser() -> Parser:
    """Return the parser of the command."""
    defaults = EvalConfig()
    parser = Parser(
        "picogpt-eval",
        "Score a text with a trained model, in nats and bits per character: with its\n"
        "context vectors, with zeroed ones, with those of another article, and in\n"
        "overlapping windows without a roll; next to compressors and a character n-gram.",
        "Prints a table and saves a plot next to the model (docs/evaluation.md).",
    )
    add_model(parser)
    group = parser.add_argument_group("text (default: the run's validation text)")
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
    meaning = "characters to score at most, evenly spaced over the text (default: %(default)s)"
    add_setting(group, "--chars", default=defaults.chars, meaning=meaning)
    group.add_argument(
        "--ngram-text",
        metavar="PATH",
        nargs="+",
        default=[],
        help="training text of the n-gram (default: the run's, if it is on this machine, or the stream of --dataset)",
    )
    add_setting(group, "--windows", default=defaults.windows, meaning="windows in a sequence (default: %(default)s)")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--dtype",
        metavar="TYPE",
        choices=DTYPES,
        default="float32",
        help=f"type of the weights: {', '.join(DTYPES)}; the loss by rounding is measured too (default: float32)",
    )
    add_setting(machine, "--threads", meaning="threads; scores do not depend on their number (default: one per core)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="file of the plot, .jpg or .png (default: eval.jpg next to the model)"
    )
    output.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    return parser


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
    from picogpt.files import atomic_write
    from picogpt.runs.find import find_model

    path, chosen = find_model(arguments.model, arguments.logs_dir)
    notice(chosen)  # without --model, the choice was ours
    report = _score(arguments, path, config)
    output = arguments.output or path.with_name("eval.jpg")
    # The table before the plot: it is out even if the plot cannot be written.
    print(json.dumps({**report.to_json(), "picture": str(output)}) if arguments.json else report.table(), flush=True)
    from picogpt.plot import draw_scores

    atomic_write(output, draw_scores(report.scores, report.title(), suffix=output.suffix))
    notice(f"picture: {output}")
    return 0


def _score(arguments: argparse.Namespace, path: Path, config: EvalConfig) -> Report:
    """Find the text, score it, and compute the baselines on the same characters."""
    from picogpt.cli.bar import DownloadBar
    from picogpt.data.resolve import Console
    from picogpt.evaluation.baselines import compressed_bits
    from picogpt.evaluation.evaluate import chars_to_read, evaluate, evaluate_as_is
    from picogpt.evaluation.report import Report
    from picogpt.evaluation.scores import Scores, cut_sequences
    from picogpt.evaluation.texts import TrainedRun, find_eval_text, find_ngram_text

    engine = _load_engine(path, arguments.threads, arguments.dtype)
    trained, console = TrainedRun.of_model(path), Console(notice, DownloadBar)
    sequence_len = config.windows * engine.config.context_len  # T
    text = find_eval_text(
        trained,
        TextRequest(paths=tuple(arguments.text), dataset=arguments.dataset, column=arguments.text_column),
        sequence_len=sequence_len,
        chars=config.chars,
        console=console,
    )
    sequences = cut_sequences(text.articles, sequence_len, config.chars)
    _announce(text, sequences)
    # Found before the long part of the work, so that a wrong path is reported at once.
    ngram_text = find_ngram_text(trained, text, arguments.ngram_text, console)
    with _progress(chars_to_read(sequences, engine.config.context_len)) as bar:
        losses = evaluate(engine, sequences, advance=bar.advance)
    if engine.dtype != "float32":
        # Measured on the same characters, so the difference is the cost of rounding the weights.
        notice("scoring with the context vector as it is again, in float32")
        reference = _load_engine(path, arguments.threads, "float32")
        with _progress(sequences.n_chars) as bar:
            losses["float32"] = evaluate_as_is(reference, sequences, advance=bar.advance)
    ngram, ngram_losses = _count_ngram(ngram_text, sequences)
    notice(ngram)
    # Baselines see the same characters, so that their differences to the model are paired.
    if ngram_losses is not None:
        losses["ngram"] = ngram_losses.reshape(losses["as_is"].shape)  # (R, T) -> (R, W, n)
    return Report(
        model=str(path),
        text=text.name,
        part=text.description,
        unit=text.unit,
        dtype=engine.dtype,
        scores=Scores(losses, sequences.article_of),
        compressors=compressed_bits(sequences.ids[:, 1:].reshape(-1)),  # (R x T,), the scored characters
        ngram=ngram,
    )


def _load_engine(path: Path, threads: int | None, dtype: EngineDType) -> Engine:
    """Load the inference engine; print its type and threads."""
    from picogpt.inference import Engine

    chosen = choose_threads(threads)
    engine = Engine.load(path, threads=chosen.count, dtype=dtype, notify=notice)
    notice(f"computing in {engine.dtype} with {plural(chosen.count, 'thread')} ({chosen.reason})")
    return engine


def _count_ngram(text: tuple[str, Ids] | str, sequences: EvalSequences) -> tuple[str, Losses | None]:
    """Return a line about the n-gram and its losses (R, T), given a text's name and ids; or, given a reason, None for losses."""
    from picogpt.evaluation.baselines import NGRAM_CHARS, NGram

    if isinstance(text, str):  # the reason why there is no text
        return f"no n-gram: {text}", None
    name, ids = text
    counted = NGram(ids)
    # A long text is counted in part only, which has to be said next to the score.
    cap = f", the first {NGRAM_CHARS:,} of {len(ids):,}" if len(ids) > NGRAM_CHARS else ""
    return f"n-gram counted on {name}: {counted.n_chars:,} characters{cap}", counted.losses(sequences.ids)


def _announce(text: EvalText, sequences: EvalSequences) -> None:
    """Print the source and the amount of text that is scored."""
    R, T = len(sequences.ids), sequences.ids.shape[1] - 1  # the last character is only a target
    # Standard errors are over articles; a text without articles is cut into stretches of the same role.
    why = "" if text.unit == "articles" else "; the text has no articles, so it is cut into stretches"
    notice(
        f"{text.name}, {text.description}: {R:,} sequences of {T:,} characters from {sequences.n_articles:,} of "
        f"{len(text.articles):,} {text.unit}, {sequences.n_chars:,} characters{why}"
    )


def _progress(total: int) -> ProgressBar:
    """Return a bar for `total` characters to score."""
    from picogpt.cli.bar import ProgressBar

    # At least one call has been scored when a line is printed, so the rate is not 0.
    def describe(done: int, seconds: float) -> str:
        rate = done / seconds
        return f"{done / total:.0%} read, {rate:,.0f} characters/s, {format_seconds((total - done) / rate)} left"

    return ProgressBar(total, "char", describe=describe)


if __name__ == "__main__":
    command()
