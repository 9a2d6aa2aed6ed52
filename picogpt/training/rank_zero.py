"""The trainer of rank 0 of several: it reads, validates, logs and saves as in a single process, and commands the workers."""

from __future__ import annotations

import numpy as np
import torch

from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import Batch, Source, Stop
from picogpt.device import CPU
from picogpt.kernels.compiled import Kernels
from picogpt.runs.checkpoint import Checkpoint, pack, unpack
from picogpt.runs.folder import RunFolder
from picogpt.runs.tensor_file import Tensors
from picogpt.schedule import Schedule, fraction_of_peak
from picogpt.training.data_parallel import DataParallelState, pack_step
from picogpt.training.distributed import SINGLE_PROCESS, Command, Ranks
from picogpt.training.state import strip_prefix
from picogpt.training.trainer import Observer, Trainer
from picogpt.wording import Notify, say_nothing

__all__ = ["RankZeroTrainer"]


class RankZeroTrainer(DataParallelState, Trainer):
    """A trainer whose steps are taken by all ranks. Workers run `picogpt.training.worker`.

    Args:
        ranks: the group of ranks that train together. The other arguments are those of `Trainer`.
    """

    def __init__(
        self,
        model_config: GPTConfig,
        config: TrainConfig,
        source: Source,
        dtype: torch.dtype,
        *,
        device: torch.device = CPU,
        ranks: Ranks = SINGLE_PROCESS,
        kernels: Kernels | None = None,
    ) -> None:
        Trainer.__init__(self, model_config, config, source, dtype, device=device, kernels=kernels)
        self.join(ranks)
        # Initial tensors of ranks 1, 2, ... after a resume with DiLoCo; empty where they equal rank 0's.
        self._worker_states: list[Tensors] = []

    def fit(self, run: RunFolder, schedule: Schedule, observer: Observer, stop: Stop, *, notify: Notify = say_nothing) -> bool:
        """Train as `Trainer.fit` does, and send heartbeats to the workers meanwhile.

        Raises:
            RanksError: another rank is gone; the last checkpoint is intact.
        """
        return super().fit(run, schedule, observer, self.ranks.with_heartbeat(stop), notify=notify)

    def train_step(self, lr: float, stop: Stop = lambda: False) -> float:
        """Take one training step on all ranks; see `Trainer.train_step`.

        Raises:
            RanksError: another rank is gone; the weights are unchanged.
        """
        fraction_of_peak(lr, self.config)  # raises before any worker receives the step
        if not self.is_wrapped:
            self._start_workers()
        return super().train_step(lr, stop)

    def local_step(self, batch: Batch, lr: float) -> float:
        """Send the step to the workers, and take rank 0's part of it."""
        # Workers take the same step at the same time: DDP averages the gradients in the backward pass.
        self.ranks.broadcast_command(Command.STEP, pack_step(batch, lr, self.model.config.vocab_size))
        return super().local_step(batch, lr)

    def outer_step_on_all_ranks(self) -> None:
        """Take an outer step on all ranks now, before `sync_every` local steps are done."""
        self.ranks.broadcast_command(Command.OUTER_STEP)
        self.outer_step()

    def _start_workers(self) -> None:
        """Send the training state to all workers, and wrap the model."""
        own, common = self.state_tensors(), self.outer_tensors()
        # Only with DiLoCo do ranks have weights of their own; else all start from rank 0's.
        others = self._worker_states or [own] * (self.ranks.count - 1)
        self.ranks.broadcast_command(Command.BEGIN)
        for rank, tensors in enumerate(others, start=1):
            self.ranks.send(pack(self.to_spec({**common, **tensors})), rank)
        self._worker_states = []  # from here on the workers have them
        self.wrap_ddp()

    def finish_epoch(self, run: RunFolder, schedule: Schedule, stop: Stop, notify: Notify) -> bool:
        """Finish an epoch as `Trainer.finish_epoch` does, on rank 0 alone: the workers answer heartbeats meanwhile."""
        if self.local_steps:
            # Validate the weights that all ranks agree on, not rank 0's local ones.
            self.outer_step_on_all_ranks()
        return super().finish_epoch(run, schedule, stop, notify)

    def trained_state(self) -> tuple[Tensors, dict[str, int]]:
        """Return the tensors of all ranks for a checkpoint, and its counts of local steps and ranks."""
        others = self._collect_worker_states()
        tensors = {**self.state_tensors(), **self.outer_tensors()}
        for rank, rank_tensors in enumerate(others, start=1):
            # Names carry their owner: rank1.model.*, rank2.optimizer.*.
            tensors |= {f"rank{rank}.{name}": array for name, array in rank_tensors.items()}
        return tensors, {"local_steps": self.local_steps, "ranks": 1 + len(others)}

    def _collect_worker_states(self) -> list[Tensors]:
        """Return the tensors of ranks 1, 2, ..., which differ from rank 0's between two outer steps (DiLoCo)."""
        if self.outer is None or not self.is_wrapped:
            return self._worker_states
        self.ranks.broadcast_command(Command.COLLECT)
        return [unpack(self.ranks.receive(rank)).tensors for rank in range(1, self.ranks.count)]

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore everything to the state that `checkpoint` was saved in, with any number of ranks.

        Raises:
            RunError: the checkpoint's model has another shape; nothing is changed.
        """
        super().restore(checkpoint)
        tensors, state = checkpoint.tensors, checkpoint.state
        self.local_steps = int(state.get("local_steps", 0))
        if self.outer is not None:
            self._worker_states = self._redistribute_states([self.state_tensors(), *_split_by_rank(tensors, int(state["ranks"]))])

    def _redistribute_states(self, saved: list[Tensors]) -> list[Tensors]:
        """Return the initial tensors of ranks 1, 2, ..., given the saved tensors of each rank.

        If the number of ranks has changed, an early outer step averages the saved weights, so that no step of any rank is
        lost; the inner optimizer states are assigned round-robin.
        """
        if len(saved) == self.ranks.count:
            return saved[1:]  # rank 0's is loaded already
        # Right after an outer step, all ranks hold the same weights, and there is nothing to average.
        if self.local_steps:
            names = [f"model.{name}" for name in self.model.arrays()]
            self.apply_outer_step([self.on_device(np.mean([tensors[name] for tensors in saved], axis=0)) for name in names])
        weights = {f"model.{name}": array for name, array in self.model.arrays().items()}
        return [{**saved[rank % len(saved)], **weights} for rank in range(1, self.ranks.count)]


def _split_by_rank(tensors: Tensors, count: int) -> list[Tensors]:
    """Return a checkpoint's tensors of ranks 1, 2, ..., count - 1."""
    return [strip_prefix(f"rank{rank}.", tensors) for rank in range(1, count)]
