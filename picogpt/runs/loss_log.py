"""The loss log of a run: `log.pkl`, a pickle of plain values that the original project's tools can read, and `log.csv`."""

from __future__ import annotations

import csv
import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from picogpt.errors import RunError

__all__ = ["LossLog", "read_log"]


@dataclass(kw_only=True)
class LossLog:
    """The loss log. Each list has one entry per epoch."""

    train: list[float] = field(default_factory=list)
    """Mean training loss of each epoch, in nats per character."""
    val: list[float] = field(default_factory=list)
    """Validation loss after each epoch, in nats per character."""
    chars: list[int] = field(default_factory=list)
    """Characters trained on by the end of each epoch."""
    seconds: list[float] = field(default_factory=list)
    """Seconds spent training by the end of each epoch."""
    steps: list[int | None] = field(default_factory=list)
    """Optimizer steps by the end of each epoch; None in logs that are older than this list."""
    rates: list[float | None] = field(default_factory=list)
    """Learning rate of the last step of each epoch; None in logs that are older than this list."""
    best_loss: float | None = None
    """Lowest validation loss so far: the loss of the weights in `model.safetensors`."""
    iter_num: int = 0
    """Optimizer steps so far."""

    def __post_init__(self) -> None:
        # Older logs have fewer lists: their epochs get an entry in the new ones, so that the next epoch is appended in its place.
        for newer in (self.steps, self.rates):
            newer[:0] = [None] * (len(self.val) - len(newer))

    def to_dict(self) -> dict[str, Any]:
        """Return the log as plain values under the original project's keys, plus `chars`, `seconds`, `steps` and `rates`."""
        # Lists are copied, so a later epoch does not change a log that is being written.
        return {
            "losses": {"train": list(self.train), "val": list(self.val)},
            "best_loss": self.best_loss,
            "iter_num": self.iter_num,
            "chars": list(self.chars),
            "seconds": list(self.seconds),
            "steps": list(self.steps),
            "rates": list(self.rates),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LossLog:
        """Return the log that `to_dict` turned into `content`.

        Raises:
            KeyError, TypeError, ValueError: `content` has another form.
        """
        best = content["best_loss"]
        log = cls(
            train=[float(x) for x in content["losses"]["train"]],
            val=[float(x) for x in content["losses"]["val"]],
            chars=[int(x) for x in content["chars"]],
            seconds=[float(x) for x in content["seconds"]],
            steps=[None if x is None else int(x) for x in content.get("steps", [])],
            rates=[None if x is None else float(x) for x in content.get("rates", [])],
            best_loss=None if best is None else float(best),
            iter_num=int(content["iter_num"]),
        )
        # Plots and reports zip the lists, so all must have an entry for each epoch.
        if len({len(x) for x in (log.train, log.val, log.chars, log.seconds, log.steps, log.rates)}) != 1:
            raise ValueError("its lists have different lengths")
        return log

    def to_pickle(self) -> bytes:
        """Return the content of `log.pkl`."""
        return pickle.dumps(self.to_dict(), protocol=4)

    def to_csv(self) -> str:
        """Return the log as a table for spreadsheets and pandas: a header and one row per epoch.

        Columns: epoch, step, chars, seconds, train_loss, val_loss and best in nats per character, lr, chars_per_second.
        Unknown values are empty.
        """
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["epoch", "step", "chars", "seconds", "train_loss", "val_loss", "best", "lr", "chars_per_second"])
        columns = (self.steps, self.chars, self.seconds, self.train, self.val, self.rates)
        best, before = math.inf, (0, 0.0)
        for epoch, (step, chars, seconds, train, val, rate) in enumerate(zip(*columns, strict=True), start=1):
            best = min(best, val)
            # An imported log has no times.
            spent = seconds - before[1]
            speed = round((chars - before[0]) / spent, 1) if spent > 0 else None
            before = (chars, seconds)
            rows.writerow([epoch, step, chars, round(seconds, 3), train, val, best, rate, speed])
        return table.getvalue()


def read_log(path: Path) -> LossLog:
    """Read a loss log; reject a pickle that imports anything.

    Raises:
        RunError: the file is missing, damaged or contains more than plain values.
    """
    try:
        with path.open("rb") as stream:
            content = _PlainUnpickler(stream).load()
        return LossLog.from_dict(content)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle can raise almost any exception
        raise RunError(f"{path}: no loss log of picogpt ({type(error).__name__}: {error})") from error


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of numbers, strings, lists and dicts. Every import, through which a pickle runs code, raises."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it imports {module}.{name}, which a log may not do")
