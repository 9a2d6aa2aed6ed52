"""picogpt-train that waits before a step until a file is there, so that a test can disturb it in time: STEP FILE FLAG..."""

import sys
import time
from pathlib import Path

from picogpt.cli.train import command
from picogpt.data import Stop
from picogpt.training.trainer import Trainer

__all__ = ["hold"]


def hold(step: int, file: Path) -> None:
    """Have all trainers wait before `step` until `file` exists."""
    train_step = Trainer.train_step

    def held(self: Trainer, lr: float, stop: Stop = lambda: False) -> float:
        while self.step == step and not file.exists():
            time.sleep(0.01)
        return train_step(self, lr, stop)

    Trainer.train_step = held  # type: ignore[method-assign]


if __name__ == "__main__":
    hold(int(sys.argv[1]), Path(sys.argv[2]))
    del sys.argv[1:3]
    command()
