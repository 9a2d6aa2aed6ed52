"""`picogpt-train`: learn from a text, watch the curve."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from picogpt.cli.common import StopRequest, end_process, notice, run_command
from picogpt.cli.parser import Parser, count
from picogpt.cli.session import Origin, Session
from picogpt.cli.settings import MODEL_FLAGS, TRAIN_FLAGS, Request
from picogpt.cli.texts import Text, find_text
from picogpt.config import RECIPE_BUDGETS, RECIPES, SUITABLE_RULE, GPTConfig, RunSettings, TrainConfig
from picogpt.errors import ConfigError, RanksError, RunError
from picogpt.threads import spin_briefly
from picogpt.uptime import process_seconds

if TYPE_CHECKING:
    from picogpt.ranks import Ranks
    from picogpt.run import RunFolder

__all__ = ["build_parser", "command", "main"]


def build_parser() -> Parser:
    """The parser. Flags that were not given are None, so that a run that goes on keeps its own settings."""
    parser = Parser(
        "picogpt-train",
        "Train a character GPT. A run that exists goes on where it stopped; Ctrl-C saves and ends it.",
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
    run.add_argument("--logs-dir", metavar="DIR", type=Path, default=Path("logs"), help="where runs are kept (default: logs)")
    run.add_argument("--fresh", action="store_true", help="start over; the old folder is kept under a new name")
    run.add_argument(
        "--dry-run", action="store_true", help="say how long it would take, how much memory, disk and network; train nothing"
    )
    begin = run.add_mutually_exclusive_group()
    begin.add_argument("--init-from", metavar="RUN", help="begin with another run's best weights (default: none)")
    begin.add_argument(
        "--import-original",
        metavar="FILE",
        type=Path,
        help="begin with a log.pkl of the original project; with --epochs 0 only bring it over (default: none)",
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
        help="what computes the blocks on a CPU: c, compiled for the model when training starts, torch, or auto: c where there "
        "is a C compiler (default: auto)",
    )
    machine.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute the blocks again in the backward pass instead of keeping them: less memory, slower, the same numbers",
    )
    machine.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="translate the blocks with torch.compile instead, which needs a C++ compiler (default: --no-compile)",
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
    request = Request.from_flags(arguments, began)
    if request.imports_only:
        from picogpt.cli.bringover import bring_over

        bring_over(request)
        return 0
    if "RANK" not in os.environ:
        _lead(request, None)
        return 0
    from picogpt.ranks import Ranks

    ranks = Ranks.join(os.environ)
    if ranks.rank > 0:
        return _follow(request, ranks)
    with ranks.leading():
        _lead(request if ranks.first_start() else request.going_on(), ranks)
    return 0


def _lead(request: Request, ranks: Ranks | None) -> None:
    """What a run alone does, or the first of the ranks that share it."""
    run, stored, text = _locate(request)
    data = text.describe()
    request.refuse_changes(stored, data, run.name)
    origin = _origin(request, run, stored)
    model = request.model(stored, origin.config if origin else None)
    config, budget = request.train(stored), request.budget(stored)
    source = text.source(model, config, run if stored and run.has_validation() else None)
    try:
        session = Session(run, source, request, stored, origin=origin, ranks=ranks)
        (session.rehearse if request.dry_run else session.train)(model, config, budget, data)
    finally:
        source.close()


def _follow(request: Request, ranks: Ranks) -> int:
    """What the other ranks do; a signal that one of them gets, it tells rank 0."""
    from picogpt.follow import follow

    ranks.connect()
    stop = StopRequest()
    ranks.listen_to(stop)
    with stop.listen():
        try:
            return follow(ranks, request.threads)
        except RanksError as error:
            if stop.signal_number is not None:
                return 128 + stop.signal_number
            raise RanksError(f"rank {ranks.rank}: {error}") from error


def _origin(request: Request, run: RunFolder, stored: RunSettings | None) -> Origin | None:
    """What the run begins from, if it is yet to begin."""
    asked = Origin.find(request)
    if stored is None:
        return asked
    request.refuse_other_origin(stored, asked.path if asked else None)
    if run.has_checkpoint():
        return None
    if stored.origin is not None and asked is None:
        raise RunError(f"{run.path}: the run was to begin from {stored.origin} and has not begun; name that again")
    return asked


def _locate(request: Request) -> tuple[RunFolder, RunSettings | None, Text]:
    """The run's folder, what is stored of it, and the text: the name of either can follow from the other."""
    from picogpt.run import RunFolder

    if request.run is not None:
        run = RunFolder(request.logs_dir / request.run)
        stored = _stored(run, request)
        if stored is None and not request.names_a_text and not run.path.exists():
            _check_new_name(run)
        return run, stored, find_text(request, stored)
    text = find_text(request, None)
    run = _default_run(request.logs_dir / text.name)
    stored = _stored(run, request)
    # A stream keeps to the commit of its run, and a text is folded as its run has it, which is known only now; nothing was
    # asked of the hub and no file was read yet.
    return run, stored, find_text(request, stored) if stored else text


def _check_new_name(run: RunFolder) -> None:
    """Take a run's name that stands alone and is not known for a new run only where there is none that could be meant.

    Raises:
        ConfigError: there are runs; the name is probably a mistyped one of them.
    """
    from picogpt.find import resumable_runs

    others = resumable_runs(run.path.parent)
    if not others:
        notice(f"{run.path}: a new run, as there is none to resume; neither --dataset nor --text is given, so the text is auto")
        return
    nearest = difflib.get_close_matches(run.name, others, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"the runs there are {', '.join(others)}."
    raise ConfigError(
        f"run {run.name}: no such run under {run.path.parent}; {hint} A new one needs --dataset or --text beside its name", "run"
    )


def _default_run(path: Path) -> RunFolder:
    """The run called `path`, or `path`-2, -3, ... where trained models that cannot be gone on with have these names."""
    from picogpt.run import RunFolder

    run, number = RunFolder(path), 1
    while run.is_finished_model():
        number += 1
        run = RunFolder(path.with_name(f"{path.name}-{number}"))
    if number > 1:
        notice(f"{path}: a trained model without a checkpoint to go on from; this run is called {run.name}")
    return run


def _stored(run: RunFolder, request: Request) -> RunSettings | None:
    """The settings of the run that is to go on, or None where one begins."""
    if request.fresh:
        return None
    if run.has_checkpoint() or (run.has_config() and not run.has_model()):
        try:
            return RunSettings.from_dict(run.read_config())
        except ConfigError as error:
            raise RunError(f"{run.path / 'config.json'}: {error}; start over with --fresh, the folder is kept") from error
    if run.has_model():
        raise RunError(
            f"{run.path}: a trained model without a checkpoint to go on from; choose another --run, or --fresh to start over"
        )
    return None


if __name__ == "__main__":
    command()
