"""A run that cannot be lost: one test a row of what can happen to a laptop that trains for days.

`PICOGPT_TORTURE=50 pytest -m '' tests/runs/test_durability.py` tries the random ones fifty times as often.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from picogpt import files
from picogpt.cli import train
from picogpt.config import GPTConfig, TrainConfig
from picogpt.errors import RunError
from picogpt.inference.engine import NUMPY
from picogpt.runs.checkpoint import Checkpoint
from picogpt.runs.folder import RunFolder
from picogpt.schedule import Schedule
from picogpt.training.trainer import StepReport, Trainer
from tests.conftest import TINY, TINY_FLAGS, checkpoint_bytes, tiny_source
from tests.programs import kill_at_exit, program

TIMES = int(os.environ.get("PICOGPT_TORTURE", "1"))
RUN = [sys.executable, "-m", "picogpt.cli.train"]
CALLS = ("open", "write", "fsync", "close", "replace", "unlink")
"""The calls of `os` that `picogpt.files` makes."""


def checkpoint(value: float) -> Checkpoint:
    """A small checkpoint, told apart by `value`."""
    return Checkpoint(tensors={"w": np.full(1000, value, np.float32)}, state={"value": value})


def value_of(run: RunFolder) -> float:
    """Which checkpoint there is to go on from."""
    loaded, fault = run.load_checkpoint()
    assert fault is None
    assert (loaded.tensors["w"] == loaded.state["value"]).all()
    return float(loaded.state["value"])


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with two checkpoints, 1 and 2."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.save_checkpoint(checkpoint(1))
    folder.save_checkpoint(checkpoint(2))
    return folder


class Calls:
    """Counts the file calls and does something at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[str], None]) -> None:
        self.made: list[str] = []
        for name in CALLS:
            monkeypatch.setattr(f"picogpt.files.os.{name}", self._wrap(name, getattr(os, name), at, action))

    def _wrap(self, name: str, call: Callable[..., Any], at: int, action: Callable[[str], None]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            self.made.append(name)
            if len(self.made) - 1 == at:
                action(name)
            return call(*arguments)

        return wrapped


def count_calls(run: RunFolder) -> int:
    """File calls of one save."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = Calls(monkeypatch, -1, lambda _: None)
        run.save_checkpoint(checkpoint(2))
        return len(calls.made)


def test_killed_at_any_call_of_a_save(run: RunFolder) -> None:
    """`kill -9` before each file call of a save: the old or the new state loads, and leftovers go at the next start."""
    n_calls = count_calls(run)
    survived = []
    for at in range(n_calls):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads are asleep
            child = os.fork()
        if child == 0:
            try:
                Calls(pytest.MonkeyPatch(), at, lambda _: os.kill(os.getpid(), signal.SIGKILL))
                run.save_checkpoint(checkpoint(3))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        survived.append(value_of(run))
        with run.lock():
            pass
        assert not list(run.path.glob("*.part")) + list(run.path.glob(".*.part"))
        run.save_checkpoint(checkpoint(1))
        run.save_checkpoint(checkpoint(2))

    assert n_calls >= 12
    assert set(survived) == {2, 3}


class Killed(BaseException):
    """In place of the end of the process."""


class Nobody:
    """Watches a run and does nothing."""

    def on_step(self, report: StepReport) -> None:
        """Nothing."""

    def on_epoch(self, trainer: Trainer) -> None:
        """Nothing."""


@pytest.mark.slow
def test_killed_at_any_call_of_a_first_epochs_end(tmp_path: Path) -> None:
    """There is something to go on from as soon as there is a model, and until then nothing that would be taken for one."""

    def kill(_: str) -> None:
        raise Killed

    left = set()
    for at in range(1000):
        run, config = RunFolder(tmp_path / str(at)), TrainConfig(batch_size=2, windows=3)
        run.create()
        trainer = Trainer(TINY, config, tiny_source(config), torch.float32)
        with pytest.MonkeyPatch.context() as context:
            # The calls of the run's own files are counted, not those that start a compiler for the epoch's sample.
            context.setattr("picogpt.training.sample.load_engine_backend", lambda _: NUMPY)
            calls = Calls(context, at, kill)
            with contextlib.suppress(Killed):
                trainer.fit(run, Schedule(total_steps=1, steps_per_epoch=1, val_steps=1), Nobody(), lambda: False)
        left.add((run.has_checkpoint(), run.has_model()))
        if len(calls.made) <= at:
            break

    assert at > 30
    assert left == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_failure_at_any_call_of_a_save(run: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A disk that is full, broken or read-only at each file call: the error comes out, the old or the new state loads."""

    def fail(name: str) -> None:
        if name != "close":  # whose failure after a flush loses nothing
            raise OSError(number, os.strerror(number))

    for at in range(count_calls(run)):
        with pytest.MonkeyPatch.context() as context:
            calls = Calls(context, at, fail)
            try:
                run.save_checkpoint(checkpoint(3))
            except OSError as error:
                assert error.errno == number  # noqa: PT017 (the call that fails may be one that does not matter)
            assert len(calls.made) > at
        assert value_of(run) in {2, 3}
        with run.lock():
            pass
        run.save_checkpoint(checkpoint(1))
        run.save_checkpoint(checkpoint(2))


class Disk:
    """A disk that may forget what was not flushed: replays recorded calls on contents by name."""

    def __init__(self, before: dict[str, bytes]) -> None:
        self.names = {name: ("flushed", content) for name, content in before.items()}
        self.unflushed: list[dict[str, tuple[str, bytes]]] = []

    def crash(self, *, names_kept: bool, data_kept: bool) -> dict[str, bytes]:
        """What is found after the power comes back."""
        names = self.names if names_kept or not self.unflushed else self.unflushed[0]
        return {name: content if state == "flushed" or data_kept else b"" for name, (state, content) in names.items()}


def replay(operations: list[tuple[str, ...]], before: dict[str, bytes], contents: dict[str, bytes]) -> Iterator[Disk]:
    """The disk after each operation."""
    disk = Disk(before)
    yield disk
    for kind, *names in operations:
        if kind not in {"fsync_folder", "fsync"}:
            disk.unflushed.append(dict(disk.names))
        if kind == "create":
            disk.names[names[0]] = ("dirty", contents[names[0]])
        elif kind == "fsync":
            disk.names[names[0]] = ("flushed", disk.names[names[0]][1])
            disk.unflushed = [
                {name: (("flushed", content) if name == names[0] else (state, content)) for name, (state, content) in old.items()}
                for old in disk.unflushed
            ]
        elif kind == "replace":
            disk.names[names[1]] = disk.names.pop(names[0])
        elif kind == "fsync_folder":
            disk.unflushed.clear()
        yield disk


def test_power_lost_at_any_call_of_a_save(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power lost after any call, with what was not flushed lost or not: the old or the new state loads."""
    before = {path.name: path.read_bytes() for path in run.path.glob("checkpoint*")}
    operations: list[tuple[str, ...]] = []
    contents: dict[str, bytes] = {}
    descriptors: dict[int, str] = {}
    real = {name: getattr(os, name) for name in CALLS}

    def opened(path: Any, flags: int, *mode: int) -> int:
        descriptor: int = real["open"](path, flags, *mode)
        descriptors[descriptor] = Path(path).name
        if flags & os.O_CREAT:
            operations.append(("create", Path(path).name))
        return descriptor

    def fsynced(descriptor: int) -> None:
        name = descriptors[descriptor]
        operations.append(("fsync_folder",) if name == run.path.name else ("fsync", name))

    def replaced(source: Any, target: Any) -> None:
        contents[Path(source).name] = Path(source).read_bytes()
        operations.append(("replace", Path(source).name, Path(target).name))
        real["replace"](source, target)

    monkeypatch.setattr("picogpt.files.os.open", opened)
    monkeypatch.setattr("picogpt.files.os.fsync", fsynced)
    monkeypatch.setattr("picogpt.files.os.replace", replaced)
    run.save_checkpoint(checkpoint(3))
    monkeypatch.undo()

    tried = 0
    for disk in replay(operations, before, contents):
        for names_kept in (True, False):
            for data_kept in (True, False):
                folder = RunFolder(tmp_path / f"disk-{tried}")
                folder.path.mkdir()
                for name, content in disk.crash(names_kept=names_kept, data_kept=data_kept).items():
                    (folder.path / name).write_bytes(content)
                assert value_of(folder) in {2, 3}
                tried += 1

    assert tried >= 30


def test_truncations_and_bit_flips(run: RunFolder) -> None:
    """No shortened or changed checkpoint is taken for a good one."""
    path = run.path / "checkpoint.safetensors"
    (run.path / "checkpoint.previous.safetensors").unlink()
    good = path.read_bytes()
    generator = random.Random(0)
    for _ in range(20 * TIMES):
        flipped = bytearray(good)
        flipped[generator.randrange(len(good))] ^= 1 << generator.randrange(8)
        for bad in (good[: generator.randrange(len(good))], bytes(flipped)):
            path.write_bytes(bad)
            with pytest.raises(RunError, match="nothing to resume"):
                run.load_checkpoint()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 5000,
        b"hello",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x04cos\nsystem\n(S'touch x'\ntR.",
        b"\xff" * 8 + b"{}",
        (10).to_bytes(8, "little") + b"[" * 10,
        (200_000).to_bytes(8, "little") + b'{"a":' * 40_000,
        (83).to_bytes(8, "little")
        + b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}        '
        + b"\0" * 4,
    ],
    ids=["empty", "zeros", "text", "picture", "zip", "pickle", "huge header", "no JSON", "deep", "huge counts"],
)
def test_foreign_checkpoints(run: RunFolder, content: bytes) -> None:
    """Whatever lies in the checkpoint's place is refused, and the one before it is used, and said."""
    (run.path / "checkpoint.safetensors").write_bytes(content)
    loaded, fault = run.load_checkpoint()

    assert loaded.state == {"value": 1}
    assert fault is not None
    assert "checkpoint.safetensors: " in fault


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path) -> list[str]:
    """A folder of the test's own, and the flags of a run that takes a second or two."""
    monkeypatch.chdir(tmp_path)
    return [
        "--text",
        str(text_file),
        *TINY_FLAGS,
        "--epochs",
        "4",
        "--steps-per-epoch",
        "30",
        "--val-steps",
        "1",
        "--dropout",
        "0.1",
    ]


def environment(**changes: str | None) -> dict[str, str]:
    """The environment with some variables changed or, for None, gone."""
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def time_of_checkpoint(run: RunFolder) -> int:
    """When it was saved, in nanoseconds; 0 if there is none."""
    try:
        return (run.path / "checkpoint.safetensors").stat().st_mtime_ns
    except FileNotFoundError:  # before the first, and for a moment while it is replaced
        return 0


@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_bytes(here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`kill -9` at random times, each time resumed, and the weights are those of a run that nobody disturbed."""
    train.main([*here, "--run", "undisturbed"])
    generator = random.Random(0)
    kills = 0
    run = RunFolder(Path("logs/killed"))
    command = program("train_with_constants", "picogpt.training.trainer.SAVE_INTERVAL=0.02", *here, "--run", "killed")
    for _ in range(20 * TIMES):
        before = time_of_checkpoint(run)
        with kill_at_exit(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)) as process:
            # Until this start has saved: before that it has nothing to lose.
            while time_of_checkpoint(run) == before and process.poll() is None:
                time.sleep(0.005)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=generator.random() / 2)
        if process.returncode == -signal.SIGKILL:
            kills += 1
        else:
            assert process.returncode == 0
            run.archive()  # it was done before it could be killed: once more
        if kills == 2 * TIMES:
            break
    assert kills == 2 * TIMES
    subprocess.run(command, check=True, capture_output=True)

    assert checkpoint_bytes("killed") == checkpoint_bytes("undisturbed")


def interrupt(flags: list[str]) -> None:
    """Start a run and press Ctrl-C in its second epoch."""
    go_on = Path("go-on")
    with kill_at_exit(
        subprocess.Popen(program("train_with_a_hold", "45", str(go_on), *flags), stdout=subprocess.PIPE)
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        go_on.touch()
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    go_on.unlink()


@pytest.mark.slow
def test_interrupted_runs_go_on_to_the_same_bytes(here: list[str]) -> None:
    """A run that was asked to end goes on to the bytes of one that was not; its validation losses are the same too."""
    train.main([*here, "--run", "undisturbed"])
    interrupt([*here, "--run", "asked"])
    subprocess.run([*RUN, *here, "--run", "asked"], check=True, capture_output=True)

    assert checkpoint_bytes("asked") == checkpoint_bytes("undisturbed")
    logs = [RunFolder(Path("logs") / name).read_log() for name in ("asked", "undisturbed")]
    assert logs[0].val == logs[1].val
    assert logs[0].train == logs[1].train


@pytest.mark.slow
def test_init_from_goes_on_to_the_same_bytes(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A run that began with another one's weights, stopped and resumed, too; and it began there."""
    train.main([*here, "--run", "first"])
    begin = ["--init-from", "first", "--lr", "0.0005"]
    train.main([*here, *begin, "--run", "straight"])
    capsys.readouterr()
    train.main([*here, *begin, "--run", "broken", "--epochs", "2"])
    assert "starting from the weights of" in capsys.readouterr().err
    first_loss = RunFolder(Path("logs/broken")).read_log().train[0]
    assert first_loss < RunFolder(Path("logs/first")).read_log().train[0]
    # The rate comes down at the end of the schedule, so only the one that both have to the end can be compared.
    interrupt([*here, *begin, "--run", "asked"])
    assert train.main([*here, *begin, "--run", "asked"]) == 0

    assert checkpoint_bytes("asked") == checkpoint_bytes("straight")


def test_init_from_other_shapes(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Another shape, or another origin for a run that has one, is rejected by name."""
    train.main([*here, "--run", "first"])
    capsys.readouterr()
    assert train.main([*here, "--init-from", "first", "--run", "second", "--n-layer", "3"]) == 1
    assert "the model to start from has another shape: n_layer is 3 and was 2; leave these flags out" in capsys.readouterr().err
    assert not Path("logs/second").exists()
    assert train.main([*here, "--init-from", "nowhere", "--run", "first"]) == 1
    assert "nowhere: no such file, and no run of that name" in capsys.readouterr().err
    train.main([*here, "--run", "other"])
    capsys.readouterr()
    assert train.main([*here, "--init-from", "other", "--run", "first"]) == 1
    refusal = capsys.readouterr().err
    assert re.search(
        r"the run began from nothing, not \S+/logs/other/model.safetensors; choose another --run, or --fresh", refusal
    )


@pytest.mark.timing
def test_second_signal_ends_at_once(here: list[str]) -> None:
    """The second Ctrl-C does not wait; what was saved loads."""
    command = program("train_with_a_slow_save", *here, "--run", "twice")
    with kill_at_exit(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("epoch"):
            pass
        process.send_signal(signal.SIGINT)
        while process.stdout.readline() != "saving\n":
            pass
        start = time.perf_counter()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)

    assert time.perf_counter() - start < 5
    assert process.returncode == -signal.SIGINT
    assert RunFolder(Path("logs/twice")).load_checkpoint()[0].state["log"]["iter_num"] == 30


@pytest.mark.slow
def test_terminal_that_goes_away(here: list[str]) -> None:
    """The window is closed: SIGHUP saves and ends the run although nobody can be told."""
    primary, secondary = os.openpty()
    command = [*RUN, *here, "--run", "hung-up", "--epochs", "1000"]
    hung_up = subprocess.Popen(command, stdin=secondary, stdout=secondary, stderr=secondary, start_new_session=True)
    with kill_at_exit(hung_up) as process:
        os.close(secondary)
        shown = b""
        while b"epoch 1 " not in shown:
            shown += os.read(primary, 4096)
        os.close(primary)
        deadline = time.monotonic() + 20
        run = RunFolder(Path("logs/hung-up"))
        while not (run.path / "log.pkl").exists() or len(run.read_log().val) < 2:  # it trains on, into the void
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=20) == 128 + signal.SIGHUP

    assert run.load_checkpoint()[0].state["log"]["iter_num"] > 30


@pytest.mark.slow
def test_suspend(here: list[str]) -> None:
    """A laptop that sleeps: the run goes on where it was."""
    asleep = subprocess.Popen([*RUN, *here, "--run", "asleep"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with kill_at_exit(asleep) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)

    assert process.returncode == 0
    assert RunFolder(Path("logs/asleep")).read_log().iter_num == 120


@pytest.mark.slow
def test_wall_clock_jumps(here: list[str]) -> None:
    """A clock that runs backwards by days changes nothing."""
    subprocess.run(program("train_on_a_backwards_clock", *here, "--run", "jumping"), check=True, capture_output=True)
    train.main([*here, "--run", "steady"])

    assert checkpoint_bytes("jumping") == checkpoint_bytes("steady")


def test_out_of_memory(here: list[str]) -> None:
    """A refused allocation is one line."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    command = [*RUN, *here, "--run", "large", "--n-embd", "65536", "--n-head", "2"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("picogpt-train: not enough memory; close other programs")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_many_starts_at_once(here: list[str]) -> None:
    """Of many trainers in one run, twenty where it is to be tried hard, exactly one trains; the others say who it is."""
    count = 20 if TIMES > 1 else 8
    flags = [*here, "--run", "shared", "--epochs", "1000"]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                kill_at_exit(subprocess.Popen([*RUN, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
            )
            for _ in range(count)
        ]
        deadline = time.monotonic() + 120
        while sum(process.poll() is None for process in processes) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        (holder,) = (process for process in processes if process.poll() is None)
        holder.terminate()
        messages = [process.communicate()[1] for process in processes]

    assert holder.returncode == 128 + signal.SIGTERM
    for process, message in zip(processes, messages, strict=True):
        if process is not holder:
            assert process.returncode == 1
            assert re.search(rf"another process \(pid ({holder.pid}|unknown)\) trains in this run", message)


def test_second_trainer_disturbs_nothing(here: list[str]) -> None:
    """What the first trainer is writing is not removed by the second one's start."""
    folder = RunFolder(Path("logs/held"))
    folder.create()
    staged = folder.path / ".checkpoint.safetensors.staged.part"
    with folder.lock():
        staged.touch()
        assert train.main([*here, "--run", "held"]) == 1
        assert staged.exists()
    with folder.lock():
        assert not staged.exists()


def test_first_trainer_that_is_done_meanwhile(
    here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that another process began and left while this one read its text is not started over."""
    create = RunFolder.create

    def late(self: RunFolder) -> None:
        create(self)
        self.save_checkpoint(checkpoint(1))

    monkeypatch.setattr(RunFolder, "create", late)

    assert train.main([*here, "--run", "raced"]) == 1
    assert "another process has begun this run meanwhile; start again to resume it" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(
    here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that has nothing but its config begins with that; what it was to begin from has to be named again."""
    train.main([*here, "--run", "first"])
    with monkeypatch.context() as context:
        context.setattr("picogpt.training.trainer.Trainer.fit", lambda *_, **__: True)
        assert train.main([*here, "--run", "early", "--seed", "5"]) == 0
        assert train.main([*here, "--run", "heir", "--init-from", "first"]) == 0
    assert not RunFolder(Path("logs/early")).has_checkpoint()
    assert train.main(["--run", "early"]) == 0
    assert RunFolder(Path("logs/early")).read_config()["train"]["seed"] == 5
    assert RunFolder(Path("logs/early")).read_log().iter_num == 120
    capsys.readouterr()
    assert train.main(["--run", "heir"]) == 1
    assert "has not begun; give that flag again" in capsys.readouterr().err
    assert train.main(["--run", "heir", "--init-from", "logs/first"]) == 0


@pytest.mark.slow
def test_ignored_signals_stay_ignored(here: list[str]) -> None:
    """`nohup picogpt-train` survives the end of its terminal."""
    command = [*RUN, *here, "--run", "nohup"]
    nohup = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # noqa: PLW1509
    )
    with kill_at_exit(nohup) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=60)

    assert process.returncode == 0


@pytest.mark.slow
def test_generating_while_training(here: list[str]) -> None:
    """A run in training can be generated from at any time."""
    flags = [*here, "--run", "busy", "--epochs", "1000"]
    with kill_at_exit(subprocess.Popen([*RUN, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(3):
            command = [sys.executable, "-m", "picogpt.cli.generate", "-m", "busy", "-p", "one", "-n", "5"]
            assert subprocess.run(command, check=True, capture_output=True).stdout.startswith(b"one")
            assert process.poll() is None
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A poisoned weight ends the run with one line, and the last finite state is what there is."""
    command = program("train_with_a_poisoned_weight", *here, "--run", "poisoned")
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert re.search(r"picogpt-train: step 41: the loss is nan .* start again with a smaller --lr", done.stderr)
    saved = RunFolder(Path("logs/poisoned")).load_checkpoint()[0]
    assert saved.state["log"]["iter_num"] == 30
    assert all(np.isfinite(array).all() for array in saved.tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"MPLBACKEND": "junk"}, {"HOME": None}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"COLUMNS": "0"}],
    ids="-".join,
)
def test_odd_environments(here: list[str], changes: dict[str, str | None]) -> None:
    """A junk matplotlib backend, no home, an ASCII locale, a width of 0: the run and its picture are made."""
    done = subprocess.run([*RUN, *here, "--epochs", "1"], env=environment(**changes), capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("epoch 1 of 1")
    assert Path("logs/numbers/log.jpg").exists()


@pytest.mark.slow
@pytest.mark.parametrize("closing", ["0<&-", "1>&-", "2>&-", "1>/dev/full", "| true"])
def test_closed_streams(here: list[str], closing: str) -> None:
    """Training survives a closed stdin, stdout or stderr, and a reader that has gone, without a traceback."""
    command = " ".join([*RUN, *here, "--epochs", "2", "2>err", closing] if "2>" not in closing else [*RUN, *here, closing])
    subprocess.run(command, shell=True, check=False, stdout=subprocess.DEVNULL)

    assert RunFolder(Path("logs/numbers")).read_log().iter_num >= 60
    assert not Path("err").exists() or "Traceback" not in Path("err").read_text()


def test_read_only_folder(here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's folder that cannot be written to any more: one line, exit 1, and the checkpoint is as it was."""
    train.main([*here, "--epochs", "1"])
    before = checkpoint_bytes("numbers")

    def fail(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "logs/numbers/x")

    with monkeypatch.context() as context:
        context.setattr("picogpt.files.os.open", fail)
        capsys.readouterr()
        assert train.main([*here, "--epochs", "2"]) == 1
    assert "Read-only file system" in capsys.readouterr().err
    assert checkpoint_bytes("numbers") == before


def test_planted_links(run: RunFolder, tmp_path: Path) -> None:
    """A link in the place of a file of the run is replaced, not written through."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    for name in (".checkpoint.safetensors.staged.part", "model.safetensors", "checkpoint.safetensors", ".lock"):
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).symlink_to(victim)
    run.save_checkpoint(checkpoint(3))
    run.save_model({"w": np.ones(3, np.float32)}, GPTConfig())
    with pytest.raises(RunError, match="lock: cannot be opened"), run.lock():
        pass

    assert victim.read_bytes() == b"mine"
    assert not (run.path / "model.safetensors").is_symlink()


def test_all_writing_is_counted() -> None:
    """The calls counted above are all that `picogpt.files` makes."""
    source = Path(files.__file__).read_text()

    assert set(re.findall(r"os\.(\w+)\(", source)) == set(CALLS)
