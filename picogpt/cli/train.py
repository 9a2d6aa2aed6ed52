"""`picogpt-train`: train a model on a text, alone or on several ranks."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from picogpt.cli.common import end_process, notice, run_command
from picogpt.cli.parser import Parser, add_setting, count, number
from picogpt.cli.settings import MODEL_FLAGS, TRAIN_FLAGS, request_of
from picogpt.config import LOGS_DIR, RECIPES, GPTConfig, TrainConfig
from picogpt.errors import RanksError
from picogpt.schedule import RECIPE_BUDGETS, SETTINGS_RULES, STEPS_PER_EPOCH, SUITABLE_RULE
from picogpt.signals import StopRequest, deferred_interrupt
from picogpt.threads import spin_briefly
from picogpt.uptime import process_seconds

if TYPE_CHECKING:
    from picogpt.training.distributed import Ranks
    from picogpt.training.request import TrainRequest

__all__ = ["build_parser", "command", "main"]


def build_parser() -> Parser:
    """Return the parser of the command. Flags that are not given are None, so that a resumed run keeps its settings."""
    parser = Parser(
        "picogpt-train",
        "Train a character GPT on a text. An existing run is resumed where it stopped;\nCtrl-C saves the run and stops.",
        "Results go to stdout, progress to stderr; the run is kept in LOGS_DIR/RUN.\n"
        "Several processes or machines (docs/distributed.md):\n"
        "  torchrun --nproc-per-node N -m -- picogpt.cli.train ...",
        stray="name a text with --text or --dataset",
    )
    _add_text(parser)
    _add_run(parser)
    _add_length(parser)
    _add_settings(parser)
    _add_machine(parser)
    return parser


def _add_text(parser: Parser) -> None:
    # No choices= in argparse: values are validated for callers in Python too, with the same message.
    text = parser.add_argument_group("text")
    source = text.add_mutually_exclusive_group()
    source.add_argument(
        "--dataset",
        metavar="NAME",
        help="auto (Tiny Shakespeare if it is on this machine or downloads within seconds, else sample), sample (a bundled "
        "play), tinyshakespeare; streamed from the hub: wikipedia, tinytextbook, openorca, ORG/NAME[:CONFIG]; a "
        "folder[:CONFIG] with the layout of a hub data set; or a file: .jsonl, .csv, .parquet, ... (default: auto)",
    )
    source.add_argument("--text", metavar="PATH", nargs="+", help="your own text: files, folders of .txt and .md, or - for stdin")
    text.add_argument("--text-column", metavar="NAME", help="column of a data set or a file that holds the text (default: text)")
    text.add_argument(
        "--alphabet",
        metavar="NAME",
        help="characters that the model knows: picogpt (ASCII in small letters), text (the text's own, capitals included), or "
        "a UTF-8 file with the characters in it; with the last two nothing is lower-cased (default: picogpt)",
    )
    fold = text.add_mutually_exclusive_group()
    fold.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,  # None without either: it keeps the run's setting
        help="fold characters outside the alphabet to it: curly quotes become straight, dashes -, letters lose their accents; "
        "--no-fold reads them as <?> (default: --fold with the alphabet picogpt, --no-fold with another; docs/texts.md)",
    )
    fold.add_argument(
        "--transliterate",
        dest="fold",
        action="store_const",
        const="latin",
        help="also write other scripts in Latin letters: Cyrillic, Greek, Bengali, Chinese, ... (default: they are read as <?>)",
    )


def _add_run(parser: Parser) -> None:
    # A run's name is the name of a folder and not a path; --logs-dir is for paths.
    run = parser.add_argument_group("run")
    run.add_argument("--run", metavar="NAME", help="folder under the logs folder (default: the text's name)")
    run.add_argument("--logs-dir", metavar="DIR", type=Path, default=LOGS_DIR, help="folder of all runs (default: logs)")
    run.add_argument(
        "--fresh",
        action="store_true",
        help="start over, on the run's text unless another is named; the old folder is kept under a new name",
    )
    run.add_argument("--dry-run", action="store_true", help="forecast time, memory, disk and network without training")
    # Initial weights of a new run, from one source at most.
    begin = run.add_mutually_exclusive_group()
    begin.add_argument("--init-from", metavar="RUN", help="start from another run's best weights (default: none)")
    begin.add_argument(
        "--import-original",
        metavar="FILE",
        type=Path,
        help="start from a log.pkl of the original project; with --epochs 0 only import it (default: none)",
    )


def _add_length(parser: Parser) -> None:
    group = parser.add_argument_group("length")
    # A run has one length; the other two flags divide it into epochs.
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        metavar="M",
        type=number,
        help="wall-clock minutes from the start of the command to its end (default: none)",
    )
    length.add_argument("--chars", metavar="N", type=count, help="characters to train on, such as 2000000 or 2M (default: none)")
    length.add_argument(
        "--epochs",
        metavar="N",
        type=count,
        help=f"epochs (default: none; {SUITABLE_RULE}; recipe seed: {RECIPE_BUDGETS['seed']['epochs']} epochs)",
    )
    meaning = "end early, after N epochs without a better validation loss, which is that of the weights' mean; not with --minutes"
    add_setting(group, "--patience", meaning=f"{meaning} (default: none)")
    meaning = f"steps per epoch (default: a twentieth of the run; {STEPS_PER_EPOCH} if --epochs is given)"
    add_setting(group, "--steps-per-epoch", meaning=meaning)
    meaning = "validation batches per epoch, at most the whole validation text (default: a fifth of the steps)"
    add_setting(group, "--val-steps", meaning=meaning)


def _add_settings(parser: Parser) -> None:
    # Defaults are in the help text only: a flag's value stays None, which means the run's own setting.
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--recipe", metavar="NAME", help=f"{' or '.join(RECIPES)} (the original's settings) (default: fast)")
    for name, (kind, meaning) in TRAIN_FLAGS.items():
        add_setting(recipe, _flag(name), kind=kind, meaning=f"{meaning} ({_recipe_default(name)})")
    model = parser.add_argument_group("model (PicoGPT's shape by default)")
    for name, (kind, meaning) in MODEL_FLAGS.items():
        add_setting(model, _flag(name), kind=kind, meaning=f"{meaning} (default: {getattr(GPTConfig(), name)})")


def _add_machine(parser: Parser) -> None:
    # Flags of the backend: they change speed and rounding, but not what is computed.
    machine = parser.add_argument_group("machine")
    meaning = "threads per process (default: OMP_NUM_THREADS, else one per core within a CPU quota; at most OMP_THREAD_LIMIT)"
    add_setting(machine, "--threads", meaning=meaning)
    meaning = "cpu, cuda, mps (Apple), or auto: a CUDA GPU if there is one, else the CPU (default: auto)"
    add_setting(machine, "--device", kind=str, meaning=meaning)
    meaning = "type of the GEMMs: float32, bfloat16, or auto: bfloat16 if a benchmark finds it clearly faster (default: auto)"
    machine.add_argument("--dtype", metavar="TYPE", help=meaning)
    meaning = "kernels on a CPU: c (native, compiled here), torch, or auto: c where that works for the model (default: auto)"
    add_setting(machine, "--kernels", kind=str, meaning=meaning)
    machine.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, slower; bit-identical but for native kernels' rounding",
    )
    machine.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the blocks with torch.compile instead, which needs a C++ compiler (default: --no-compile)",
    )


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _recipe_default(name: str) -> str:
    # The second recipe is named only where it differs.
    fast, seed = (getattr(TrainConfig.from_recipe(recipe, {}), name) for recipe in RECIPES)
    default = f"default: {SETTINGS_RULES.get(name, fast)}"
    return default if fast == seed else f"{default}; recipe seed: {seed}"


def main(argv: list[str] | None = None) -> int:
    """Run the command on `argv` (None: the process's own arguments) and return its exit code."""
    # A budget of minutes counts from the start of the process; imports have taken a part of it.
    began = time.perf_counter() - (process_seconds() if argv is None else 0.0)
    return run_command(functools.partial(_train, began=began), build_parser(), argv)


def command() -> NoReturn:
    """Run `picogpt-train` as a process."""
    end_process(main())


def _train(arguments: argparse.Namespace, *, began: float) -> int:
    spin_briefly()  # before torch is imported: OpenMP reads its environment when it is loaded
    request = request_of(arguments)
    # Importing a run trains nothing: no text, no ranks.
    if request.imports_only:
        from picogpt.training.import_run import import_run

        import_run(request, dry_run=arguments.dry_run, notify=notice)
        return 0
    with deferred_interrupt():
        from picogpt.training.distributed import Ranks

    # torchrun sets RANK in each of its processes.
    if "RANK" not in os.environ:
        _run_rank_0(request, Ranks(), began, dry_run=arguments.dry_run)
        return 0
    ranks = Ranks.join(os.environ)
    if ranks.rank > 0:
        return _run_worker(request, ranks)
    # After a failure torchrun starts all ranks again with the same flags: then --fresh must not discard the run.
    with ranks.propagate_exit_code():
        _run_rank_0(request if ranks.is_first_launch() else request.for_restart(), ranks, began, dry_run=arguments.dry_run)
    return 0


def _run_rank_0(request: TrainRequest, ranks: Ranks, began: float, *, dry_run: bool) -> None:
    """Train as a single process, or as rank 0: it reads the text, saves, and prints."""
    with deferred_interrupt():
        from picogpt.cli.bar import DownloadBar
        from picogpt.cli.progress import TrainingDisplay, timing_bar
        from picogpt.data.resolve import Console
        from picogpt.training.plan import Plan
        from picogpt.training.run import TrainingRun

    # The plan is all that a dry run prints; nothing has been written so far.
    plan = Plan.of(request, ranks, Console(notice, DownloadBar))
    with contextlib.closing(plan.source):  # a stream has a thread that downloads
        run = TrainingRun(plan, began=began, notify=notice, timing=timing_bar)
        if dry_run:
            run.dry_run()
        else:
            run.train(TrainingDisplay)


def _run_worker(request: TrainRequest, ranks: Ranks) -> int:
    """Train as a worker, which executes the commands of rank 0 and reports a signal to it."""
    with deferred_interrupt():
        from picogpt.training.worker import run_worker

    # A worker receives settings, weights and text from rank 0, and writes no files.
    ranks.connect()
    stop = StopRequest()
    ranks.attach_signals(stop)
    with stop.listen():
        try:
            return run_worker(ranks, request.threads)
        except RanksError as error:
            # After a signal, rank 0 ends first, and losing it is no error.
            if stop.signal_number is not None:
                return 128 + stop.signal_number  # as shells report it
            raise RanksError(f"rank {ranks.rank}: {error}") from error


if __name__ == "__main__":
    command()
