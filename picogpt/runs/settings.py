"""Settings of a run, as stored in its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from picogpt.alphabet import Alphabet
from picogpt.checks import ATTENTIONS, DEVICES, DTYPES, KERNELS, check_choice, check_threads, require, require_whole
from picogpt.config import DataConfig, GPTConfig, TrainConfig
from picogpt.errors import ConfigError
from picogpt.schedule import Budget, Schedule

__all__ = ["RunSettings"]

# Training settings that older runs did not store, with the values that their code used.
_LEGACY_DEFAULTS: Mapping[str, Any] = MappingProxyType({"muon_interval": 1})


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything that determines a run's numbers; stored so that a resumed run continues bit for bit.

    Raises:
        ConfigError: a part of the backend is unknown or out of its range.
    """

    model: GPTConfig
    train: TrainConfig
    budget: Budget
    schedule: Schedule
    data: DataConfig
    # The backend. Each of these changes the rounding, so a resumed run keeps them unless told otherwise.
    dtype: str
    """Type of the GEMMs, float32 or bfloat16."""
    threads: int
    """Threads per rank; another number changes the order of sums, and so the rounding."""
    ranks: int = 1
    """Processes that train together; another number changes the rounding."""
    device: str = "cpu"
    """Device: cpu, cuda or mps."""
    compile: bool = False
    """Whether the blocks are compiled by torch.compile, which changes the rounding."""
    kernels: str = "torch"
    """Kernels of the blocks, c or torch; they differ in rounding."""
    attention: str | None = None
    """Implementation of attention in torch, one of `ATTENTIONS`; None with native kernels, and in older runs."""
    origin: str | None = None
    """Absolute path of the initial model, or of the original project's log; None for random weights."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("device", self.device, DEVICES)
        check_threads(self.threads)
        require_whole("ranks", self.ranks, 1)
        check_choice("kernels", self.kernels, KERNELS)
        check_choice("attention", self.attention, ATTENTIONS)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for config.json."""
        content = asdict(self)
        content["data"]["alphabet"] = self.data.alphabet.to_json()
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RunSettings:
        """Return the settings from the content of config.json; other keys, such as versions, are ignored.

        Raises:
            ConfigError: a setting is missing or invalid.
        """
        try:
            # JSON has no tuples; the fields of the frozen config are tuples.
            data: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content["data"].items()}
            data["alphabet"] = Alphabet.from_json(data.get("alphabet"))  # older runs have no entry
            model, vocab_size = GPTConfig(**content["model"]), data["alphabet"].vocab_size
            require(model.vocab_size == vocab_size, "vocab_size", f"{vocab_size}, that of the alphabet", model.vocab_size)
            return cls(
                model=model,
                train=TrainConfig(**{**_LEGACY_DEFAULTS, **content["train"]}),
                budget=Budget(**content["budget"]),
                schedule=Schedule(**content["schedule"]),
                data=DataConfig(**data),
                dtype=str(content["dtype"]),
                threads=int(content["threads"]),
                # From here on, keys that older runs lack.
                ranks=int(content.get("ranks", 1)),
                device=str(content.get("device", "cpu")),
                compile=bool(content.get("compile", False)),
                kernels=str(content.get("kernels", "torch")),
                attention=content.get("attention"),
                origin=content.get("origin"),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # an edited or damaged file
            raise ConfigError(f"the run's config is not valid ({type(error).__name__}: {error})") from error
