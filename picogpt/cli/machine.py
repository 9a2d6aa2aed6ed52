"""What a start of training computes with: settled before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from picogpt.cli.common import notice
from picogpt.cli.settings import Request
from picogpt.config import GPTConfig, RunSettings, TrainConfig
from picogpt.errors import ConfigError, TrainingError
from picogpt.wording import plural

if TYPE_CHECKING:
    from picogpt.device import Device, DType
    from picogpt.kernels.compiled import Kernels
    from picogpt.ranks import Ranks

__all__ = ["Machine"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Device, threads, type of number and functions, and why each was chosen."""

    device: Device
    device_reason: str
    threads: int
    threads_reason: str
    dtype: DType
    dtype_reason: str
    kernels: Kernels | None
    """None where torch computes the blocks."""
    kernels_reason: str
    attention: str | None
    """Form of attention, one of `picogpt.config.ATTENTIONS`; None where it is computed in C."""
    attention_reason: str
    compile: bool
    """Whether torch.compile translates the blocks."""

    @classmethod
    def settle(cls, request: Request, stored: RunSettings | None, model: GPTConfig, config: TrainConfig, ranks: Ranks) -> Machine:
        """Choose by the flags, else as the run was begun, else what is fastest here; torch's threads are set.

        Raises:
            ConfigError: a step cannot be divided among the ranks, or flags exclude each other.
            TrainingError: there is no such device, or no compiler.
        """
        from picogpt.device import choose_device, choose_dtype, flush_denormals, keep_freed_memory, set_threads

        if config.batch_size % ranks.count:
            raise ConfigError(
                f"batch_size must be a multiple of the {ranks.count} ranks that share a step, got {config.batch_size}",
                "batch_size",
            )
        device, device_reason = choose_device(request.device or (stored.device if stored else "auto"), ranks.local_rank)
        if device.type == "mps" and ranks.count > 1:
            raise TrainingError("--device mps: torch connects no ranks on such a GPU; take --device cpu, or one process")
        compiled = stored.compile if stored and request.compile is None else bool(request.compile)
        flush_denormals()
        keep_freed_memory()
        threads = set_threads(request.threads or (stored.threads if stored else None))
        dtype, dtype_reason = choose_dtype(request.dtype or (stored.dtype if stored else "auto"), device)
        wanted = request.kernels or (stored.kernels if stored else "auto")
        if request.kernels is None and (compiled or device.type != "cpu"):
            wanted = "torch"  # a run that was begun in C goes on elsewhere, which is said, as it was not asked for by name
        kernels, kernels_reason = _kernels(wanted, model, dtype, device, compiled=compiled)
        attention, attention_reason = None, ""
        if kernels is None:
            sequences = config.batch_size // ranks.count
            attention, attention_reason = _attention(stored, model, sequences, dtype, device)
        return cls(
            device=device,
            device_reason=device_reason,
            threads=threads.count,
            threads_reason=threads.reason,
            dtype=dtype,
            dtype_reason=dtype_reason,
            kernels=kernels,
            kernels_reason=kernels_reason,
            attention=attention,
            attention_reason=attention_reason,
            compile=compiled,
        )

    @property
    def dtype_name(self) -> str:
        """Of the matrix products: float32 or bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def kernels_name(self) -> str:
        """Of what computes the blocks: c or torch."""
        from picogpt.kernels.compiled import kernels_name

        return kernels_name(self.kernels)

    def changes(self, stored: RunSettings, ranks: int) -> list[tuple[str, object, object]]:
        """What is not as it was when the run was last started: name, then and now."""
        now_and_before = (
            ("threads", stored.threads, self.threads),
            ("ranks", stored.ranks, ranks),
            ("device", stored.device, self.device.type),
            ("dtype", stored.dtype, self.dtype_name),
            ("compile", stored.compile, self.compile),
            ("kernels", stored.kernels, self.kernels_name),
            ("attention", *self._attention_then_and_now(stored)),
        )
        return [(name, before, now) for name, before, now in now_and_before if before != now]

    def _attention_then_and_now(self, stored: RunSettings) -> tuple[str | None, str | None]:
        """Alike where other kernels compute it now, which is a change of its own."""
        if stored.kernels != self.kernels_name:
            return self.attention, self.attention
        return (stored.attention or "an older form" if self.attention else None), self.attention

    def description(self) -> str:
        """What computes, in a line."""
        said = (
            f"computing in {self.dtype_name} ({self.dtype_reason}) with {plural(self.threads, 'thread')} ({self.threads_reason})"
        )
        if self.compile:
            said += ", blocks compiled by torch (the first steps take longer)"
        else:
            said += f", blocks by functions in {'torch' if self.kernels is None else 'C'} ({self.kernels_reason})"
        return said if self.attention is None else f"{said}, attention {self.attention} ({self.attention_reason})"


def _attention(stored: RunSettings | None, model: GPTConfig, sequences: int, dtype: DType, device: Device) -> tuple[str, str]:
    """Form of attention of a run in torch and the reason for it: the one it was begun with, or what is fast here."""
    from picogpt.attention import choose_attention

    if stored is not None and stored.attention is not None:
        return stored.attention, "as the run was begun"
    return choose_attention(model, sequences, dtype, device)


def _kernels(wanted: str, model: GPTConfig, dtype: DType, device: Device, *, compiled: bool) -> tuple[Kernels | None, str]:
    from picogpt.device import check_compiler
    from picogpt.kernels.compiled import choose_kernels

    if not compiled:
        return choose_kernels(wanted, model, dtype, device, notice)
    if wanted == "c":
        raise ConfigError(
            "kernels c and --compile exclude each other, take --no-compile: torch cannot compile what is compiled already",
            "kernels",
        )
    check_compiler()
    return None, "torch compiles them"
