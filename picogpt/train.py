"""The training loop. Knows the model from outside only; progress, pictures and signals hook in through `Observer` and `stop`.

A run is a pure function of its settings on one machine and thread count: the weights start from the seed, batch k
depends on k alone, and dropout draws from a seed made of the run's and the step's. So there is no generator to save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from picogpt.config import GPTConfig, Schedule, TrainConfig
from picogpt.data import Batch, Source, Stop, WaitInterrupted
from picogpt.errors import DataError, TrainingError
from picogpt.model import GPT
from picogpt.optim import build_optimizers, learning_rate, set_learning_rate
from picogpt.run import Checkpoint, LossLog, RunFolder, Tensors

__all__ = ["Observer", "StepReport", "Trainer", "seconds_of"]

SAVE_INTERVAL = 300.0
"""Seconds of training after which a checkpoint is written in the middle of an epoch."""

_STREAM_DROPOUT = 2
"""Number of the random stream that dropout draws its seeds from."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimizer step came to."""

    step: int
    """Steps taken so far, this one included."""
    loss: float
    """Mean loss of the step's batch in nats per character, before the update."""
    chars: int
    """Characters of the step's batch."""


class Observer(Protocol):
    """Who watches a run: told of every step, and of every epoch after it has been saved."""

    def on_step(self, report: StepReport) -> None:
        """One step was taken."""

    def on_epoch(self, trainer: Trainer) -> None:
        """An epoch has ended; `trainer.log` has its entry."""


class Trainer:
    """A model, its optimizer and where they stand.

    Args:
        model_config: shape of the model.
        config: how it is trained.
        source: where its batches come from.
        dtype: type of the matrix products; bfloat16 is used through autocast, weights and sums stay float32.
    """

    def __init__(self, model_config: GPTConfig, config: TrainConfig, source: Source, dtype: torch.dtype) -> None:
        self.config = config
        self.source = source
        self.dtype = dtype
        torch.manual_seed(config.seed)
        self.model = GPT(model_config)
        self.optimizers = build_optimizers(self.model, config, dtype)
        self.log = LossLog()
        self.seconds = 0.0
        """Seconds spent training, validation included, over all starts of the run."""
        self.step = 0
        """Optimizer steps taken so far; those of a run that was brought over are not among them, only in the log."""
        self._steps_before, self._chars_before = 0, 0
        self._epoch_loss, self._epoch_steps = 0.0, 0

    @property
    def chars_per_step(self) -> int:
        """Characters in a batch."""
        return self.config.batch_size * self.config.windows * self.model.config.context_len

    @property
    def epoch_is_open(self) -> bool:
        """Whether steps have been taken that are in no epoch of the log yet."""
        return self._epoch_steps > 0

    def compile_blocks(self) -> None:
        """Have torch.compile translate the blocks when they are first called; weights and their names stay as they are."""
        for block in self.model.transformer.h:
            block.compile()

    def fit(self, run: RunFolder, schedule: Schedule, observer: Observer, stop: Stop) -> bool:
        """Train to the end of `schedule`, saving into `run` after every epoch, every few minutes and when stopped.

        Args:
            run: the run's folder, made and locked.
            schedule: how many steps, and how they divide into epochs.
            observer: told what happens.
            stop: asked after every step and validation batch; once it says True, the run is saved and the loop ends.

        Returns:
            Whether the schedule was finished.

        Raises:
            TrainingError: loss or gradient are not finite; the state before that step is saved.
            DataError: the data have ended for good; likewise.
            OSError: something cannot be saved.
        """
        start, before = time.perf_counter(), self.seconds
        saved_at = start
        while self.step < schedule.total_steps or self.epoch_is_open:
            if self._epoch_is_full(schedule):
                finished = self._finish_epoch(run, schedule, stop)
                saved_at = time.perf_counter()
                if finished:
                    observer.on_epoch(self)
            else:
                report = self._train_step(run, schedule, stop)
                if report is None:
                    return False
                observer.on_step(report)
            self.seconds = before + time.perf_counter() - start
            if stop():
                self.save(run)
                return False
            if time.perf_counter() - saved_at > SAVE_INTERVAL:
                self.save(run)
                saved_at = time.perf_counter()
        return True

    def _epoch_is_full(self, schedule: Schedule) -> bool:
        at_end = self.step % schedule.steps_per_epoch == 0 or self.step >= schedule.total_steps
        return self.epoch_is_open and at_end

    def _train_step(self, run: RunFolder, schedule: Schedule, stop: Stop) -> StepReport | None:
        """One step, or None if a stop came while it waited for its data; what ends the run is raised after saving."""
        try:
            loss = self.update(learning_rate(self.step, schedule.total_steps, self.config), stop)
        except WaitInterrupted:
            self.save(run)
            return None
        except (TrainingError, DataError):
            if self._is_finite():
                self.save(run)
            raise
        self._epoch_loss += loss
        self._epoch_steps += 1
        return StepReport(step=self.step, loss=loss, chars=self.chars_per_step)

    def update(self, rate: float, stop: Stop = lambda: False) -> float:
        """Take one optimizer step with learning rate `rate`; return the batch's mean loss in nats per character.

        Raises:
            TrainingError: loss or gradient are not finite; the weights are as they were.
            DataError: there are no more data; the weights are as they were.
            WaitInterrupted: `stop` said so while the data were waited for; likewise.
        """
        self.model.train()
        if self.model.config.dropout:
            self._seed_dropout()
        loss = self.loss(self.source.train_batch(self.step, stop))
        self.model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {value} and the gradient's norm {norm.item()}; the last finite state is "
                "kept; start again with a smaller --lr and --fresh, or --dtype float32"
            )
        set_learning_rate(self.optimizers, rate / self.config.lr)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.log.iter_num = self._steps_before + self.step
        return value

    def _seed_dropout(self) -> None:
        bits = np.random.Philox(key=[self.config.seed, _STREAM_DROPOUT], counter=[0, 0, 0, self.step])
        torch.manual_seed(int(bits.random_raw() >> 1))

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean loss over `batch` in nats per character, in the type of the run's products."""
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(part)) for part in batch)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            _, loss = self.model(inputs, targets)
        assert isinstance(loss, torch.Tensor)
        return loss

    @torch.no_grad()
    def validate(self, val_steps: int, stop: Stop = lambda: False) -> float | None:
        """Mean loss over at most `val_steps` validation batches in nats per character; None if stopped on the way."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in self.source.val_batches(val_steps):
            if stop():
                return None
            total += self.loss(batch).item() * batch.targets.size
            count += batch.targets.size
        return total / count

    def _finish_epoch(self, run: RunFolder, schedule: Schedule, stop: Stop) -> bool:
        """Validate, enter the epoch into the log and save; False if stopped before that."""
        val_loss = self.validate(schedule.val_steps, stop)
        if val_loss is None:
            return False
        log = self.log
        log.train.append(self._epoch_loss / self._epoch_steps)
        log.val.append(val_loss)
        log.chars.append(self._chars_before + self.step * self.chars_per_step)
        log.seconds.append(self.seconds)
        self._epoch_loss, self._epoch_steps = 0.0, 0
        if log.best_loss is None or val_loss < log.best_loss:
            log.best_loss = val_loss
            if self._is_finite():
                run.save_model(self.model.arrays(), self.model.config)
        self.save(run)
        return True

    def save(self, run: RunFolder) -> None:
        """Write a checkpoint of everything that is needed to go on.

        Raises:
            TrainingError: a weight is not finite; nothing is written.
            OSError: the disk is full, read-only or broken; the checkpoints on it are as they were.
        """
        if not self._is_finite():
            raise TrainingError(
                f"step {self.step}: a weight is no longer finite, nothing is saved; the checkpoint before it stands: "
                "start again with a smaller --lr and --fresh, or --dtype float32"
            )
        tensors = {f"model.{name}": tensor for name, tensor in self.model.arrays().items()}
        for optimizer in self.optimizers:
            for name, parameter in self._parameters_of(optimizer):
                for key, value in optimizer.state[parameter].items():
                    tensors[f"optimizer.{key}.{name}"] = value.detach().numpy()
        arrays, data = self.source.snapshot()
        tensors |= {f"data.{name}": array for name, array in arrays.items()}
        state: dict[str, Any] = {
            "step": self.step,
            "steps_before": self._steps_before,
            "chars_before": self._chars_before,
            "data": data,
            "epoch_loss": self._epoch_loss,
            "epoch_steps": self._epoch_steps,
            "seconds": self.seconds,
            "log": self.log.to_dict(),
        }
        run.save_checkpoint(Checkpoint(tensors=tensors, state=state))

    def _parameters_of(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters that `optimizer` holds, by name."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [(name, parameter) for name, parameter in self.model.named_parameters() if id(parameter) in held]

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())

    def begin_from(self, weights: Tensors, log: LossLog | None = None) -> None:
        """Begin with the weights, and the log if given, of another run; the optimizer begins anew.

        Raises:
            RunError: the weights are of another shape of model; nothing is changed.
        """
        self.model.load_arrays(weights)
        if log is not None:
            self.log = log
            self._steps_before, self._chars_before = log.iter_num, log.chars[-1] if log.chars else 0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put everything back to where `checkpoint` was saved.

        Raises:
            RunError: the checkpoint was made by another shape of model; nothing is changed.
        """
        tensors, state = checkpoint.tensors, checkpoint.state
        weights = {name.removeprefix("model."): array for name, array in tensors.items() if name.startswith("model.")}
        self.model.load_arrays(weights)
        for optimizer in self.optimizers:
            for name, parameter in self._parameters_of(optimizer):
                suffix = f".{name}"
                optimizer.state[parameter] = {
                    key.removeprefix("optimizer.").removesuffix(suffix): torch.from_numpy(array.copy())
                    for key, array in tensors.items()
                    if key.startswith("optimizer.") and key.endswith(suffix)
                }
        arrays = {name.removeprefix("data."): array for name, array in tensors.items() if name.startswith("data.")}
        self.source.restore(arrays, state["data"])
        self.log = LossLog.from_dict(state["log"])
        self.step = int(state["step"])
        self._steps_before, self._chars_before = int(state["steps_before"]), int(state["chars_before"])
        self._epoch_loss, self._epoch_steps = float(state["epoch_loss"]), int(state["epoch_steps"])
        self.seconds = float(state["seconds"])


def seconds_of(call: Callable[[], object]) -> float:
    """How long `call` takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
