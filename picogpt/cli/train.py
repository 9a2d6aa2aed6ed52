"""`picogpt-train`: learn from a text, watch the curve."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from picogpt.cli.common import end_process, notice, run_command
from picogpt.cli.parser import Parser, count
from picogpt.cli.settings import MODEL_FLAGS, TRAIN_FLAGS, request_of
from picogpt.config import LOGS_DIR, RECIPES, GPTConfig, TrainConfig
from picogpt.errors import RanksError
from picogpt.schedule import RECIPE_BUDGETS, SUITABLE_RULE
from picogpt.signals import StopRequest
from picogpt.threads import spin_briefly
from picogpt.uptime import process_seconds

if TYPE_CHECKING:
    from picogpt.training.distributed import Ranks
    from picogpt.training.request import TrainRequest

__all__ = ["build_parser", "command", "main"]


def build_parser() -> Parser:
    """The parser. Flags that were not given are None, so that a resumed run keeps its own settings."""
    parser = Parser(
        "picogpt-train",
        "Train a character GPT. An existing run is resumed where it stopped; Ctrl-C saves and ends it.",
        "Results go to stdout, progress to stderr; the run is kept in LOGS_DIR/RUN.\n"
        "Several processes or machines: torchrun --nproc-per-node N -m -- picogpt.cli.train ... (docs/distributed.md)",
    )
    text = parser.add_argument_group("text").add_mutually_exclusive_group()
    text.add_argument(
        "--dataset",
        metavar="NAME",
        help="auto (Tiny Shakespeare if it is there or can be had within seconds, else sample), sample (a play that comes "
        "with picogpt), tinyshakespeare; streamed from the hub: wikipedia, tinytextbook, openorca, ORG/NAME[:CONFIG]; or a "
        "folder laid out like the hub's (default: auto)",
    )
    text.add_argument(
        "--text", metavar="PATH", nargs="+", help="your own text instead: files, folders of .txt and .md, or - for stdin"
    )
    parser.add_argument("--text-column", metavar="NAME", help="column of a streamed data set that holds the text (default: text)")
    parser.add_argument(
        "--no-fold",
        dest="fold",
        action="store_const",
        const=False,
        help="read all characters outside ASCII as <?>, as the original does (default: curly quotes become quotes, dashes -, "
        "letters lose their accents; docs/texts.md)",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--run", metavar="NAME", help="folder under the logs folder (default: the text's name)")
    run.add_argument("--logs-dir", metavar="DIR", type=Path, default=LOGS_DIR, help="where runs are kept (default: logs)")
    run.add_argument("--fresh", action="store_true", help="start over; the old folder is kept under a new name")
    run.add_argument("--dry-run", action="store_true", help="forecast time, memory, disk and network; train nothing")
    begin = run.add_mutually_exclusive_group()
    begin.add_argument("--init-from", metavar="RUN", help="start from another run's best weights (default: none)")
    begin.add_argument(
        "--import-original",
        metavar="FILE",
        type=Path,
        help="start from a log.pkl of the original project; with --epochs 0 only import it (default: none)",
    )
    _add_budget(parser)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--recipe", metavar="NAME", help=f"{' or '.join(RECIPES)} (the original's settings) (default: fast)")
    for name, (kind, meaning) in TRAIN_FLAGS.items():
        _add(recipe, name, kind, f"{meaning} ({_recipe_default(name)})")
    model = parser.add_argument_group("model (PicoGPT's shape by default)")
    for name, (kind, meaning) in MODEL_FLAGS.items():
        _add(model, name, kind, f"{meaning} (default: {getattr(GPTConfig(), name)})")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--threads",
        metavar="N",
        type=count,
        help="threads of each process (default: one a core, as far as a CPU quota, OMP_NUM_THREADS and OMP_THREAD_LIMIT allow)",
    )
    machine.add_argument(
        "--device",
        metavar="NAME",
        help="where to compute: cpu, cuda, mps (Apple), or auto: a CUDA GPU if there is one, else the CPU (default: auto)",
    )
    machine.add_argument(
        "--dtype",
        metavar="TYPE",
        help="type of the matrix products: float32, bfloat16, or auto, whichever a short timing finds faster (default: auto)",
    )
    machine.add_argument(
        "--kernels",
        metavar="NAME",
        help="kernels on a CPU: c (native, compiled here), torch, or auto: c where there is a C compiler (default: auto)",
    )
    machine.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, slower, bit-identical",
    )
    machine.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the blocks with torch.compile instead, which needs a C++ compiler (default: --no-compile)",
    )
    return parser


def _add_budget(parser: Parser) -> None:
    group = parser.add_argument_group("length")
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        metavar="M",
        type=float,
        help="minutes on the clock from the start of the command to its end (default: none)",
    )
    length.add_argument("--chars", metavar="N", type=count, help="characters to train on, such as 2000000 or 2M (default: none)")
    length.add_argument(
        "--epochs",
        metavar="N",
        type=count,
        help=f"epochs (default: none; {SUITABLE_RULE}; recipe seed: {RECIPE_BUDGETS['seed']['epochs']} epochs)",
    )
    _add(
        group,
        "patience",
        int,
        "end early: after N epochs without a better validation loss, cool down from the best weights (default: none)",
    )
    _add(group, "steps_per_epoch", int, "steps an epoch (default: a twentieth of the run; with --epochs 500)")
    _add(
        group, "val_steps", int, "validation batches an epoch, at most all of the validation text (default: a fifth of the steps)"
    )


def _add(group: argparse._ArgumentGroup, name: str, kind: Callable[[str], Any], meaning: str) -> None:
    metavar = {int: "N", float: "X", str: "NAME"}[kind]  # type: ignore[index]
    group.add_argument("--" + name.replace("_", "-"), metavar=metavar, type=count if kind is int else kind, help=meaning)


def _recipe_default(name: str) -> str:
    fast, seed = (getattr(TrainConfig.from_recipe(recipe, {}), name) for recipe in RECIPES)
    return f"default: {fast}" if fast == seed else f"default: {fast}; recipe seed: {seed}"


def main(argv: list[str] | None = None) -> int:
    """Run the command on `argv` (None: the process's own arguments) and return its exit code."""
    began = time.perf_counter() - (process_seconds() if argv is None else 0.0)
    return run_command(functools.partial(_train, began=began), build_parser(), argv)


def command() -> NoReturn:
    """`picogpt-train` as a process of its own."""
    end_process(main())


def _train(arguments: argparse.Namespace, *, began: float) -> int:
    spin_briefly()
    request = request_of(arguments)
    if request.imports_only:
        from picogpt.training.import_run import import_run

        import_run(request, dry_run=arguments.dry_run, notify=notice)
        return 0
    from picogpt.training.distributed import Ranks

    if "RANK" not in os.environ:
        _run_rank_0(request, Ranks(), began, dry_run=arguments.dry_run)
        return 0
    ranks = Ranks.join(os.environ)
    if ranks.rank > 0:
        return _run_worker(request, ranks)
    with ranks.propagate_exit_code():
        _run_rank_0(request if ranks.is_first_launch() else request.for_restart(), ranks, began, dry_run=arguments.dry_run)
    return 0


def _run_rank_0(request: TrainRequest, ranks: Ranks, began: float, *, dry_run: bool) -> None:
    """Train alone, or as rank 0 of the ranks that share a run."""
    from picogpt.cli.bar import DownloadBar
    from picogpt.cli.progress import TrainingDisplay, timing_bar
    from picogpt.data.resolve import Console
    from picogpt.training.plan import Plan
    from picogpt.training.run import TrainingRun

    plan = Plan.of(request, ranks, Console(notice, DownloadBar))
    with contextlib.closing(plan.source):
        run = TrainingRun(plan, began=began, notify=notice, timing=timing_bar)
        if dry_run:
            run.dry_run()
        else:
            run.train(TrainingDisplay)


def _run_worker(request: TrainRequest, ranks: Ranks) -> int:
    """Train as a worker; rank 0 is told of a signal."""
    from picogpt.training.worker import run_worker

    ranks.connect()
    stop = StopRequest()
    ranks.attach_signals(stop)
    with stop.listen():
        try:
            return run_worker(ranks, request.threads)
        except RanksError as error:
            if stop.signal_number is not None:
                return 128 + stop.signal_number
            raise RanksError(f"rank {ranks.rank}: {error}") from error


if __name__ == "__main__":
    command()
