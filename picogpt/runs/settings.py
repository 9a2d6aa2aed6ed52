"""The settings of a run on disk: the content of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from picogpt.checks import ATTENTIONS, KERNELS, check_choice
from picogpt.config import DataConfig, GPTConfig, TrainConfig
from picogpt.errors import ConfigError
from picogpt.schedule import Budget, Schedule

__all__ = ["RunSettings"]

_BEFORE: Mapping[str, Any] = MappingProxyType({"muon_interval": 1})
"""Settings of runs that were begun before there were these."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All that made a run: the content of its `config.json`."""

    model: GPTConfig
    train: TrainConfig
    budget: Budget
    schedule: Schedule
    data: DataConfig
    dtype: str
    """Type of the matrix products, float32 or bfloat16."""
    threads: int
    """Threads that each rank computes with; another number gives other roundings."""
    ranks: int = 1
    """Processes that train together; another number gives other roundings."""
    device: str = "cpu"
    """Where they compute: cpu, cuda or mps."""
    compile: bool = False
    """Whether the blocks are compiled by torch, which rounds otherwise."""
    kernels: str = "torch"
    """What computes the blocks, c or torch; they round otherwise."""
    attention: str | None = None
    """Form of attention where torch computes it, one of `ATTENTIONS`; None in C, and where a run is older than the forms."""
    origin: str | None = None
    """Absolute path of the model that the run began from, or of the original's log; None where it began from nothing."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RunSettings:
        """The inverse of `dataclasses.asdict`; what else is in `content` is passed over.

        Raises:
            ConfigError: a part is missing or not valid.
        """
        try:
            data: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content["data"].items()}
            return cls(
                model=GPTConfig(**content["model"]),
                train=TrainConfig(**{**_BEFORE, **content["train"]}),
                budget=Budget(**content["budget"]),
                schedule=Schedule(**content["schedule"]),
                data=DataConfig(**data),
                dtype=str(content["dtype"]),
                threads=int(content["threads"]),
                ranks=int(content.get("ranks", 1)),
                device=str(content.get("device", "cpu")),
                compile=bool(content.get("compile", False)),
                kernels=str(check_choice("kernels", content.get("kernels", "torch"), KERNELS)),
                attention=check_choice("attention", content.get("attention"), ATTENTIONS),
                origin=content.get("origin"),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the run's config is not valid ({type(error).__name__}: {error})") from error
