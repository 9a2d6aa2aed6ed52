"""Training state of one rank of several: DDP or DiLoCo around the single-process state, and how it is sent to a worker.

With DDP (Li et al., 2020) the ranks average their gradients in every step. With DiLoCo (Douillard et al., 2023) each rank takes
`sync_every` local steps, and an outer step then averages the weights.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from picogpt import __version__
from picogpt.backend import Backend, BackendChoice
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import Batch
from picogpt.device import CPU
from picogpt.errors import RanksError
from picogpt.ids import id_dtype
from picogpt.kernels.compiled import Kernels, kernels_name
from picogpt.runs.checkpoint import Checkpoint
from picogpt.runs.tensor_file import Tensors
from picogpt.training.distributed import SINGLE_PROCESS, Ranks, translate_dist_errors
from picogpt.training.optim import OuterOptimizer
from picogpt.training.state import TrainState

__all__ = ["DataParallelState", "pack_step", "unpack_step"]

_LR = struct.Struct("<d")


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Everything besides tensors that a worker needs to build the same training state as rank 0."""

    # Plain dicts, as the spec travels as JSON.
    version: str
    model: dict[str, Any]
    train: dict[str, Any]
    backend: dict[str, Any]
    step: int
    local_steps: int


class DataParallelState(TrainState):
    """The training state of one rank.

    Args:
        ranks: the group of ranks that train together. The other arguments are those of `TrainState`.
    """

    def __init__(
        self,
        model_config: GPTConfig,
        config: TrainConfig,
        dtype: torch.dtype,
        *,
        device: torch.device = CPU,
        ranks: Ranks = SINGLE_PROCESS,
        kernels: Kernels | None = None,
    ) -> None:
        super().__init__(model_config, config, dtype, device=device, kernels=kernels)
        self.join(ranks)

    def join(self, ranks: Ranks) -> None:
        """Become the state of a rank of `ranks`. Initial weights depend on the seed alone, so all ranks start from the same."""
        self.ranks, self.rank = ranks, ranks.rank
        self.outer = OuterOptimizer(self.model.parameters()) if self.config.sync_every else None
        self.local_steps = 0
        """Steps since the last outer step (DiLoCo)."""
        self._trained: nn.Module | None = None
        """The model as training calls it: wrapped in DDP, or the plain model; None until `wrap_ddp`."""

    def to_spec(self, tensors: Tensors) -> Checkpoint:
        """Return everything a worker needs to build this training state, with `tensors` as its weights and optimizer state."""
        spec = WorkerSpec(
            version=__version__,
            model=asdict(self.model.config),
            train=asdict(self.config),
            backend=self._backend_names()._asdict(),
            step=self.step,
            local_steps=self.local_steps,
        )
        return Checkpoint(tensors=tensors, state=asdict(spec))

    def _backend_names(self) -> BackendChoice:
        """Return the choice that selects the same backend on another rank."""
        return BackendChoice(
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),  # torch.bfloat16 -> bfloat16
            kernels=kernels_name(self.runner.kernels),
            attention=self.runner.attention,
            threads=torch.get_num_threads(),
            compile=self._compiled,
            gradient_checkpointing=self.runner.gradient_checkpointing,
        )

    @classmethod
    def from_spec(cls, checkpoint: Checkpoint, ranks: Ranks, threads: int | None) -> DataParallelState:
        """Build the training state that rank 0 has sent, with `threads` threads, or as many as rank 0 for None.

        Raises:
            RanksError: rank 0 has another version of picogpt.
            TrainingError: this machine lacks rank 0's kind of device, or a C compiler that rank 0 has.
        """
        # First of all: another version may have other fields, or other numerics.
        version = checkpoint.state.get("version")
        if version != __version__:
            raise RanksError(f"rank 0 has picogpt {version} and this machine {__version__}; install the same one everywhere")
        spec = WorkerSpec(**checkpoint.state)
        model, train = GPTConfig(**spec.model), TrainConfig(**spec.train)
        choice = BackendChoice(**{**spec.backend, "threads": threads or spec.backend["threads"]})
        backend = Backend.select(model, choice, sequences=train.batch_size // ranks.count, local_rank=ranks.local_rank)
        state = cls(model, train, backend.dtype, device=backend.device, ranks=ranks, kernels=backend.kernels)
        state.apply_backend(backend)
        state.load_tensors(checkpoint.tensors)
        state.step, state.local_steps = spec.step, spec.local_steps
        return state

    @property
    def is_wrapped(self) -> bool:
        """Whether `wrap_ddp` was called, so that steps can be taken."""
        return self._trained is not None

    def wrap_ddp(self) -> None:
        """Wrap the model in DDP. All ranks must hold the same weights, or with DiLoCo local weights of the same run.

        DistributedDataParallel orders its buckets by the first backward pass, and more than two ranks add up in the order of
        the buckets. That pass is taken here, so that a resumed run is bit-identical to one that was never stopped.
        """
        if self.outer is not None or self.ranks.count == 1:
            # DiLoCo averages weights at outer steps instead of gradients, and a single process averages nothing.
            self._trained = self.model
            return
        self._trained = self.ranks.wrap_ddp(self.model, self.device)
        self.model.train()
        # Any text does, as these gradients are thrown away: (B / ranks, T) zeros.
        ids = np.zeros((self.sequences_per_step, self.config.windows * self.model.config.context_len), np.int64)
        with translate_dist_errors():
            self.loss(Batch(ids, ids)).backward()  # type: ignore[no-untyped-call]

    @property
    def sequences_per_step(self) -> int:
        """Sequences of a batch that each rank computes."""
        return self.config.batch_size // self.ranks.count

    @property
    def thread_groups(self) -> int:
        """Number of thread groups: 1 with DDP, as gradient buckets have an order to keep."""
        return super().thread_groups if self._trained is self.model else 1

    @property
    def forward_model(self) -> nn.Module:
        """The module that `loss` calls: DDP in training; in validation the plain model, as no worker takes part in it."""
        return self._trained if self._trained is not None and self.model.training else self.model

    def backward(self, batch: Batch) -> float:
        """Compute the gradients of this rank's part of `batch`; with DDP they are averaged over the ranks.

        Raises:
            RanksError: a rank is gone.
        """
        # Every rank gets the whole batch, and takes its own rows.
        rows = slice(self.rank * self.sequences_per_step, (self.rank + 1) * self.sequences_per_step)
        part = Batch(batch.inputs[rows], batch.targets[rows])  # (B / ranks, T) each
        with translate_dist_errors():
            return super().backward(part)

    def mean_over_processes(self, loss: float, norm: float) -> tuple[float, float]:
        """Return the means of loss and gradient norm over the ranks, the same on each: all of them raise or none does."""
        pairs = self.ranks.all_gather([loss, norm])
        mean_loss, mean_norm = (math.fsum(values) / len(pairs) for values in zip(*pairs, strict=True))
        return mean_loss, mean_norm

    def optimizer_step(self, lr: float, loss: float) -> float:
        """Update the weights as in a single process; with DiLoCo take an outer step after `sync_every` local steps."""
        mean = super().optimizer_step(lr, loss)
        if self.outer is not None:
            self.local_steps += 1
            if self.local_steps == self.config.sync_every:
                self.outer_step()
        return mean

    @torch.no_grad()
    def outer_step(self) -> None:
        """Take an outer step (DiLoCo): average the weights over the ranks, step the outer optimizer, continue from its result."""
        self.apply_outer_step(self.ranks.all_reduce_mean([parameter.detach() for parameter in self.model.parameters()]))

    @torch.no_grad()
    def apply_outer_step(self, means: list[torch.Tensor]) -> None:
        """Take an outer step, given the means of the weights over the ranks."""
        assert self.outer is not None
        self.outer.step(means)
        for parameter, anchor in zip(self.model.parameters(), self.outer.anchors, strict=True):
            # All ranks start the next local steps from the same weights.
            parameter.copy_(anchor)
        self.local_steps = 0

    def load_weights(self, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        """Start from the weights of another model; the anchors of DiLoCo are copies of them.

        Raises:
            RunError: the weights have another shape; nothing is changed.
        """
        super().load_weights(weights)
        if self.outer is not None:
            self.outer = OuterOptimizer(self.model.parameters())

    def checkpoint_bytes(self) -> int:
        """Return the bytes of all ranks' tensors in a checkpoint."""
        own = super().checkpoint_bytes()
        if self.outer is None:
            return own
        # With DiLoCo each rank saves a state of its own, and the anchors and their momentum are saved once, in float32.
        return own * self.ranks.count + 2 * 4 * sum(parameter.numel() for parameter in self.model.parameters())

    def outer_tensors(self) -> Tensors:
        """Return the outer optimizer's state, which is the same on all ranks."""
        tensors: Tensors = {}
        if self.outer is not None:
            for name, anchor in zip(self.model.arrays(), self.outer.anchors, strict=True):
                tensors[f"anchor.{name}"] = anchor.cpu().numpy()
                momentum = self.outer.sgd.state[anchor].get("momentum_buffer")
                if momentum is not None:
                    tensors[f"outer.{name}"] = momentum.cpu().numpy()
        return tensors

    def load_tensors(self, tensors: Tensors) -> None:
        """Load the tensors of `state_tensors` and `outer_tensors`; other names are ignored.

        Raises:
            RunError: the weights have another shape; nothing is changed.
        """
        super().load_tensors(tensors)
        if self.outer is not None:
            for name, anchor in zip(self.model.arrays(), self.outer.anchors, strict=True):
                anchor.copy_(self.on_device(tensors[f"anchor.{name}"]))
                if f"outer.{name}" in tensors:
                    self.outer.sgd.state[anchor] = {"momentum_buffer": self.on_device(tensors[f"outer.{name}"])}


def pack_step(batch: Batch, lr: float, vocab_size: int) -> bytes:
    """Serialize a step for the workers: the learning rate, then the ids of `batch`, a byte or two each.

    Ids are stored sequence by sequence, each with the target of its last character: T + 1 ids hold inputs and targets.
    """
    # Targets are the inputs shifted by one, so only the last one is new: (B, T) and (B, 1) -> (B, T + 1).
    return _LR.pack(lr) + np.concatenate((batch.inputs, batch.targets[:, -1:]), axis=1).astype(id_dtype(vocab_size)).tobytes()


def unpack_step(content: bytes, n_sequences: int, vocab_size: int) -> tuple[Batch, float]:
    """Deserialize a step: the inverse of `pack_step`."""
    (lr,) = _LR.unpack_from(content)
    ids = np.frombuffer(content, id_dtype(vocab_size), offset=_LR.size)
    rows = ids.reshape(n_sequences, -1).astype(np.int64)  # (B, T + 1)
    return Batch(rows[:, :-1], rows[:, 1:]), lr
