"""What a run will take: the arithmetic by hand, a rehearsal that leaves nothing, and a forecast beside the outcome."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from picogpt.cli import train
from picogpt.cli.forecast import SMALL_FILES, EpochEnd, Forecaster, ForecastingObserver, rehearse
from picogpt.config import Pace, Schedule, TrainConfig
from picogpt.data import download_bytes
from picogpt.forecast import Forecast, seconds_to_finish
from picogpt.memory import peak_memory
from picogpt.train import StepReport, Trainer
from tests.conftest import TINY, TINY_FLAGS, tiny_source

SCHEDULE = Schedule(total_steps=25, steps_per_epoch=10, val_steps=4)
PACE = Pace(seconds_per_step=2.0, seconds_per_val_batch=0.5, seconds_per_epoch_end=3.0)
LINE = r"forecast: [\d,]+ characters in all, 0:00:\d\d to finish; peak memory (\d+ MB|[\d.]+ GB), disk \d+ MB, network none"


@pytest.mark.parametrize(
    ("step", "seconds"),
    [
        (0, 25 * 2 + 3 * (4 * 0.5 + 3)),  # epochs of 10, 10 and 5 steps
        (3, 22 * 2 + 3 * 5),
        (10, 15 * 2 + 2 * 5),
        (24, 1 * 2 + 1 * 5),
        (25, 0),
    ],
)
def test_seconds_to_finish(step: int, seconds: float) -> None:
    """The steps that are left, and the end of each epoch that is not over."""
    assert seconds_to_finish(SCHEDULE, PACE, step=step, val_batches=4) == seconds


def test_line() -> None:
    """Units that are easy to read."""
    forecast = Forecast(chars=1_000_000, seconds=3725.4, memory=1_384_000_000, disk=177_600_000, network=2_000_000_000)

    assert str(forecast) == (
        "forecast: 1,000,000 characters in all, 1:02:05 to finish; peak memory 1.38 GB, disk 178 MB, network about 2.00 GB"
    )


def test_download() -> None:
    """A twentieth of what is read is for validation, and 16 MB are read ahead."""
    assert download_bytes(19_000_000) == 20_000_000 + 2**24


def test_peak_memory_sees_an_array() -> None:
    """100 MB more than before are seen, as far as they are touched."""
    before = peak_memory()
    array = np.ones(before + 100_000_000, np.uint8)

    assert peak_memory() >= array.nbytes


class Shown:
    """An observer that counts."""

    def __init__(self) -> None:
        self.steps, self.epochs = 0, 0

    def on_step(self, report: StepReport) -> None:
        self.steps += 1

    def on_epoch(self, trainer: Trainer) -> None:
        self.epochs += 1


def watch(n_steps: int) -> tuple[list[str], Shown]:
    """What is said over an epoch of so many steps."""
    config = TrainConfig(batch_size=2, windows=3)
    trainer = Trainer(TINY, config, tiny_source(config), torch.float32)
    forecaster = Forecaster(schedule=SCHEDULE, chars_per_step=48, first_step=0, val_batches=1, network=0)
    said: list[str] = []
    shown = Shown()
    observer = ForecastingObserver(shown, said.append, forecaster, lambda: EpochEnd(0.0, 1000.0, 5_000_000))
    observer.say_outcome()
    for step in range(1, n_steps + 1):
        observer.on_step(StepReport(step=step, loss=1.0, chars=48))
    observer.on_epoch(trainer)
    observer.say_outcome()
    return said, shown


@pytest.mark.parametrize("n_steps", [1, 3, 8])
def test_is_said_once(n_steps: int) -> None:
    """After the first steps, or with the first epoch if that is shorter, and beside the outcome at the end."""
    said, shown = watch(n_steps)

    assert re.fullmatch(r"forecast: 1,200 characters in all, 0:50:00 to finish; .*, disk 5 MB, network none", said[0])
    assert re.fullmatch(r"took 0:00:00, forecast 0:50:00; peak memory .*, forecast .*", said[1])
    assert (len(said), shown.steps, shown.epochs) == (2, n_steps, 1)


def test_rehearsal_leaves_nothing(tmp_path: Path) -> None:
    """Steps, validation and saving take time, the files have a size, and the folder is empty again."""
    config = TrainConfig(batch_size=2, windows=3)
    seconds, end = rehearse(
        TINY, config, lambda source: Trainer(TINY, config, source, torch.float32), tmp_path, lambda trainer: ""
    )

    assert seconds > 0
    assert end.seconds > 0
    assert end.seconds_per_val_batch > 0
    assert end.disk > SMALL_FILES + 100_000
    assert list(tmp_path.iterdir()) == []


class TestCommand:
    @pytest.fixture(autouse=True)
    def _in_a_folder_of_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")

    def test_dry_run(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It says all that a start says, and leaves no folder."""
        assert train.main(["--text", str(text_file), *TINY_FLAGS, "--epochs", "2", "--steps-per-epoch", "3", "--dry-run"]) == 0
        out, err = capsys.readouterr()

        assert re.search(LINE, err)
        assert "parameters; 2 layers" in err
        assert "6 steps of 2 x 24 characters" in err
        assert "dry run: nothing was trained and nothing is kept" in err
        assert out == ""
        assert list(Path().iterdir()) == []

    def test_start_and_end(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A run says its forecast and what it took; a dry run of more of it changes no file."""
        flags = ["--text", str(text_file), *TINY_FLAGS, "--steps-per-epoch", "4"]
        assert train.main([*flags, "--epochs", "2"]) == 0
        err = capsys.readouterr().err
        assert re.search(LINE, err)
        assert re.search(r"took 0:00:\d\d, forecast 0:00:\d\d; peak memory", err)
        before = {path.name: path.stat().st_mtime_ns for path in Path("logs/numbers").iterdir()}

        assert train.main([*flags, "--epochs", "3", "--dry-run"]) == 0
        err = capsys.readouterr().err
        assert "logs/numbers: would go on from step 8" in err
        assert {path.name: path.stat().st_mtime_ns for path in Path("logs/numbers").iterdir()} == before
        assert train.main([*flags, "--minutes", "1", "--fresh", "--dry-run"]) == 0
        assert "the run that is there would be kept as logs/numbers.old-1" in capsys.readouterr().err
