"""Training state of a single process: a model, its optimizers, and how they take a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from picogpt.backend import Backend
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import Batch
from picogpt.device import CPU, torch_threads
from picogpt.errors import TrainingError
from picogpt.kernels.compiled import Kernels
from picogpt.model.accelerate import accelerate
from picogpt.model.gpt import GPT
from picogpt.rng import Stream, philox
from picogpt.runs.tensor_file import Tensors
from picogpt.schedule import fraction_of_peak
from picogpt.training.averaging import WeightAverage
from picogpt.training.concurrent import count_thread_groups, parallel_backward
from picogpt.training.optim import Muon, build_optimizers, set_learning_rate

__all__ = ["TrainState", "strip_prefix"]

_MIN_SHARED_VOCAB = 1024
"""Token ids from which torch's threads share the head's GEMM also beside native kernels."""


class TrainState:
    """A model, its optimizers, the mean of its weights and the number of steps taken.

    Data-parallel training extends this class: see `picogpt.training.data_parallel`.

    Args:
        model_config: shape of the model.
        config: training settings.
        dtype: type of the GEMMs; bfloat16 is used through autocast, weights and sums stay float32.
        device: device of the weights.
        kernels: native kernels that compute the blocks; None computes them with torch.
    """

    def __init__(
        self,
        model_config: GPTConfig,
        config: TrainConfig,
        dtype: torch.dtype,
        *,
        device: torch.device = CPU,
        kernels: Kernels | None = None,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        shape = (model_config.n_embd, model_config.n_head, model_config.context_len)
        assert kernels is None or (kernels.shape, kernels.dtype) == (shape, dtype), "compiled for another model"
        # The initial weights depend on the seed alone.
        torch.manual_seed(config.seed)
        self.model = GPT(model_config).to(device)
        # Attached from outside: the model's own code is plain torch, and its state dict does not change.
        self.runner = accelerate(self.model, kernels)
        """What computes the model without its head."""
        self.average: WeightAverage | None = None
        """Mean of the weights over the last steps; None for a run without patience."""
        self.optimizers = build_optimizers(self.model, config, dtype, kernels)
        self.step = 0
        """Optimizer steps taken so far, without the steps of an imported run."""
        self.rank = 0
        """Rank of this process among those that train together."""
        self.excerpt_probabilities: list[float] = []
        """Probabilities of the first characters of the validation text, by the last validation."""
        self._compiled = False

    def compile_blocks(self) -> None:
        """Compile the blocks with torch.compile at their first call; weights and their names stay the same."""
        self._compiled = True
        for block in self.model.transformer.h:
            # In place: a wrapped module would add a prefix to the names in the state dict.
            block.compile()

    def apply_backend(self, backend: Backend) -> None:
        """Apply the parts of `backend` that are not arguments of the constructor."""
        if backend.compile:
            self.compile_blocks()
        # None with native kernels, which have their own attention.
        if backend.attention is not None:
            self.runner.attention = backend.attention
        self.runner.gradient_checkpointing = backend.gradient_checkpointing

    @property
    def sequences_per_step(self) -> int:
        """Number of sequences of each batch that this process computes."""
        return self.config.batch_size

    def local_step(self, batch: Batch, lr: float) -> float:
        """Take one training step on `batch` with learning rate `lr`.

        Returns:
            The mean loss of the batch in nats per character, before the update.

        Raises:
            TrainingError: loss or gradient are not finite; the weights are unchanged.
        """
        self.model.train()
        if self.model.config.dropout:
            self._seed_dropout()
        self.model.zero_grad(set_to_none=True)
        with torch_threads(self.threads_beside_kernels):
            loss = self.backward(batch)
        return self.optimizer_step(lr, loss)

    def backward(self, batch: Batch) -> float:
        """Compute the gradients of the mean loss over `batch`; return that loss in nats per character."""
        if self.thread_groups > 1:
            return parallel_backward(self.loss, list(self.model.parameters()), batch, self.thread_groups)
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    @property
    def threads_beside_kernels(self) -> int:
        """Number of threads for torch's operations in forward and backward passes.

        With native kernels, which have threads of their own, little is left to torch: the head and the loss. To wake a
        second thread for these takes longer than the operation, unless the alphabet is large.
        """
        small = self.runner.kernels is not None and self.model.config.vocab_size < _MIN_SHARED_VOCAB
        return 1 if small else torch.get_num_threads()

    @property
    def thread_groups(self) -> int:
        """Number of thread groups that each compute sequences of their own (`picogpt.training.concurrent`).

        It is 1 with native kernels, which divide a step's work better, and with dropout, as random draws have an order to keep.
        """
        by_torch = self.runner.kernels is None and self.device.type == "cpu" and not self._compiled
        if not by_torch or self.model.config.dropout:
            return 1
        shape = self.model.config
        return count_thread_groups(self.sequences_per_step, torch.get_num_threads(), (shape.context_len + 1) * shape.n_embd)

    def optimizer_step(self, lr: float, loss: float) -> float:
        """Clip the gradient and update the weights, unless loss or gradient are not finite; return `loss`."""
        norm = self._clip_gradient(self.config.grad_clip or math.inf)
        loss, norm = self.mean_over_processes(loss, norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {loss} and the gradient's norm {norm}; the last finite state is "
                "kept; start again with a smaller --lr and --fresh, or --dtype float32"
            )
        fraction = fraction_of_peak(lr, self.config)
        set_learning_rate(self.optimizers, fraction)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.average is not None:
            self.average.update(self.step, fraction)
        return loss

    def mean_over_processes(self, loss: float, norm: float) -> tuple[float, float]:
        """Return the means of loss and gradient norm over all processes that take this step: here there is one."""
        return loss, norm

    def _clip_gradient(self, max_norm: float) -> float:
        """Clip the global norm of the gradient to `max_norm`; return the norm before clipping."""
        norm = torch.nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        # Below the limit torch would multiply every gradient by 1, a pass over memory for nothing. NaN takes the branch too.
        if not norm + 1e-6 <= max_norm:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm)
        return norm.item()

    def _seed_dropout(self) -> None:
        """Seed the dropout masks of this step from the run's seed, the rank and the step.

        A resumed run then draws the same masks, and no generator state is saved.
        """
        bits = philox(self.config.seed, Stream.DROPOUT, self.rank, self.step)
        torch.manual_seed(int(bits.random_raw() >> 1))  # 63 bits: torch takes no seed from 2^63 on

    @property
    def forward_model(self) -> nn.Module:
        """The module that `loss` calls."""
        return self.model

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the mean loss over `batch` in nats per character."""
        return self.predict(batch)[1]

    def predict(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (B, T, V) and the mean loss, under autocast if the GEMMs are in bfloat16."""
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(part)).to(self.device) for part in batch)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            logits, loss = self.forward_model(inputs, targets)  # (B, T) each
        assert isinstance(loss, torch.Tensor)
        return logits, loss

    def load_weights(self, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        """Start from the weights of another model.

        Raises:
            RunError: the weights have another shape; nothing is changed.
        """
        self.model.load_arrays(weights)
        if self.average is not None:
            self.average = WeightAverage(self.model)  # it has begun with the weights before

    def state_tensors(self) -> Tensors:
        """Return the weights, their mean and the optimizers' state, by name."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.arrays().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.arrays().items()}
        for optimizer in self.optimizers:
            for name, parameter in self._parameters_of(optimizer):
                for key, value in optimizer.state[parameter].items():
                    tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().numpy()
        return tensors

    def checkpoint_bytes(self) -> int:
        """Return the bytes of the tensors in a checkpoint, including optimizer state that the first step creates."""
        weights = sum(parameter.numel() for parameter in self.model.parameters()) * (1 if self.average is None else 2)
        moments = 0
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    # Muon keeps a mean square for each row or column along the longer side, AdamW one for each weight.
                    squares = max(parameter.shape) if isinstance(optimizer, Muon) else parameter.numel()
                    moments += parameter.numel() + squares + 1
        return 4 * (weights + moments)  # float32

    def load_tensors(self, tensors: Tensors) -> None:
        """Load the tensors of `state_tensors`; other names are ignored.

        Raises:
            RunError: the weights have another shape; nothing is changed.
        """
        weights = strip_prefix("model.", tensors)
        self.model.load_arrays(weights)
        if self.average is not None:
            # A run that has got its patience only now has no mean yet, and begins it with its weights.
            self.average.load_arrays(strip_prefix("average.", tensors) or weights)
        optimizer_tensors = strip_prefix("optimizer.", tensors)
        for optimizer in self.optimizers:
            for name, parameter in self._parameters_of(optimizer):
                # Names are optimizer.KEY.PARAMETER, such as optimizer.momentum.transformer.h.0.attn.c_attn.weight.
                suffix = f".{name}"
                optimizer.state[parameter] = {
                    key.removesuffix(suffix): self.on_device(array)
                    for key, array in optimizer_tensors.items()
                    if key.endswith(suffix)
                }

    def on_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Copy `array` to a tensor on this state's device."""
        return torch.from_numpy(array.copy()).to(self.device)

    def _parameters_of(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the parameters that `optimizer` holds, with their names."""
        own_ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [(name, parameter) for name, parameter in self.model.named_parameters() if id(parameter) in own_ids]


def strip_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """Return the tensors whose names start with `prefix`, with the prefix removed."""
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
