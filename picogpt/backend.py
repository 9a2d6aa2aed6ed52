"""The backend of training: device, threads, dtype and kernels, selected in one place.

The command, the workers of a distributed run and the benchmarks all select their backend here. Generation does not: it runs
without torch (`picogpt.inference`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from picogpt.config import GPTConfig
from picogpt.device import check_compiler, choose_device, choose_dtype, disable_malloc_trim, flush_denormals, set_threads
from picogpt.errors import ConfigError
from picogpt.kernels.compiled import Kernels, kernels_name, select_kernels
from picogpt.model.attention import choose_attention
from picogpt.wording import Notify, plural, say_nothing

__all__ = ["Backend", "BackendChoice"]


class BackendChoice(NamedTuple):
    """A requested backend, by the names of its parts; by default all parts are selected automatically."""

    device: str = "auto"
    """One of `picogpt.checks.DEVICES`."""
    dtype: str = "auto"
    """One of `picogpt.checks.DTYPES`."""
    kernels: str = "auto"
    """One of `picogpt.checks.KERNELS`."""
    kernels_required: bool = True
    """Whether `kernels` must be used: otherwise torch replaces native kernels that do not fit the other parts."""
    attention: str | None = None
    """One of `picogpt.checks.ATTENTIONS`, used when torch computes the blocks; None takes the faster one."""
    threads: int | None = None
    """Number of threads; None takes one per core, as far as the environment allows."""
    compile: bool = False
    """Whether the blocks are compiled by torch.compile."""
    gradient_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass instead of kept."""
    kept: tuple[str, ...] = ()
    """Names of the parts that a resumed run keeps, rather than that were requested now; for the reasons only."""

    def reason_for(self, part: str, reason: str) -> str:
        """Return the reason for a part, which says of a kept one that the run had it."""
        return reason.replace("as requested", "as the run started") if part in self.kept else reason


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Device, threads, dtype and kernels, and the reason for each."""

    device: torch.device
    device_reason: str
    threads: int
    threads_reason: str
    dtype: torch.dtype
    """Type of the matrix products: float32 or bfloat16. Weights and sums are float32."""
    dtype_reason: str
    kernels: Kernels | None
    """Native kernels; None when torch computes the blocks."""
    kernels_reason: str
    attention: str | None
    """Form of torch's attention, one of `picogpt.checks.ATTENTIONS`; None with native kernels."""
    attention_reason: str
    compile: bool
    gradient_checkpointing: bool

    @classmethod
    def select(
        cls, model: GPTConfig, choice: BackendChoice, *, sequences: int, local_rank: int = 0, notify: Notify = say_nothing
    ) -> Backend:
        """Select each part by name, or for `auto` the fastest one here. Sets torch's threads for this process.

        Args:
            model: shape of the model.
            choice: the requested parts.
            sequences: sequences of a step that this process computes, with which the forms of attention are timed.
            local_rank: rank of this process on its machine; each rank has a GPU of its own.
            notify: receives a line before kernels are compiled.

        Raises:
            ConfigError: parts exclude each other.
            TrainingError: the device or a compiler is missing.
        """
        # In this order: dtype depends on the device and is timed with the final threads, kernels are compiled for the dtype.
        device, device_reason = choose_device(choice.device, local_rank)
        flush_denormals()
        disable_malloc_trim()
        threads = set_threads(choice.threads)
        dtype, dtype_reason = choose_dtype(choice.dtype, device)
        kernels, kernels_reason = _select_kernels(model, choice, dtype, device, notify)
        attention, attention_reason = None, ""
        if kernels is None and choice.attention is not None:
            # A resumed run keeps its form of attention, as the two round differently.
            attention, attention_reason = choice.attention, "as the run started"
        elif kernels is None:
            attention, attention_reason = choose_attention(model, sequences, dtype, device)
        return cls(
            device=device,
            device_reason=choice.reason_for("device", device_reason),
            threads=threads.count,
            threads_reason=choice.reason_for("threads", threads.reason),
            dtype=dtype,
            dtype_reason=choice.reason_for("dtype", dtype_reason),
            kernels=kernels,
            kernels_reason=choice.reason_for("kernels", kernels_reason),
            attention=attention,
            attention_reason=attention_reason,
            compile=choice.compile,
            gradient_checkpointing=choice.gradient_checkpointing,
        )

    @property
    def names(self) -> BackendChoice:
        """Return the choice that selects the same backend on a machine like this one."""
        return BackendChoice(
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            kernels=kernels_name(self.kernels),
            attention=self.attention,
            threads=self.threads,
            compile=self.compile,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def describe(self) -> str:
        """Describe the backend and its reasons in one line."""
        said = (
            f"computing in {self.names.dtype} ({self.dtype_reason}) with {plural(self.threads, 'thread')} ({self.threads_reason})"
        )
        if self.compile:
            said += ", blocks compiled by torch (the first steps take longer)"
        else:
            said += f", blocks by {'torch' if self.kernels is None else 'native kernels'} ({self.kernels_reason})"
        return said if self.attention is None else f"{said}, attention {self.attention} ({self.attention_reason})"


def _select_kernels(
    model: GPTConfig, choice: BackendChoice, dtype: torch.dtype, device: torch.device, notify: Notify
) -> tuple[Kernels | None, str]:
    """Return the native kernels, or None for torch, and the reason."""
    if not choice.kernels_required and (choice.compile or device.type != "cpu"):
        # A run with native kernels is resumed with torch.compile or on a GPU; the change is printed (`Plan.backend_changes`).
        choice = choice._replace(kernels="torch")
    if not choice.compile:
        return select_kernels(choice.kernels, model, dtype, device, notify)
    if choice.kernels == "c":
        raise ConfigError(
            "kernels c and --compile exclude each other, use --no-compile: torch cannot compile native kernels",
            "kernels",
        )
    check_compiler()
    return None, "torch compiles them"
