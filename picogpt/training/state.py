"""Training state of one rank: a model and its optimizers, how they take a step, and how they are sent to another rank."""

from __future__ import annotations

import math
import struct
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
from picogpt.errors import RanksError, TrainingError
from picogpt.kernels.compiled import Kernels, kernels_name
from picogpt.model.accelerate import accelerate
from picogpt.model.gpt import GPT
from picogpt.rng import Stream, philox
from picogpt.runs.folder import Checkpoint, Tensors
from picogpt.schedule import fraction_of_peak
from picogpt.training.concurrent import count_thread_groups, parallel_backward
from picogpt.training.distributed import SINGLE_PROCESS, Ranks, translate_dist_errors
from picogpt.training.optim import Muon, OuterOptimizer, build_optimizers, set_learning_rate

__all__ = ["TrainState", "pack_step", "strip_prefix", "unpack_step"]

_RATE = struct.Struct("<d")  # the learning rate of a step, sent without rounding


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


class TrainState:
    """A model, its optimizers and the number of steps taken, on one rank.

    Args:
        model_config: shape of the model.
        config: training settings.
        dtype: type of the GEMMs; bfloat16 is used through autocast, weights and sums stay float32.
        device: device of the weights.
        ranks: the group of ranks that train together.
        kernels: native kernels that compute the blocks; None computes them with torch.
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
        self.config, self.dtype, self.device, self.ranks = config, dtype, device, ranks
        shape = (model_config.n_embd, model_config.n_head, model_config.context_len)
        assert kernels is None or (kernels.shape, kernels.dtype) == (shape, dtype), "compiled for another model"
        # The initial weights depend on the seed alone, so all ranks start from the same ones.
        torch.manual_seed(config.seed)
        self.model = GPT(model_config).to(device)
        # Attached from outside: the model's own code is plain torch, and its state dict does not change.
        self.fast_blocks = accelerate(self.model, kernels)
        """Implementation of the blocks."""
        self.optimizers = build_optimizers(self.model, config, dtype, kernels)
        self.outer = OuterOptimizer(self.model.parameters()) if config.sync_every else None
        self.step = 0
        """Optimizer steps taken so far, without the steps of an imported run."""
        self.local_steps = 0
        """Steps since the last outer step (DiLoCo)."""
        self._compiled = False
        self._trained: nn.Module | None = None
        """The model as training calls it: wrapped in DDP, or the plain model; None until `wrap_ddp`."""

    def compile_blocks(self) -> None:
        """Compile the blocks with torch.compile at their first call; weights and their names stay the same."""
        self._compiled = True
        for block in self.model.transformer.h:
            # In place: a wrapped module would add a prefix to the names in the state dict.
            block.compile()

    def apply(self, backend: Backend) -> None:
        """Apply the parts of `backend` that are not arguments of the constructor."""
        if backend.compile:
            self.compile_blocks()
        # None with native kernels, which have their own attention.
        if backend.attention is not None:
            self.fast_blocks.attention = backend.attention
        self.fast_blocks.gradient_checkpointing = backend.gradient_checkpointing

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
            kernels=kernels_name(self.fast_blocks.kernels),
            attention=self.fast_blocks.attention,
            threads=torch.get_num_threads(),
            compile=self._compiled,
            gradient_checkpointing=self.fast_blocks.gradient_checkpointing,
        )

    @classmethod
    def from_spec(cls, checkpoint: Checkpoint, ranks: Ranks, threads: int | None) -> TrainState:
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
        state.apply(backend)
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
        ids = np.zeros((self._sequences_per_rank, self.config.windows * self.model.config.context_len), np.int64)
        with translate_dist_errors():
            self.loss(Batch(ids, ids)).backward()  # type: ignore[no-untyped-call]

    @property
    def _sequences_per_rank(self) -> int:
        """Sequences of a batch that each rank takes."""
        return self.config.batch_size // self.ranks.count

    def local_step(self, batch: Batch, rate: float) -> float:
        """Take one training step with learning rate `rate` on this rank's part of `batch`.

        Returns:
            The mean loss of the whole batch in nats per character, before the update.

        Raises:
            TrainingError: loss or gradient are not finite on one of the ranks; the weights are unchanged on all of them.
            RanksError: a rank is gone; the weights are unchanged.
        """
        self.model.train()
        if self.model.config.dropout:
            self._seed_dropout()
        # Every rank gets the whole batch, and takes its own rows.
        rows = slice(self.ranks.rank * self._sequences_per_rank, (self.ranks.rank + 1) * self._sequences_per_rank)
        part = Batch(batch.inputs[rows], batch.targets[rows])  # (B / ranks, T) each
        self.model.zero_grad(set_to_none=True)  # the backward pass then writes gradients instead of adding to them
        if self._groups > 1:
            return self.optimizer_step(rate, parallel_backward(self.loss, list(self.model.parameters()), part, self._groups))
        loss = self.loss(part)
        with translate_dist_errors():
            loss.backward()  # type: ignore[no-untyped-call]
        return self.optimizer_step(rate, loss.item())

    @property
    def _groups(self) -> int:
        """Number of thread groups that each compute sequences of their own (`picogpt.training.concurrent`).

        It is 1 with native kernels, which divide a step's work better, and with dropout and DDP, as random draws and
        gradient buckets have an order to keep.
        """
        by_torch = self.fast_blocks.kernels is None and self.device.type == "cpu" and not self._compiled
        if not by_torch or self.model.config.dropout or self._trained is not self.model:
            return 1
        shape = self.model.config
        return count_thread_groups(self._sequences_per_rank, torch.get_num_threads(), (shape.context_len + 1) * shape.n_embd)

    def optimizer_step(self, rate: float, loss: float) -> float:
        """Clip the gradient and update the weights, unless loss or gradient are not finite; return the ranks' mean `loss`."""
        norm = self._clip_gradient(self.config.grad_clip or math.inf)
        # All ranks compute the same means, so all of them raise or none does.
        found = self.ranks.all_gather([loss, norm])
        mean, mean_norm = (math.fsum(values) / len(found) for values in zip(*found, strict=True))
        if not (math.isfinite(mean) and math.isfinite(mean_norm)):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {mean} and the gradient's norm {mean_norm}; the last finite state is "
                "kept; start again with a smaller --lr and --fresh, or --dtype float32"
            )
        set_learning_rate(self.optimizers, fraction_of_peak(rate, self.config))
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.outer is not None:
            # DiLoCo: after `sync_every` local steps the ranks average their weights.
            self.local_steps += 1
            if self.local_steps == self.config.sync_every:
                self.outer_step()
        return mean

    def _clip_gradient(self, most: float) -> float:
        """Clip the global norm of the gradient to `most`; return the norm before clipping."""
        norm = torch.nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        # Below the limit torch would multiply every gradient by 1, a pass over memory for nothing. NaN takes the branch too.
        if not norm + 1e-6 <= most:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), most, norm)
        return norm.item()

    def _seed_dropout(self) -> None:
        # A seed of its own for each rank and step: a resumed run draws the same masks without saving the generator.
        bits = philox(self.config.seed, Stream.DROPOUT, self.ranks.rank, self.step)
        torch.manual_seed(int(bits.random_raw() >> 1))  # 63 bits: torch takes no seed from 2^63 on

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the mean loss over `batch` in nats per character, under autocast where products are in bfloat16."""
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(part)).to(self.device) for part in batch)
        # Validation calls the plain model: DDP would wait for workers that take no part in it.
        model = self._trained if self._trained is not None and self.model.training else self.model
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            _, loss = model(inputs, targets)  # (B, T) each -> scalar
        assert isinstance(loss, torch.Tensor)
        return loss

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

    def load_weights(self, weights: Tensors) -> None:
        """Start from the weights of another model.

        Raises:
            RunError: the weights have another shape; nothing is changed.
        """
        self.model.load_arrays(weights)
        # The anchors are copies of the weights.
        if self.outer is not None:
            self.outer = OuterOptimizer(self.model.parameters())

    def state_tensors(self) -> Tensors:
        """Return the weights and the inner optimizers' state, by name."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.arrays().items()}
        for optimizer in self.optimizers:
            for name, parameter in self._parameters_of(optimizer):
                for key, value in optimizer.state[parameter].items():
                    tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().numpy()
        return tensors

    def checkpoint_bytes(self) -> int:
        """Return the bytes of all ranks' tensors in a checkpoint, including optimizer state that the first step creates."""
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        moments = 0
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    # Muon keeps a mean square for each neuron, AdamW for each weight.
                    squares = max(parameter.shape) if isinstance(optimizer, Muon) else parameter.numel()
                    moments += parameter.numel() + squares + 1
        # With DiLoCo each rank saves a state of its own, and the anchors and their momentum are saved once.
        own, common = weights + moments, 2 * weights if self.outer is not None else 0
        return 4 * (own * (self.ranks.count if self.outer is not None else 1) + common)  # float32

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
        self.model.load_arrays(strip_prefix("model.", tensors))
        held = strip_prefix("optimizer.", tensors)
        for optimizer in self.optimizers:
            for name, parameter in self._parameters_of(optimizer):
                # Names are optimizer.KEY.PARAMETER, such as optimizer.momentum.transformer.h.0.attn.c_attn.weight.
                suffix = f".{name}"
                optimizer.state[parameter] = {
                    key.removesuffix(suffix): self.on_device(array) for key, array in held.items() if key.endswith(suffix)
                }
        if self.outer is not None:
            for name, anchor in zip(self.model.arrays(), self.outer.anchors, strict=True):
                anchor.copy_(self.on_device(tensors[f"anchor.{name}"]))
                if f"outer.{name}" in tensors:
                    self.outer.sgd.state[anchor] = {"momentum_buffer": self.on_device(tensors[f"outer.{name}"])}

    def on_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Copy `array` to a tensor on this state's device."""
        return torch.from_numpy(array.copy()).to(self.device)

    def _parameters_of(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the parameters that `optimizer` holds, with their names."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [(name, parameter) for name, parameter in self.model.named_parameters() if id(parameter) in held]


def strip_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """Return the tensors whose names start with `prefix`, with the prefix removed."""
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


def pack_step(batch: Batch, rate: float) -> bytes:
    """Serialize a step for the workers: the learning rate, then the ids of `batch`, a byte each.

    Ids are stored sequence by sequence, each with the target of its last character: T + 1 bytes hold inputs and targets.
    """
    # Targets are the inputs shifted by one, so only the last one is new: (B, T) and (B, 1) -> (B, T + 1).
    return _RATE.pack(rate) + np.concatenate((batch.inputs, batch.targets[:, -1:]), axis=1).astype(np.uint8).tobytes()


def unpack_step(content: bytes, n_sequences: int) -> tuple[Batch, float]:
    """Deserialize a step: the inverse of `pack_step`."""
    (rate,) = _RATE.unpack_from(content)
    rows = np.frombuffer(content, np.uint8, offset=_RATE.size).reshape(n_sequences, -1).astype(np.int64)  # (B, T + 1)
    return Batch(rows[:, :-1], rows[:, 1:]), rate
