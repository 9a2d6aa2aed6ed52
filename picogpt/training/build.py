"""Make the trainer that a run needs: for a single process, or for rank 0 of several."""

from __future__ import annotations

from picogpt.backend import Backend, BackendChoice
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import Source
from picogpt.training.distributed import SINGLE_PROCESS, Ranks
from picogpt.training.rank_zero import RankZeroTrainer
from picogpt.training.trainer import Trainer
from picogpt.wording import Notify, say_nothing

__all__ = ["build_trainer", "make_trainer"]


def build_trainer(
    model: GPTConfig, config: TrainConfig, source: Source, backend: Backend, ranks: Ranks = SINGLE_PROCESS
) -> Trainer:
    """Return a trainer that computes with `backend`."""
    device, kernels = backend.device, backend.kernels
    trainer: Trainer
    if ranks.count > 1 or config.sync_every:
        trainer = RankZeroTrainer(model, config, source, backend.dtype, device=device, ranks=ranks, kernels=kernels)
    else:
        trainer = Trainer(model, config, source, backend.dtype, device=device, kernels=kernels)
    trainer.apply_backend(backend)
    return trainer


def make_trainer(
    model: GPTConfig, config: TrainConfig, source: Source, choice: BackendChoice | None = None, *, notify: Notify = say_nothing
) -> Trainer:
    """Return a trainer for your own training loop, with the backend that `picogpt-train` would select.

    Args:
        model: shape of the model.
        config: training settings.
        source: source of the batches.
        choice: requested backend; None selects the best one for this machine.
        notify: receives a line before kernels are compiled.

    Raises:
        ConfigError, TrainingError: the requested backend is not available.
    """
    backend = Backend.select(model, choice or BackendChoice(), sequences=config.batch_size, notify=notify)
    return build_trainer(model, config, source, backend)
