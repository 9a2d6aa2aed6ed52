"""`picogpt-train --import-original FILE --run NAME --epochs 0`: convert a run of the original project, without training."""

from __future__ import annotations

import math

from picogpt.errors import ConfigError, RunError
from picogpt.files import atomic_write
from picogpt.model.gpt import GPT
from picogpt.plot import draw_losses
from picogpt.runs.folder import RunFolder
from picogpt.runs.loss_log import LossLog
from picogpt.training.origin import InitFrom
from picogpt.training.request import TrainRequest
from picogpt.wording import Notify, plural

__all__ = ["describe_losses", "import_run"]


def import_run(request: TrainRequest, *, dry_run: bool, notify: Notify) -> None:
    """Write the weights and losses of the original's log as a run, to generate with, score, plot or start from.

    The run has no text and so no checkpoint to resume; `--init-from` trains its weights further.

    Raises:
        ConfigError: the run has no name, or a flag needs training.
        RunError: the log is damaged or of another kind, or a run of that name exists.
    """
    if request.run is None:
        raise ConfigError("run must be given with --import-original and --epochs 0: the name of the new run", "run")
    # A flag that has no effect is rejected: its user expects training.
    if request.text.is_named:
        raise ConfigError("epochs 0 trains on no text; leave --text and --dataset out, or give more epochs", "epochs")
    original = InitFrom.find(request)
    assert original is not None
    assert original.log is not None
    # Loading into a model checks every name and shape before anything is written.
    model = GPT(request.model_config(None, original.config))
    model.load_arrays(original.weights)
    run = RunFolder(request.logs_dir / request.run)
    summary = f"{run.path}: {plural(original.log.iter_num, 'step')} of {request.import_original}{describe_losses(original.log)}"
    if run.path.exists() and not request.fresh:
        raise RunError(
            f"{run.path}: there is a run of that name; choose another --run, or --fresh, which keeps it under a new name"
        )
    if dry_run:
        notify(f"{summary}; dry run: nothing is kept")
        return
    if run.path.exists():
        # Only now, when nothing can fail any more but the disk, and not while another process trains in it.
        with run.lock():
            notify(f"the existing run is kept as {run.archive()}")
    # The model last: a folder with a model counts as a finished run.
    run.create()
    run.write_log(original.log)
    atomic_write(run.plot_path, draw_losses({run.name: original.log}))
    run.save_model(model.arrays(), model.config)
    name = request.run
    notify(f"{summary}; picogpt-generate -m {name} generates with it, picogpt-train --init-from {name} trains on from it")


def describe_losses(log: LossLog) -> str:
    """Describe an imported log: its best loss, and the number of losses that are not finite."""
    best = "" if log.best_loss is None else f", best loss {log.best_loss:.4f}"
    # Losses that are not finite do not prevent the import, but the user should know.
    broken = sum(not math.isfinite(loss) for loss in (*log.train, *log.val))
    return best + (f", {plural(broken, 'loss', 'losses')} not finite" if broken else "")
