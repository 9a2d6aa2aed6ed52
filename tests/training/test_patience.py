"""Runs that end early: the cool-down, and the notice that validation no longer improves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch

from picogpt.cli import train
from picogpt.cli.progress import divergence
from picogpt.config import TrainConfig
from picogpt.errors import ConfigError
from picogpt.runs.folder import RunFolder
from picogpt.runs.loss_log import LossLog
from picogpt.schedule import Budget, Schedule, cool_down, epochs_since_best, lr_at_step
from picogpt.training.distributed import Ranks
from picogpt.training.plan import _check_patience
from picogpt.training.trainer import Trainer
from tests.conftest import TINY, Watcher, tiny_source

CONFIG = TrainConfig(batch_size=2, windows=3, lr=1e-2, min_lr=0.0, warmup_steps=2)
PLAN = Schedule(total_steps=100, steps_per_epoch=5, val_steps=1)
RISING = [3.0, 2.0, 1.0, 1.5, 1.4, 1.6, 1.7]
"""The third epoch is the best."""


class Scripted(Trainer):
    """Finds the validation losses that it is told to find, and then lower and lower ones."""

    def __init__(self, losses: Sequence[float]) -> None:
        super().__init__(TINY, CONFIG, tiny_source(CONFIG, TINY), torch.float32)
        self.losses = list(losses)
        self.weights_after: list[list[torch.Tensor]] = []

    def validate(self, _val_steps: int, _stop: object = None) -> float:
        """The next loss of the script."""
        self.weights_after.append([p.detach().clone() for p in self.model.parameters()])
        n = len(self.log.val)
        return self.losses[n] if n < len(self.losses) else 0.5 - 0.01 * n


@pytest.fixture(name="run")
def _run(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    with folder.lock():
        yield folder


def fit(trainer: Trainer, run: RunFolder, plan: Schedule = PLAN, stop_after: int | None = None) -> tuple[bool, list[str]]:
    """Train; return whether it came to its end, and what it said."""
    watcher, said = Watcher(stop_after), list[str]()
    return trainer.fit(run, plan, watcher, watcher.stop, notify=said.append), said


def test_epochs_since_best() -> None:
    """Counted from the first of the lowest."""
    assert [epochs_since_best(RISING[: n + 1]) for n in range(7)] == [0, 0, 0, 1, 2, 3, 4]
    assert epochs_since_best([1.0, 1.0]) == 1


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("min_lr", [0.0, 1e-3, 1e-2])
@pytest.mark.parametrize("best_step", [1, 12, 13, 60, 90])
def test_rates_of_a_cool_down(decay: Literal["linear", "cosine"], min_lr: float, best_step: int) -> None:
    """They begin with the rate of the best weights, and come down to the floor in a fifth of the steps to them."""
    config = TrainConfig(lr=1e-2, min_lr=min_lr, warmup_steps=10, decay=decay)
    plan = cool_down(PLAN, 95, best_step, config)
    rates = [lr_at_step(step, plan, config) for step in range(95, plan.total_steps + 1)]

    assert plan.total_steps - 95 == -(-best_step // 5)
    assert rates[0] == pytest.approx(max(min_lr, lr_at_step(best_step - 1, PLAN, config)))
    assert rates[-1] == pytest.approx(min_lr)
    assert rates == sorted(rates, reverse=True)


def test_patience_ends_a_run(run: RunFolder) -> None:
    """Two epochs without a better loss: back to the best weights, with the rate on its way to zero."""
    trainer = Scripted(RISING)
    trainer.patience = 2
    finished, said = fit(trainer, run)

    assert finished
    # 25 steps until patience is at an end; the best weights came after 15 of them, a fifth of which is 3.
    assert trainer.step == 28
    assert said == [
        "validation loss has not improved for 2 epochs (best 1.0000, in epoch 3): restored its weights; cooling down from them "
        "in 3 steps"
    ]
    assert len(trainer.log.val) == 6


def test_a_cool_down_starts_from_the_best_weights(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of its first step are those after the third epoch, not the latest ones."""
    trainer, first = Scripted(RISING), list[list[torch.Tensor]]()
    trainer.patience = 2
    step = Trainer.train_step

    def watched(self: Trainer, *given: object) -> float:
        if self.step == 25:
            first.append([p.detach().clone() for p in self.model.parameters()])
        return step(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "train_step", watched)
    fit(trainer, run)

    assert all(map(torch.equal, first[0], trainer.weights_after[2]))
    assert not all(map(torch.equal, first[0], trainer.weights_after[4]))


@pytest.mark.parametrize("stop_after", [24, 25, 26, 27])
def test_a_cool_down_is_resumed(run: RunFolder, tmp_path: Path, stop_after: int) -> None:
    """A run that is stopped before, at or in its cool-down ends with the weights of one that was not stopped."""
    other = RunFolder(tmp_path / "straight")
    other.create()
    straight = Scripted(RISING)
    straight.patience = 2
    fit(straight, other)
    stopped = Scripted(RISING)
    stopped.patience = 2
    assert not fit(stopped, run, stop_after=stop_after)[0]
    resumed = Scripted(RISING)
    resumed.patience = 2
    resumed.restore(run.load_checkpoint()[0])
    plan = resumed.stored_schedule
    assert (plan is not None) == (stop_after > 25)
    resumed.cooling_down = plan is not None
    finished, _ = fit(resumed, run, Schedule(**plan["schedule"]) if plan else PLAN)

    assert finished
    assert resumed.step == 28
    assert resumed.log.val == straight.log.val
    assert all(map(torch.equal, resumed.model.parameters(), straight.model.parameters()))


def test_a_rise_is_said_once(run: RunFolder) -> None:
    """At the third epoch without a better loss; not again in the same run, and not after a resume."""
    trainer = Scripted([*RISING, 0.9, 1.5, 1.5, 1.5, 1.5])
    _, said = fit(trainer, run, Schedule(total_steps=60, steps_per_epoch=5, val_steps=1))

    assert said == [
        "validation loss has not improved for 3 epochs (best 1.0000, in epoch 3): the model may be overfitting; the best weights "
        "are kept, so the run can end now (Ctrl-C); for the next one use more text, --dropout 0.1, a shorter run or --patience"
    ]
    assert trainer.step == 60


def test_imported_epochs_do_not_count(run: RunFolder) -> None:
    """The losses of an imported run, on another text, are no reason to stop a run that improves."""
    for patience in (2, None):
        trainer = Scripted([0.0, 0.0, 2.9, 2.8, 2.7, 2.6, 2.5])
        log = LossLog(train=[0.5, 0.6], val=[0.5, 0.6], chars=[10, 20], seconds=[1.0, 2.0], best_loss=None, iter_num=8)
        trainer.init_from_weights(trainer.model.arrays(), log)
        trainer.patience = patience
        finished, said = fit(trainer, run, Schedule(total_steps=25, steps_per_epoch=5, val_steps=1))

        assert (finished, said, trainer.step, trainer.imported_epochs) == (True, [], 25, 2)
        assert divergence(LossLog(train=[1.0, 2.9], val=[1.0, 2.9], chars=[1, 2], seconds=[1.0, 2.0]), 88, first=1) is None


def overfitting(*more: str) -> list[str]:
    """Flags of a run on a text so short that it is soon known by heart."""
    flags = "--run short --text short.txt --n-layer 1 --n-head 2 --n-embd 16 --context-len 8 --windows 2 --lr 0.03 --threads 1 --kernels torch"
    return [*flags.split(), *more]


@pytest.fixture(name="short_text")
def _short_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text(
        "the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. " * 3 + "zyx 987 " * 6
    )


@pytest.mark.usefixtures("short_text")
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    """A real run ends early and says so; started again it is finished; a longer length is trained again."""
    assert train.main(overfitting("--chars", "20000", "--patience", "2")) == 0
    err = capsys.readouterr().err
    assert "validation loss has not improved for 2 epochs (best " in err
    log = RunFolder(Path("logs/short")).load_checkpoint()[0].state
    assert train.main(["--run", "short"]) == 0
    again = capsys.readouterr().err
    assert f"finished, all {log['step']:,} steps are done" in again
    assert RunFolder(Path("logs/short")).read_config()["schedule"]["total_steps"] == log["step"]
    assert train.main(["--run", "short", "--chars", "30000"]) == 0
    assert RunFolder(Path("logs/short")).load_checkpoint()[0].state["step"] > log["step"]


@pytest.mark.usefixtures("short_text")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--recipe", "seed"],
            "--patience needs a learning rate that decays to the end of the run, and in recipe seed it decays within",
        ),
        (["--minutes", "1"], "--patience must be given without minutes, got 2"),
        (["--patience", "0"], "--patience must be a whole number"),
    ],
    ids=" ".join,
)
def test_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, before anything is trained."""
    assert train.main(overfitting("--patience", "2", *flags)) == 2
    assert message in capsys.readouterr().err


def test_needs_a_single_process() -> None:
    """Two ranks cannot cool down together."""
    with pytest.raises(ConfigError, match="^patience needs a single process, got 2 ranks; leave --patience out$"):
        _check_patience(Budget(patience=2), TrainConfig(), Ranks(0, 2))


@pytest.mark.usefixtures("short_text")
def test_minutes_after_a_cool_down(capsys: pytest.CaptureFixture[str]) -> None:
    """A run that has cooled down is trained on by the clock, which has no patience."""
    start = time.monotonic()
    assert train.main(overfitting("--chars", "20000", "--patience", "2")) == 0
    step = RunFolder(Path("logs/short")).load_checkpoint()[0].state["step"]
    # The time of the first start counts too, and a busy machine takes long.
    assert train.main(["--run", "short", "--minutes", str((time.monotonic() - start + 3) / 60)]) == 0

    assert RunFolder(Path("logs/short")).load_checkpoint()[0].state["step"] > step
    assert RunFolder(Path("logs/short")).read_config()["budget"]["patience"] is None
    assert "cooling down" not in capsys.readouterr().err.rpartition("resuming")[2]


@pytest.mark.usefixtures("short_text")
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(["--chars", "20000", "--patience", "2"], id="patience"),
        pytest.param(["--minutes", "0.03"], id="minutes", marks=pytest.mark.slow),
    ],
)
def test_a_replaced_plan_is_gone(first: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is given another length and dies before its next checkpoint has that length all the same."""
    assert train.main(overfitting(*first)) == 0
    before = RunFolder(Path("logs/short")).load_checkpoint()[0].state["step"]

    def lost(*_: object, **__: object) -> bool:
        raise OSError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", lost)
        assert train.main(["--run", "short", "--chars", "40000"]) == 1
    assert train.main(["--run", "short"]) == 0
    folder = RunFolder(Path("logs/short"))

    after = folder.load_checkpoint()[0].state["step"]

    assert folder.read_config()["budget"]["chars"] == 40_000
    assert after > before
    # Patience may end it before 40,000 characters, in steps of 32.
    assert "--patience" in first or after == 1250
