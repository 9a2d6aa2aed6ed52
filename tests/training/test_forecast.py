"""What a run will take: the arithmetic by hand, a rehearsal that leaves nothing, and a forecast beside the outcome."""

from __future__ import annotations

import errno
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from picogpt.cli import train
from picogpt.cli.progress import divergence, timing_bar
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import download_bytes
from picogpt.errors import RunError
from picogpt.runs.folder import RunFolder
from picogpt.runs.loss_log import LossLog
from picogpt.schedule import Pace, Schedule
from picogpt.training.disk import DiskNeed, check_disk
from picogpt.training.forecast import EpochEnd, Forecast, Forecaster, ForecastingObserver, benchmark_steps, seconds_to_finish
from picogpt.training.memory import peak_memory
from picogpt.training.rank_zero import RankZeroTrainer
from picogpt.training.trainer import StepReport, Trainer
from picogpt.wording import format_passes, format_seconds
from tests.conftest import TINY, TINY_FLAGS, tiny_source

pytestmark = pytest.mark.epoch_ends

SCHEDULE = Schedule(total_steps=25, steps_per_epoch=10, val_steps=4)
PACE = Pace(seconds_per_step=2.0, seconds_per_val_batch=0.5, seconds_per_epoch_end=3.0)
LINE = (
    r"forecast: [\d,]+ characters in all \([\d.]+ passes over the text\), 0:00:\d\d to go, 0:00:\d\d from start to end; "
    r"peak memory (\d+ MB|[\d.]+ GB), disk \d+ MB, network none"
)


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
    forecast = Forecast(
        chars=1_000_000,
        passes=None,
        seconds=3725.4,
        elapsed=60.0,
        memory=1_384_000_000,
        disk=177_600_000,
        network=2_000_000_000,
    )

    assert str(forecast) == (
        "forecast: 1,000,000 characters in all, 1:01:05 to go, 1:02:05 from start to end; peak memory 1.38 GB, disk 178 MB, "
        "network about 2.00 GB"
    )
    assert "in all (8.6 passes over the text), 1:01:05" in str(replace(forecast, passes=8.61))


@pytest.mark.parametrize(
    ("passes", "text"),
    [
        (0.0123, "0.012 passes"),
        (0.4, "0.4 passes"),
        (1.0, "1.0 passes"),
        (9.94, "9.9 passes"),
        (9.96, "10 passes"),
        (3300, "3,300 passes"),
    ],
)
def test_passes(passes: float, text: str) -> None:
    """A digit after the point where it says something."""
    assert format_passes(passes) == f"{text} over the text"


def test_download() -> None:
    """A twentieth of what is read is for validation, and 16 MB are read ahead."""
    # 1,024 sequences of 1,280 characters fill the pool, which grows to eight times as many.
    assert download_bytes(0, 1280) == round(1024 * 1280 / 0.95) + 2**24
    assert download_bytes(19_000_000, 1280) == round((19_000_000 + 8 * 1024 * 1280) / 0.95) + 2**24


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("status", ["VmSize: 1 kB\n", None], ids=["no peak in it", "no such file"])
def test_peak_memory_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str | None) -> None:
    """Sandboxes that do not count the peak there still train."""
    path = tmp_path / "status"
    if status is not None:
        path.write_text(status)
    monkeypatch.setattr("picogpt.training.memory.Path", lambda _: path)

    assert peak_memory() > 10_000_000


def test_durations_of_any_length() -> None:
    """As timedelta writes them, and beyond its end."""
    assert [format_seconds(seconds) for seconds in (59.6, 90_061, 9e14)] == [
        "0:01:00",
        "1 day, 1:01:01",
        "10,416,666,666 days, 16:00:00",
    ]


def test_peak_memory_sees_an_array() -> None:
    """100 MB more than before are seen, as far as they are touched."""
    before = peak_memory()
    array = np.ones(before + 100_000_000, np.uint8)

    assert peak_memory() >= array.nbytes


class Usage(NamedTuple):
    """What `shutil.disk_usage` gives, in bytes."""

    total: int
    free: int


class Shown:
    """An observer that counts."""

    def __init__(self) -> None:
        self.steps, self.epochs = 0, 0

    def on_step(self, report: StepReport) -> None:
        self.steps += 1

    def on_epoch(self, trainer: Trainer) -> None:
        self.epochs += 1


def make_forecaster(seconds: float | None = None) -> Forecaster:
    """A forecaster of `SCHEDULE`, in a command that began ten seconds ago and is to take so many."""
    return Forecaster(
        schedule=lambda: SCHEDULE,
        chars_per_step=48,
        train_chars=600,
        val_batches=1,
        disk=5_000_000,
        network=0,
        began=time.perf_counter() - 10,
        seconds=seconds,
    )


@pytest.mark.parametrize(
    ("seconds", "step_seconds", "expected"),
    [
        (None, 2.0, 10 + 50 + 3 * 3),  # what the steps come to
        (60.0, 2.0, 60.0),  # fitted to the minute
        (60.0, 0.1, 60.0),
        (12.0, 8.0, 10 + 8 + 3),  # a step and an end of an epoch take longer than the minutes that are left
    ],
)
def test_forecast_of_a_run_by_the_clock(seconds: float | None, step_seconds: float, expected: float) -> None:
    """Steps decide, or the minutes, as far as a step and an epoch's end can be fitted to them."""
    forecast = make_forecaster(seconds).forecast(step_seconds, EpochEnd(0.0, 3.0), step=0, elapsed=10.0)

    assert (forecast.seconds, forecast.elapsed, forecast.passes) == (expected, 10.0, 2.0)


def watch(n_steps: int) -> tuple[list[str], Shown]:
    """What is said over an epoch of so many steps."""
    config = TrainConfig(batch_size=2, windows=3)
    trainer = Trainer(TINY, config, tiny_source(config), torch.float32)
    said: list[str] = []
    shown = Shown()
    observer = ForecastingObserver(shown, said.append, make_forecaster(), lambda: EpochEnd(0.0, 1000.0))
    observer.report_outcome()
    for step in range(1, n_steps + 1):
        observer.on_step(StepReport(step=step, loss=1.0, chars=48))
    observer.on_epoch(trainer)
    observer.report_outcome()
    return said, shown


@pytest.mark.parametrize("n_steps", [1, 3, 8])
def test_is_said_once(n_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first steps, or with the first epoch if that is shorter, and beside the outcome at the end."""
    now = time.perf_counter()
    monkeypatch.setattr("picogpt.training.forecast.time.perf_counter", lambda: now)
    said, shown = watch(n_steps)

    line = (
        r"forecast: 1,200 characters in all \(2.0 passes over the text\), 0:50:00 to go, 0:50:10 from .*, disk 5 MB, network none"
    )
    assert re.fullmatch(line, said[0])
    assert re.fullmatch(r"took 0:00:10 from start to end, forecast 0:50:10; peak memory .*, forecast .*", said[1])
    assert (len(said), shown.steps, shown.epochs) == (2, n_steps, 1)


def test_rehearsal_leaves_nothing(tmp_path: Path) -> None:
    """Steps, validation and saving take time, the files have a size, and the folder is empty again."""
    config = TrainConfig(batch_size=2, windows=3)
    seconds, end = benchmark_steps(TINY, config, lambda source: Trainer(TINY, config, source, torch.float32), tmp_path)

    assert seconds > 0
    assert end.seconds > 0
    assert end.seconds_per_val_batch > 0
    assert list(tmp_path.iterdir()) == []


def test_rehearsal_with_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine so slow that timing would take the whole time times one step, and says so; where none is shown, a line now and then."""
    config = TrainConfig(batch_size=2, windows=3)
    monkeypatch.setattr("picogpt.cli.bar.LINE_INTERVAL", 0.0)
    steps: list[float] = []
    update = Trainer.train_step

    def counted(trainer: Trainer, rate: float) -> float:
        steps.append(rate)
        return update(trainer, rate)

    monkeypatch.setattr(Trainer, "train_step", counted)
    with timing_bar() as advance:
        make = lambda source: Trainer(TINY, config, source, torch.float32)  # noqa: E731
        benchmark_steps(TINY, config, make, tmp_path, limit=0.0, advance=advance)

    assert len(steps) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "timing a few steps"
    assert re.fullmatch(r"timed 1 step in 0:00:0\d", second)


@pytest.mark.parametrize(
    ("config", "patience"),
    [(TrainConfig(), None), (TrainConfig(optimizer="adamw"), None), (TrainConfig(sync_every=2), None), (TrainConfig(), 2)],
    ids=["muon", "adamw", "DiLoCo", "patience"],
)
def test_disk_need(tmp_path: Path, config: TrainConfig, patience: int | None) -> None:
    """What a run's files take is known before the first step, to a few kilobytes of names."""
    config = replace(config, batch_size=2, windows=3)
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=64, context_len=8)
    made = RankZeroTrainer if config.sync_every else Trainer
    trainer = made(shape, config, tiny_source(config, shape), torch.float32)
    trainer.set_patience(patience)
    need = trainer.checkpoint_bytes()
    for _ in range(4):
        trainer.train_step(1e-3)
    run = RunFolder(tmp_path)
    trainer.save(run)

    assert 0 <= (tmp_path / "checkpoint.safetensors").stat().st_size - need < 20_000


@pytest.mark.parametrize(
    ("free", "held", "expected"),
    [
        (400, 0, None),
        (220, 0, "warning: .*logs/new: its files take 128 MB, 179 MB while they are saved, and only 220 MB are free in "),
        (60, 0, RunError),
        (
            60,
            128,
            "warning: .*logs/new: its files take 128 MB, 179 MB while they are saved, 128 MB of it there already, and only 60 MB",
        ),
        (40, 128, RunError),
    ],
)
def test_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, held: int, expected: str | type[Exception] | None
) -> None:
    """With enough space nothing is said, with little a warning, and a run that cannot be saved does not begin."""
    monkeypatch.setattr("picogpt.training.disk.shutil.disk_usage", lambda path: Usage(10**12, free * 10**6))
    run = tmp_path / "logs" / "new"
    if held:
        run.mkdir(parents=True)
        with (run / "model.safetensors").open("wb") as stream:
            stream.truncate(held * 10**6)
    need = DiskNeed(model=25_500_000, checkpoint=51_000_000)

    if expected is RunError:
        with pytest.raises(RunError, match=rf"and {free} MB are free in {tmp_path}.*; free some, or choose another --logs-dir"):
            check_disk(run, need)
    elif isinstance(expected, str):
        assert re.search(expected, check_disk(run, need) or "")
    else:
        assert check_disk(run, need) is None


def test_disk_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without these numbers, or with zeros for them, is taken as it is."""
    monkeypatch.setattr("picogpt.training.disk.shutil.disk_usage", lambda path: Usage(0, 0))
    assert check_disk(tmp_path, DiskNeed(1, 1)) is None

    def fail(_: Path) -> None:
        raise OSError(errno.ENOSYS, "no statvfs")

    monkeypatch.setattr("picogpt.training.disk.shutil.disk_usage", fail)
    assert check_disk(tmp_path, DiskNeed(1, 1)) is None


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        ([4.5], [4.6], None),  # before anything is learned
        ([2.0, 1.0, 0.3], [2.0, 1.8, 3.2], None),  # learned by heart
        ([2.0, 2.9], [2.0, 3.1], None),
        ([4.4, 50.0], [4.4, 57.0], r"validation loss is 57.00 nats, and guessing comes to 4.48; .* smaller --lr and --muon-lr"),
        ([1.0, 2.0, 3.1], [1.0, 2.0, 3.1], r"training loss is 3.10 nats, and was 1.00; "),
        ([2.0, 3.1], [2.0, 3.1], r"training loss is 3.10 nats, and was 2.00; "),
    ],
)
def test_divergence(train: list[float], val: list[float], expected: str | None) -> None:
    """Worse than a guess among 88, or than a nat above the lowest training loss; a text learned by heart is neither."""
    warning = divergence(LossLog(train=train, val=val, chars=[1] * len(val), seconds=[1.0] * len(val)), 88)

    assert (warning is None) == (expected is None)
    assert re.search(f"warning: the run has diverged: .*{expected}", warning or "") or expected is None


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

    def test_no_length(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """5,400 characters to train on are passed over 20 times, which is said; recipe seed has the original's length."""
        assert train.main(["--text", str(text_file), *TINY_FLAGS, "--dry-run"]) == 0
        err = capsys.readouterr().err
        assert "2,250 steps of 2 x 24 characters, 113 an epoch, 20 epochs, 20 passes over the text; recipe fast" in err
        assert "no length given: this one suits the text" in err

        assert train.main(["--text", str(text_file), *TINY_FLAGS, "--dry-run", "--recipe", "seed"]) == 0
        err = capsys.readouterr().err
        assert (
            "150,000 steps of 8 x 24 characters, 500 an epoch, 300 epochs, 5,333 passes over the text, enough to memorize it"
            in err
        )
        assert "no length given" not in err

    def test_full_disk(self, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """A run that does not fit on its disk does not begin, and says so in one line."""
        monkeypatch.setattr("picogpt.training.disk.shutil.disk_usage", lambda path: Usage(10**9, 300_000))

        assert train.main(["--text", str(text_file), *TINY_FLAGS, "--epochs", "1"]) == 1
        assert re.search(
            r"picogpt-train: logs/numbers: its files take 1 MB, 1 MB while .*, and 0 MB are free in .*numbers; free some, or choose",
            capsys.readouterr().err,
        )
        assert not Path("logs/numbers/checkpoint.safetensors").exists()

    def test_plan_of_minutes_is_kept(self, text_file: Path) -> None:
        """What a run by the clock decided last stands in its checkpoint and in its config."""
        assert train.main(["--text", str(text_file), *TINY_FLAGS, "--minutes", "0.05"]) == 0
        state = RunFolder(Path("logs/numbers")).load_checkpoint()[0].state
        schedule = json.loads(Path("logs/numbers/config.json").read_text())["schedule"]

        assert state["plan"]["schedule"] == schedule
        assert state["step"] == schedule["total_steps"]

    def test_start_and_end(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A run says its forecast and what it took; a dry run of more of it changes no file."""
        flags = ["--text", str(text_file), *TINY_FLAGS, "--steps-per-epoch", "4"]
        assert train.main([*flags, "--epochs", "2"]) == 0
        err = capsys.readouterr().err
        assert re.search(LINE, err)
        assert re.search(r"took 0:00:\d\d from start to end, forecast 0:00:\d\d; peak memory", err)
        before = {path.name: path.stat().st_mtime_ns for path in Path("logs/numbers").iterdir()}

        assert train.main([*flags, "--epochs", "3", "--dry-run"]) == 0
        err = capsys.readouterr().err
        assert "logs/numbers: would resume from step 8" in err
        assert {path.name: path.stat().st_mtime_ns for path in Path("logs/numbers").iterdir()} == before
        assert train.main([*flags, "--minutes", "1", "--fresh", "--dry-run"]) == 0
        assert "the existing run would be kept as logs/numbers.old-1" in capsys.readouterr().err
