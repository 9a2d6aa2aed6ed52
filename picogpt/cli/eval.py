"""`picogpt-eval`: what a character costs a trained model, and what the context roll buys it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from picogpt.checks import ENGINE_DTYPES, check_threads
from picogpt.cli.common import check_picture, end_process, notice, run_command
from picogpt.cli.parser import Parser, add_model, count
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

DTYPES = tuple(name for name in ENGINE_DTYPES if name != "auto")


def build_parser() -> Parser:
    """The parser."""
    defaults = EvalConfig()
    parser = Parser(
        "picogpt-eval",
        "Score a text with a trained model, in nats and bits per character: with its context vectors as they are, zeroed, taken\n"
        "from another article, and in overlapping windows without a roll; beside compressors and a character n-gram.",
        "A table goes to stdout, a picture beside the model. docs/evaluation.md says how to read them.",
    )
    add_model(parser)
    group = parser.add_argument_group("text (default: the one that the run was validated on)")
    text = group.add_mutually_exclusive_group()
    text.add_argument(
        "--dataset",
        metavar="NAME",
        help="a data set as in picogpt-train: all of a text, or a stream's articles for validation (default: the run's)",
    )
    text.add_argument(
        "--text",
        metavar="PATH",
        nargs="+",
        default=[],
        help="files, folders of .txt and .md, or - for stdin: all of it (default: none)",
    )
    group.add_argument("--text-column", metavar="NAME", help="column of a streamed data set that holds the text (default: text)")
    group.add_argument(
        "--chars",
        metavar="N",
        type=count,
        default=defaults.chars,
        help="characters to score at most, spread evenly over the text (default: %(default)s)",
    )
    group.add_argument(
        "--ngram-text",
        metavar="PATH",
        nargs="+",
        default=[],
        help="text to count the n-gram on (default: what the run reads: its text, if it is here, or the stream of --dataset)",
    )
    group.add_argument(
        "--windows", metavar="N", type=count, default=defaults.windows, help="windows in a roll (default: %(default)s)"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--dtype",
        metavar="TYPE",
        choices=DTYPES,
        default="float32",
        help=f"type of the weights: {', '.join(DTYPES)}; what another one than float32 costs is measured too (default: float32)",
    )
    machine.add_argument(
        "--threads", metavar="N", type=count, help="threads, which change the speed and not the scores (default: one a core)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="the picture, a .jpg or .png (default: eval.jpg beside the model)"
    )
    output.add_argument("--json", action="store_true", help="one JSON object, on a line, instead of the table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command on `argv` (None: the process's own arguments) and return its exit code."""
    return run_command(_evaluate, build_parser(), argv)


def command() -> NoReturn:
    """`picogpt-eval` as a process of its own."""
    end_process(main())


def _evaluate(arguments: argparse.Namespace) -> int:
    config = EvalConfig(chars=arguments.chars, windows=arguments.windows)
    check_threads(arguments.threads)
    check_picture(arguments.output)
    from picogpt.files import atomic_write
    from picogpt.runs.find import find_model

    path, chosen = find_model(arguments.model, arguments.logs_dir)
    notice(chosen)
    report = _score(arguments, path, config)
    output = arguments.output or path.with_name("eval.jpg")
    print(json.dumps({**report.to_json(), "picture": str(output)}) if arguments.json else report.table(), flush=True)
    from picogpt.plot import draw_scores

    atomic_write(output, draw_scores(report.scores, report.title(), suffix=output.suffix))
    notice(f"picture: {output}")
    return 0


def _score(arguments: argparse.Namespace, path: Path, config: EvalConfig) -> Report:
    """Find the text, score it, and measure the baselines on the same characters."""
    from picogpt.cli.bar import DownloadBar
    from picogpt.data.resolve import Console
    from picogpt.evaluation.baselines import compressed_bits
    from picogpt.evaluation.evaluate import chars_to_read, evaluate, evaluate_as_is
    from picogpt.evaluation.report import Report
    from picogpt.evaluation.scores import Scores, cut_sequences
    from picogpt.evaluation.texts import TrainedRun, find_eval_text, find_ngram_text

    engine = _load_engine(path, arguments.threads, arguments.dtype)
    trained, console = TrainedRun.of_model(path), Console(notice, DownloadBar)
    sequence_len = config.windows * engine.config.context_len
    text = find_eval_text(
        trained,
        TextRequest(paths=tuple(arguments.text), dataset=arguments.dataset, column=arguments.text_column),
        sequence_len=sequence_len,
        chars=config.chars,
        console=console,
    )
    sequences = cut_sequences(text.articles, sequence_len, config.chars)
    _announce(text, sequences)
    ngram_text = find_ngram_text(trained, text, arguments.ngram_text, console)
    with _progress(chars_to_read(sequences, engine.config.context_len)) as bar:
        losses = evaluate(engine, sequences, advance=bar.advance)
    if engine.dtype != "float32":
        # Measured on the same characters, so the difference is the cost of rounding the weights.
        notice("scoring with the context vector as it is again, in float32")
        reference = _load_engine(path, arguments.threads, "float32")
        with _progress(sequences.n_chars) as bar:
            losses["float32"] = evaluate_as_is(reference, sequences, advance=bar.advance)
    ngram, of_ngram = _count_ngram(ngram_text, sequences)
    notice(ngram)
    if of_ngram is not None:
        losses["ngram"] = of_ngram.reshape(losses["as_is"].shape)
    return Report(
        model=str(path),
        text=text.name,
        part=text.description,
        unit=text.unit,
        dtype=engine.dtype,
        scores=Scores(losses, sequences.article_of),
        compressors=compressed_bits(sequences.ids[:, 1:].reshape(-1)),
        ngram=ngram,
    )


def _load_engine(path: Path, threads: int | None, dtype: EngineDType) -> Engine:
    """The model, ready to score; says what computes it."""
    from picogpt.inference import Engine

    chosen = choose_threads(threads)
    engine = Engine.load(path, threads=chosen.count, dtype=dtype, notify=notice)
    notice(f"computing in {engine.dtype} with {plural(chosen.count, 'thread')} ({chosen.reason})")
    return engine


def _count_ngram(text: tuple[str, Ids] | str, sequences: EvalSequences) -> tuple[str, Losses | None]:
    """What the n-gram was counted on and its losses (R, T), or why there is none, of the name and ids of a text."""
    from picogpt.evaluation.baselines import NGRAM_CHARS, NGram

    if isinstance(text, str):
        return f"no n-gram: {text}", None
    name, ids = text
    counted = NGram(ids)
    cap = f", the first {NGRAM_CHARS:,} of {len(ids):,}" if len(ids) > NGRAM_CHARS else ""
    return f"n-gram counted on {name}: {counted.n_chars:,} characters{cap}", counted.losses(sequences.ids)


def _announce(text: EvalText, sequences: EvalSequences) -> None:
    """Say what is scored."""
    R, T = len(sequences.ids), sequences.ids.shape[1] - 1
    why = "" if text.unit == "articles" else "; no articles are marked in it, so stretches stand for them"
    notice(
        f"{text.name}, {text.description}: {R:,} sequences of {T:,} characters from {sequences.n_articles:,} of "
        f"{len(text.articles):,} {text.unit}, {sequences.n_chars:,} characters{why}"
    )


def _progress(total: int) -> ProgressBar:
    """Return a bar for `total` characters to score."""
    from picogpt.cli.bar import ProgressBar

    def describe(done: int, seconds: float) -> str:
        rate = done / seconds
        return f"{done / total:.0%} read, {rate:,.0f} characters/s, {format_seconds((total - done) / rate)} left"

    return ProgressBar(total, "char", describe=describe)


if __name__ == "__main__":
    command()
