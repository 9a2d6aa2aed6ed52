"""Runs that end early: the mean of the weights, and the notice that validation no longer improves."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from picogpt.cli import train
from picogpt.cli.progress import divergence
from picogpt.config import TrainConfig
from picogpt.errors import ConfigError
from picogpt.runs.folder import RunFolder
from picogpt.runs.loss_log import LossLog
from picogpt.runs.model_file import load_model
from picogpt.runs.names import MODEL_FILE
from picogpt.runs.tensor_file import Tensors
from picogpt.schedule import Budget, Schedule, epochs_since_best, lr_at_step
from picogpt.training.averaging import WeightAverage
from picogpt.training.distributed import Ranks
from picogpt.training.history import History
from picogpt.training.plan import _check_patience
from picogpt.training.state import strip_prefix
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
        self.weights_after: list[Tensors] = []

    def validate(self, _val_steps: int, _stop: object = None) -> float:
        """The next loss of the script."""
        self.weights_after.append(named(self))
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


def named(trainer: Trainer) -> Tensors:
    """Copies of a trainer's weights, by name."""
    return {name: array.copy() for name, array in trainer.model.arrays().items()}


def same(ones: Mapping[str, npt.NDArray[Any]], others: Mapping[str, npt.NDArray[Any]]) -> list[bool]:
    """Whether each weight is the same in both."""
    assert ones.keys() == others.keys()
    return [np.array_equal(ones[name], others[name]) for name in ones]


def test_patience_ends_a_run(run: RunFolder) -> None:
    """Two epochs without a better loss are the last ones; the file of the model has the weights of the best one."""
    trainer = Scripted(RISING)
    trainer.set_patience(2)
    finished, said = fit(trainer, run)

    assert finished
    assert trainer.step == 25
    assert said == [
        "validation loss has not improved for 2 epochs (best 1.0000, in epoch 3): the run ends here, with the weights of that epoch"
    ]
    assert len(trainer.log.val) == 5
    best = load_model(run.path / MODEL_FILE).weights
    assert all(same(best, trainer.weights_after[2]))
    assert not any(same(best, named(trainer)))


def test_without_patience_nothing_is_averaged(run: RunFolder) -> None:
    """A run without it validates and keeps the weights themselves."""
    trainer = Scripted([3.0, 2.0])
    fit(trainer, run, Schedule(total_steps=10, steps_per_epoch=5, val_steps=1))

    assert trainer.average is None
    assert all(same(trainer.weights_after[1], named(trainer)))


def test_the_mean_is_validated(run: RunFolder) -> None:
    """Validation sees the mean of the weights so far; training goes on with the weights, as it would without patience."""
    trainer, alone = Scripted([3.0, 2.0]), Scripted([3.0, 2.0])
    trainer.set_patience(2)
    plan = Schedule(total_steps=12, steps_per_epoch=4, val_steps=1)
    means, fractions = named(trainer), [lr_at_step(step, plan, CONFIG) / CONFIG.lr for step in range(12)]
    # By hand, from the weights after steps 4 and 8 of a run that averages nothing.
    for end in (4, 8):
        while alone.step < end:
            alone.train_step(lr_at_step(alone.step, plan, CONFIG))
        share = 4 / (0.1 * end * fractions[end - 1] + 4)
        own = named(alone)
        means = {name: mean + share * (own[name] - mean) for name, mean in means.items()}
    alone.train_step(lr_at_step(8, plan, CONFIG))
    fit(trainer, run, plan, stop_after=9)

    for name, seen in trainer.weights_after[1].items():
        np.testing.assert_allclose(seen, means[name], rtol=1e-5, atol=1e-7)
    assert all(same(named(trainer), named(alone)))


def test_the_sample_is_of_the_mean(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is generated after an epoch is generated with the weights that were validated."""
    trainer, recorded = Scripted([3.0, 2.0]), list[Tensors]()
    trainer.set_patience(2)
    monkeypatch.setattr(History, "record", lambda _history, state, *_: recorded.append(named(state)))
    fit(trainer, run, Schedule(total_steps=10, steps_per_epoch=5, val_steps=1))

    assert len(recorded) == 2
    assert all(same(recorded[1], trainer.weights_after[1]))


def test_the_mean_at_rate_zero() -> None:
    """It is the weights: a run that comes to its planned end has lost nothing by its patience."""
    trainer = Scripted([])
    average = WeightAverage(trainer.model)
    trainer.train_step(1e-2)
    average.update(400, 0.0)

    assert all(same(average.arrays(), named(trainer)))


def test_a_stopped_validation_leaves_the_weights(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped while the mean is validated is saved with its own weights."""
    trainer = Scripted([])
    trainer.set_patience(2)
    monkeypatch.setattr(Scripted, "validate", lambda *_: None)
    stops = iter([False] * 5 + [True] * 5)
    trainer.fit(run, PLAN, Watcher(), lambda: next(stops))
    saved = strip_prefix("model.", run.load_checkpoint()[0].tensors)

    assert trainer.step == 5
    assert all(same(saved, named(trainer)))
    assert trainer.average is not None
    assert not any(same(saved, trainer.average.arrays()))


@pytest.mark.parametrize("stop_after", [3, 10, 14, 24])
def test_a_mean_is_resumed(run: RunFolder, tmp_path: Path, stop_after: int) -> None:
    """A stopped run ends with the weights, and the mean of them, of one that was not stopped."""
    other = RunFolder(tmp_path / "straight")
    other.create()
    straight = Scripted(RISING)
    straight.set_patience(2)
    fit(straight, other)
    stopped = Scripted(RISING)
    stopped.set_patience(2)
    assert not fit(stopped, run, stop_after=stop_after)[0]
    resumed = Scripted(RISING)
    resumed.set_patience(2)
    resumed.restore(run.load_checkpoint()[0])
    finished, _ = fit(resumed, run)

    assert finished
    assert resumed.step == 25
    assert resumed.log.val == straight.log.val
    assert all(same(named(resumed), named(straight)))
    assert resumed.average is not None
    assert straight.average is not None
    assert all(same(resumed.average.arrays(), straight.average.arrays()))


def test_patience_that_comes_later(run: RunFolder) -> None:
    """A run that is resumed with patience has no mean yet: it begins with the weights as they are."""
    first = Scripted([])
    fit(first, run, stop_after=7)
    resumed = Scripted([])
    resumed.set_patience(2)
    resumed.restore(run.load_checkpoint()[0])

    assert resumed.average is not None
    assert all(same(resumed.average.arrays(), named(first)))


@pytest.mark.parametrize(("patience", "expected"), [(None, 40), (2, 10)])
def test_epochs_of_a_pass(patience: int | None, expected: int) -> None:
    """With patience an epoch has at most a pass over the text; an explicit length of epochs is kept."""
    budget = Budget(chars=80_000, patience=patience)
    assert budget.schedule(chars_per_step=100, train_chars=1099).steps_per_epoch == expected
    assert budget.schedule(chars_per_step=100).steps_per_epoch == 40
    assert replace(budget, steps_per_epoch=33).schedule(chars_per_step=100, train_chars=1099).steps_per_epoch == 33


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
        trainer.set_patience(patience)
        finished, said = fit(trainer, run, Schedule(total_steps=25, steps_per_epoch=5, val_steps=1))

        assert (finished, said, trainer.step, trainer.imported_epochs) == (True, [], 25, 2)
        assert divergence(LossLog(train=[1.0, 2.9], val=[1.0, 2.9], chars=[1, 2], seconds=[1.0, 2.0]), 88, first=1) is None


def test_the_mean_begins_with_the_initial_weights() -> None:
    """The mean of a run that starts from another model is that model's, not that of the random weights before."""
    trainer, other = Scripted([1.0]), Scripted([1.0])
    trainer.set_patience(2)
    weights = {name: array + 1 for name, array in other.model.arrays().items()}
    trainer.init_from_weights(weights)

    assert trainer.average is not None
    for name, mean in trainer.average.arrays().items():
        np.testing.assert_array_equal(mean, weights[name])


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
def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The mean of the weights counts for the forecast: it is in both checkpoints and in memory."""
    disk = []
    for more in ([], ["--patience", "2"]):
        assert train.main(overfitting("--chars", "20000", "--n-embd", "128", "--dry-run", *more)) == 0
        found = re.search(r"disk (\d+) MB", capsys.readouterr().err)
        assert found
        disk.append(int(found[1]))

    assert disk[1] > disk[0]


@pytest.mark.usefixtures("short_text")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "1"], "--patience cannot be combined with minutes"),
        (["--patience", "0"], "--patience must be a whole number"),
    ],
    ids=" ".join,
)
def test_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, before anything is trained."""
    assert train.main(overfitting("--patience", "2", *flags)) == 2
    assert message in capsys.readouterr().err


def test_needs_a_single_process() -> None:
    """Ranks have no common mean of their weights."""
    with pytest.raises(ConfigError, match="^patience needs a single process, got 2 ranks; leave --patience out$"):
        _check_patience(Budget(patience=2), Ranks(0, 2))


@pytest.mark.usefixtures("short_text")
def test_minutes_after_patience(capsys: pytest.CaptureFixture[str]) -> None:
    """A run that patience has ended is trained on by the clock, which has none."""
    start = time.monotonic()
    assert train.main(overfitting("--chars", "20000", "--patience", "2")) == 0
    step = RunFolder(Path("logs/short")).load_checkpoint()[0].state["step"]
    # The time of the first start counts too, and a busy machine takes long.
    assert train.main(["--run", "short", "--minutes", str((time.monotonic() - start + 3) / 60)]) == 0

    assert RunFolder(Path("logs/short")).load_checkpoint()[0].state["step"] > step
    assert RunFolder(Path("logs/short")).read_config()["budget"]["patience"] is None
    assert "the run ends here" not in capsys.readouterr().err.rpartition("resuming")[2]


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
