"""A model and its optimizers on one rank: how they take a step, and all that is needed to make the same ones elsewhere."""

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
from picogpt.model.gpt import GPT
from picogpt.rng import Stream, philox
from picogpt.runs.folder import Checkpoint, Tensors
from picogpt.schedule import fraction_of_peak
from picogpt.training.concurrent import count_thread_groups, parallel_backward
from picogpt.training.distributed import SINGLE_PROCESS, Ranks, translate_dist_errors
from picogpt.training.optim import Muon, OuterOptimizer, build_optimizers, set_learning_rate

__all__ = ["TrainState", "pack_step", "strip_prefix", "unpack_step"]

_RATE = struct.Struct("<d")


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What all ranks have to agree on, beside the tensors."""

    version: str
    model: dict[str, Any]
    train: dict[str, Any]
    backend: dict[str, Any]
    step: int
    local_steps: int


class TrainState:
    """A model, its optimizers, and the steps they have taken.

    Args:
        model_config: shape of the model.
        config: how it is trained.
        dtype: type of the matrix products; bfloat16 is used through autocast, weights and sums stay float32.
        device: where it is.
        ranks: those that train with it.
        kernels: what computes the blocks, instead of torch's functions.
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
        torch.manual_seed(config.seed)
        self.model = GPT(model_config).to(device)
        self.model.transformer.kernels = kernels
        self.optimizers = build_optimizers(self.model, config, dtype)
        self.outer = OuterOptimizer(self.model.parameters()) if config.sync_every else None
        self.step = 0
        """Optimizer steps taken so far; those of a run that was brought over are not among them."""
        self.local_steps = 0
        """Steps since the last outer step, where there are outer steps."""
        self._compiled = False
        self._trained: nn.Module | None = None
        """The model as training calls it, once the ranks have been brought together."""

    def compile_blocks(self) -> None:
        """Have torch.compile translate the blocks when they are first called; weights and their names stay as they are."""
        self._compiled = True
        for block in self.model.transformer.h:
            block.compile()

    def apply(self, backend: Backend) -> None:
        """Take up the parts of `backend` that are no arguments of the constructor."""
        transformer = self.model.transformer
        if backend.compile:
            self.compile_blocks()
        if backend.attention is not None:
            transformer.attention = backend.attention
        transformer.gradient_checkpointing = backend.gradient_checkpointing

    def to_spec(self, tensors: Tensors) -> Checkpoint:
        """All that another rank needs to make this state, with `tensors` for those that it is to have."""
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
        """The choice that selects the same backend on another rank."""
        transformer = self.model.transformer
        return BackendChoice(
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            kernels=kernels_name(transformer.kernels),
            attention=transformer.attention,
            threads=torch.get_num_threads(),
            compile=self._compiled,
            gradient_checkpointing=transformer.gradient_checkpointing,
        )

    @classmethod
    def from_spec(cls, checkpoint: Checkpoint, ranks: Ranks, threads: int | None) -> TrainState:
        """The state that rank 0 has planned, computing with `threads` threads, or as many as rank 0 for None.

        Raises:
            RanksError: rank 0 has another version of picogpt.
            TrainingError: its device is not there, or no C compiler where it has one.
        """
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
        """Whether the ranks have been brought together."""
        return self._trained is not None

    def wrap_ddp(self) -> None:
        """Be trained with the other ranks from now on; all of them have the same weights, or local ones of the same run.

        DistributedDataParallel orders its buckets by the first backward pass, and more than two ranks add up in the order of
        the buckets. That pass is taken here, so that a run that goes on adds up like one that was never stopped.
        """
        if self.outer is not None or self.ranks.count == 1:
            self._trained = self.model
            return
        self._trained = self.ranks.wrap_ddp(self.model, self.device)
        self.model.train()
        ids = np.zeros((self._sequences_per_rank, self.config.windows * self.model.config.context_len), np.int64)
        with translate_dist_errors():
            self.loss(Batch(ids, ids)).backward()  # type: ignore[no-untyped-call]

    @property
    def _sequences_per_rank(self) -> int:
        """Rolls of a batch that are each rank's."""
        return self.config.batch_size // self.ranks.count

    def local_step(self, batch: Batch, rate: float) -> float:
        """Take one optimizer step with learning rate `rate` on this rank's share of `batch`.

        Returns:
            The mean loss of the whole batch in nats per character, before the update.

        Raises:
            TrainingError: loss or gradient are not finite on one of the ranks; the weights are as they were on all of them.
            RanksError: a rank is gone; likewise.
        """
        self.model.train()
        if self.model.config.dropout:
            self._seed_dropout()
        rolls = slice(self.ranks.rank * self._sequences_per_rank, (self.ranks.rank + 1) * self._sequences_per_rank)
        share = Batch(batch.inputs[rolls], batch.targets[rolls])
        self.model.zero_grad(set_to_none=True)
        if self._groups > 1:
            return self.optimizer_step(rate, parallel_backward(self.loss, list(self.model.parameters()), share, self._groups))
        loss = self.loss(share)
        with translate_dist_errors():
            loss.backward()  # type: ignore[no-untyped-call]
        return self.optimizer_step(rate, loss.item())

    @property
    def _groups(self) -> int:
        """Groups of threads that take sequences of their own.

        The native kernels divide a step's work better; draws of dropout and gradients that are averaged with other ranks'
        on their way have an order to keep.
        """
        by_torch = self.model.transformer.kernels is None and self.device.type == "cpu" and not self._compiled
        if not by_torch or self.model.config.dropout or self._trained is not self.model:
            return 1
        shape = self.model.config
        return count_thread_groups(self._sequences_per_rank, torch.get_num_threads(), (shape.context_len + 1) * shape.n_embd)

    def optimizer_step(self, rate: float, loss: float) -> float:
        """Update the weights by the gradient that they have, unless it is not finite; return the ranks' mean `loss`."""
        norm = self._clip_gradient(self.config.grad_clip or math.inf)
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
            self.local_steps += 1
            if self.local_steps == self.config.sync_every:
                self.outer_step()
        return mean

    def _clip_gradient(self, most: float) -> float:
        """Scale the gradient down to norm `most`, if it has more; return what it had."""
        norm = torch.nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        if not norm + 1e-6 <= most:  # where it is, torch would multiply all of it by one
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), most, norm)
        return norm.item()

    def _seed_dropout(self) -> None:
        bits = philox(self.config.seed, Stream.DROPOUT, self.ranks.rank, self.step)
        torch.manual_seed(int(bits.random_raw() >> 1))

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean loss over `batch` in nats per character, in the type of the run's products."""
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(part)).to(self.device) for part in batch)
        model = self._trained if self._trained is not None and self.model.training else self.model
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            _, loss = model(inputs, targets)
        assert isinstance(loss, torch.Tensor)
        return loss

    @torch.no_grad()
    def outer_step(self) -> None:
        """Take an outer step with the weights that all ranks have come to, and go on from its result."""
        self.apply_outer_step(self.ranks.all_reduce_mean([parameter.detach() for parameter in self.model.parameters()]))

    @torch.no_grad()
    def apply_outer_step(self, means: list[torch.Tensor]) -> None:
        """Take an outer step with these means of the weights over the ranks."""
        assert self.outer is not None
        self.outer.step(means)
        for parameter, anchor in zip(self.model.parameters(), self.outer.anchors, strict=True):
            parameter.copy_(anchor)
        self.local_steps = 0

    def load_weights(self, weights: Tensors) -> None:
        """Begin with the weights of another model.

        Raises:
            RunError: they are of another shape; nothing is changed.
        """
        self.model.load_arrays(weights)
        if self.outer is not None:
            self.outer = OuterOptimizer(self.model.parameters())

    def state_tensors(self) -> Tensors:
        """The weights and the optimizers' tensors, by name."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.arrays().items()}
        for optimizer in self.optimizers:
            for name, parameter in self._parameters_of(optimizer):
                for key, value in optimizer.state[parameter].items():
                    tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().numpy()
        return tensors

    def checkpoint_bytes(self) -> int:
        """Bytes of all ranks' tensors in a checkpoint, those included that the optimizers make in their first step."""
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        moments = 0
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    # Muon keeps a mean square for each neuron, AdamW for each weight.
                    squares = max(parameter.shape) if isinstance(optimizer, Muon) else parameter.numel()
                    moments += parameter.numel() + squares + 1
        own, common = weights + moments, 2 * weights if self.outer is not None else 0
        return 4 * (own * (self.ranks.count if self.outer is not None else 1) + common)

    def outer_tensors(self) -> Tensors:
        """Those that all ranks have in common while they train by themselves: of the outer optimizer."""
        tensors: Tensors = {}
        if self.outer is not None:
            for name, anchor in zip(self.model.arrays(), self.outer.anchors, strict=True):
                tensors[f"anchor.{name}"] = anchor.cpu().numpy()
                momentum = self.outer.sgd.state[anchor].get("momentum_buffer")
                if momentum is not None:
                    tensors[f"outer.{name}"] = momentum.cpu().numpy()
        return tensors

    def load_tensors(self, tensors: Tensors) -> None:
        """Take up what `state_tensors` and `outer_tensors` have given; other names are passed over.

        Raises:
            RunError: the weights are of another shape of model; nothing is changed.
        """
        self.model.load_arrays(strip_prefix("model.", tensors))
        held = strip_prefix("optimizer.", tensors)
        for optimizer in self.optimizers:
            for name, parameter in self._parameters_of(optimizer):
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
        """A copy of `array` as a tensor."""
        return torch.from_numpy(array.copy()).to(self.device)

    def _parameters_of(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters that `optimizer` holds, by name."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [(name, parameter) for name, parameter in self.model.named_parameters() if id(parameter) in held]


def strip_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """Those of `tensors` whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


def pack_step(batch: Batch, rate: float) -> bytes:
    """What another rank needs to take the same step: the learning rate, and the ids of `batch`, a byte each.

    They stand roll by roll, each with the id that follows its last one.
    """
    return _RATE.pack(rate) + np.concatenate((batch.inputs, batch.targets[:, -1:]), axis=1).astype(np.uint8).tobytes()


def unpack_step(content: bytes, n_rolls: int) -> tuple[Batch, float]:
    """The inverse of `pack_step`."""
    (rate,) = _RATE.unpack_from(content)
    rows = np.frombuffer(content, np.uint8, offset=_RATE.size).reshape(n_rolls, -1).astype(np.int64)
    return Batch(rows[:, :-1], rows[:, 1:]), rate
