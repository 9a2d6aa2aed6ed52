"""Lines that a start of a run prints about it: model, backend, ranks and length."""

from __future__ import annotations

from collections.abc import Iterator

from picogpt.schedule import MAX_SUITABLE_PASSES, Schedule
from picogpt.training.plan import Plan
from picogpt.training.trainer import Trainer
from picogpt.wording import format_passes, plural

__all__ = ["announcement"]


def announcement(plan: Plan, trainer: Trainer, schedule: Schedule) -> Iterator[str]:
    """Yield the lines about a run.

    Args:
        plan: the resolved settings.
        trainer: the trainer, at the step from which this start goes on.
        schedule: the run's length.
    """
    backend = plan.backend
    yield f"model: {trainer.model.num_params():,} parameters; {plan.model.describe()}"
    yield f"device {backend.device.type} ({backend.device_reason})"
    yield backend.describe()
    if backend.gradient_checkpointing:
        yield "activations are recomputed in the backward pass, to save memory"
    if plan.ranks.count > 1:
        yield _describe_ranks(plan)
    yield _describe_length(plan, trainer, schedule)
    if plan.budget.is_open:
        yield "no length given: this one suits the text (docs/training.md); --minutes, --chars or --epochs give another"


def _describe_ranks(plan: Plan) -> str:
    train, count = plan.train, plan.ranks.count
    each = f"{count} ranks, each with {train.batch_size // count} of a step's sequences"
    if train.sync_every:
        return f"{each}, with an outer step every {train.sync_every} steps"
    return f"{each}; gradients are averaged every step"


def _describe_length(plan: Plan, trainer: Trainer, schedule: Schedule) -> str:
    train, train_chars = plan.train, plan.source.train_chars
    # Past epochs may have had another length, so they are counted in the log.
    n_epochs = len(trainer.log.val) + schedule.epochs_left(trainer.step)
    read = ""
    if train_chars is not None:  # an epoch is a number of steps, not a pass over the text
        passes = schedule.total_steps * trainer.chars_per_step / train_chars
        read = f", {format_passes(passes)}" + (", enough to memorize it" if passes > 2 * MAX_SUITABLE_PASSES else "")
    return (
        f"{plan.folder.path}: {plural(schedule.total_steps, 'step')} of {train.batch_size} x "
        f"{train.windows * plan.model.context_len:,} characters, {schedule.steps_per_epoch:,} an epoch, "
        f"{plural(n_epochs, 'epoch')}{read}; recipe {train.recipe}, {train.describe_rates()}, seed {train.seed}"
    )
