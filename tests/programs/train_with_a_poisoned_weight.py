"""picogpt-train, where a weight is NaN from step 40 on."""

import sys

from picogpt.cli.train import main
from picogpt.data import Stop
from picogpt.training.trainer import Trainer

update = Trainer.train_step


def update_poisoned(trainer: Trainer, rate: float, stop: Stop) -> float:
    """Take a step, with the NaN in it when its time has come."""
    if trainer.step == 40:
        trainer.model.transformer.ln_f.bias.data[0] = float("nan")
    return update(trainer, rate, stop)


Trainer.train_step = update_poisoned  # type: ignore[assignment,method-assign]
sys.exit(main())
