"""Several processes that train one model: the same bytes as one, whatever happens to them.

`PICOGPT_TORTURE=20 pytest -m '' tests/training/test_distributed.py` kills twenty times under torchrun, and stops a rank for ten
seconds.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from picogpt.cli import train
from picogpt.config import TrainConfig
from picogpt.data import Batch, Stop, TextSource, WaitInterrupted, first_articles, read_texts, stream
from picogpt.device import CPU, choose_device, choose_dtype
from picogpt.errors import ConfigError, RanksError, TrainingError
from picogpt.runs.checkpoint import Checkpoint, pack, unpack
from picogpt.runs.folder import RunFolder
from picogpt.runs.settings import RunSettings
from picogpt.schedule import learning_rate
from picogpt.training.data_parallel import DataParallelState, pack_step, unpack_step
from picogpt.training.distributed import SINGLE_PROCESS, Ranks, translate_dist_errors
from picogpt.training.optim import OuterOptimizer
from picogpt.training.rank_zero import RankZeroTrainer
from picogpt.training.trainer import Trainer
from tests.conftest import TINY, TINY_FLAGS, checkpoint_bytes, tiny_source, write_numbers
from tests.data.test_stream import parquet
from tests.programs import kill_at_exit, program
from tests.programs.train_with_a_hold import hold
from tests.ranks import RankProcesses, run_ranks, said

TIMES = int(os.environ.get("PICOGPT_TORTURE", "1"))
needs_torture = pytest.mark.skipif(TIMES == 1, reason="takes a minute or more: run with PICOGPT_TORTURE=20")
SMALL = [*TINY_FLAGS, "--n-layer", "1", "--windows", "2", "--val-steps", "2", "--batch-size", "4"]
"""As small as a model can be, in steps that four ranks can share."""
DISTURBED_EPOCH = 80 if TIMES > 1 else 40
"""Steps of an epoch of a run that is disturbed."""


def hash_store() -> Store:
    """A store within this process."""
    return dist.HashStore()  # type: ignore[attr-defined]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path) -> list[str]:
    """A folder of the test's own, and the flags of a short run."""
    monkeypatch.chdir(tmp_path)
    return ["--text", str(text_file), *SMALL, "--epochs", "2", "--steps-per-epoch", "20"]


def step_of(run: str) -> int:
    """Steps that a run has saved."""
    return int(RunFolder(Path("logs") / run).load_checkpoint()[0].state["step"])


def train_in_two_parts(run: RunFolder) -> Trainer:
    """Train like `run` in this process alone, the gradients of each step's halves taken one after the other and averaged."""
    settings = RunSettings.from_dict(run.read_config())
    model, config = settings.model, settings.train
    corpus = read_texts(settings.data.text, name="text")
    source = TextSource(corpus, sequence_len=config.windows * model.context_len, batch_size=config.batch_size, seed=config.seed)
    trainer = Trainer(model, config, source, getattr(torch, settings.dtype))
    parameters = list(trainer.model.parameters())
    half = config.batch_size // 2
    for k in range(settings.schedule.total_steps):
        inputs, targets = source.train_batch(k)
        losses = [trainer.loss(Batch(inputs[part], targets[part])) for part in (slice(half), slice(half, None))]
        gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
        for parameter, first, second in zip(parameters, *gradients, strict=True):
            parameter.grad = first / 2 + second / 2
        mean = sum(loss.item() for loss in losses) / 2
        trainer.optimizer_step(learning_rate(k, settings.schedule.total_steps, config), mean)
    return trainer


@pytest.mark.slow
def test_two_ranks_are_two_halves(here: list[str]) -> None:
    """A hundred steps on two ranks, one of them asleep for a while, and in one process, half by half: the same to the bit."""
    with RankProcesses(2, [*here, "--run", "two", "--steps-per-epoch", "50"]) as ranks:
        ranks.await_text("epoch 1")
        os.kill(ranks.pids[1], signal.SIGSTOP)
        time.sleep(10 if TIMES > 1 else 1)
        os.kill(ranks.pids[1], signal.SIGCONT)
        assert ranks.wait() == [0, 0]
    alone = train_in_two_parts(RunFolder(Path("logs/two")))

    assert alone.step == 100
    assert checkpoint_bytes("two") == {name: array.tobytes() for name, array in alone.state_tensors().items()}
    assert "2 ranks, each with 2 of a step's sequences; gradients are averaged every step" in said()
    assert Path("rank-0.out").read_text().count("epoch ") == 2
    assert (Path("rank-1.out").read_text(), said(1)) == ("", "")


@pytest.mark.slow
def test_four_ranks_learn_the_same(here: list[str]) -> None:
    """Four ranks and one process come to the same validation losses, within a thousandth."""
    flags = [*here, "--lr", "1e-3", "--muon-lr", "5e-3"]  # at higher rates so small a model blows roundings up
    assert train.main([*flags, "--run", "one"]) == 0
    assert run_ranks(4, [*flags, "--run", "four"]) == [0] * 4
    one, four = (RunFolder(Path("logs") / name).read_log() for name in ("one", "four"))

    assert four.val == pytest.approx(one.val, rel=1e-3)
    assert four.train == pytest.approx(one.train, rel=1e-3)
    assert four.chars == one.chars


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["0", pytest.param("7", marks=needs_torture)])
def test_other_numbers_of_ranks(
    here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sync: str
) -> None:
    """A stream that is read by two ranks, one, four and two is read as by one: nothing is lost and nothing repeated."""
    monkeypatch.setattr(first_articles, "VALIDATION_CHARS", 2000)
    monkeypatch.setattr(stream, "POOL", 64)
    Path("articles").mkdir()
    Path("articles/train-0.parquet").write_bytes(parquet(0))
    flags = ["--dataset", "articles", *here[2:], "--epochs", "4", "--steps-per-epoch", "10", "--sync-every", sync]
    assert train.main([*flags, "--run", "one"]) == 0
    for start, count in enumerate((2, 1, 4, 2), start=1):
        assert run_ranks(count, [*flags, "--run", "several", "--epochs", str(start)]) == [0] * count
        assert start == 1 or "ranks is" in said()

    one, several = (RunFolder(Path("logs") / name).load_checkpoint()[0] for name in ("one", "several"))
    assert several.state["data"] == one.state["data"]
    names = [name for name in one.tensors if name.startswith("data.")]
    assert len(names) == 4
    assert all(np.array_equal(several.tensors[name], one.tensors[name]) for name in names)
    assert several.state["log"]["losses"]["val"][-1] < several.state["log"]["losses"]["val"][0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What two ranks save at the end, with and without outer steps, where nothing happens to them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        write_numbers(folder / "numbers.txt")
        for sync in ("0", "7"):
            assert run_ranks(2, disturbed(["--text", "numbers.txt"], sync, f"sync-{sync}")) == [0, 0]
        return {sync: checkpoint_bytes(f"sync-{sync}") for sync in ("0", "7")}


@pytest.fixture
def held(undisturbed: object, here: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs wait in the middle of their second epoch for this file, which a test writes once it has disturbed them."""
    monkeypatch.setattr(Trainer, "train_step", Trainer.train_step)  # put back after the test
    file = Path("go-on").absolute()
    hold(DISTURBED_EPOCH * 3 // 2, file)
    return file


def disturbed(text: list[str], sync: str, run: str) -> list[str]:
    """The flags of a run long enough to be disturbed."""
    length = ["--epochs", "2", "--steps-per-epoch", str(DISTURBED_EPOCH)]
    return [*text, *SMALL, *length, "--dropout", "0.1", "--sync-every", sync, "--run", run]


@pytest.mark.slow
@pytest.mark.parametrize(("sync", "number"), [("0", signal.SIGINT), ("7", signal.SIGTERM)])
def test_signal_to_any_rank(
    here: list[str], undisturbed: dict[str, dict[str, bytes]], held: Path, sync: str, number: signal.Signals
) -> None:
    """A signal that one rank gets ends all of them after saving, and they go on to the bytes of a run without it."""
    flags = disturbed(here[:2], sync, "asked")
    with RankProcesses(2, flags) as ranks:
        ranks.await_text("epoch 1")
        os.kill(ranks.pids[1], number)
        held.touch()
        assert ranks.wait() == [128 + number] * 2
    assert "stopped and saved at step" in said()
    assert said(1) == ""
    assert step_of("asked") >= DISTURBED_EPOCH
    assert run_ranks(2, flags) == [0, 0]

    assert checkpoint_bytes("asked") == undisturbed[sync]


def test_signal_while_waiting(here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal to a rank is noticed while rank 0 waits for the network."""
    batch = TextSource.train_batch

    def waiting(self: TextSource, k: int, stop: Stop = lambda: False) -> Batch:
        while k == 30 and not stop():
            Path("waiting").touch()
            time.sleep(0.01)
        if k == 30:
            raise WaitInterrupted
        return batch(self, k, stop)

    monkeypatch.setattr(TextSource, "train_batch", waiting)
    monkeypatch.setattr("picogpt.training.distributed.HEARTBEAT", 0.1)
    with RankProcesses(2, here) as ranks:
        ranks.await_text("epoch 1")
        deadline = time.monotonic() + 60
        while not Path("waiting").exists():
            assert time.monotonic() < deadline, said()
            time.sleep(0.01)
        time.sleep(0.3)  # some heartbeats
        os.kill(ranks.pids[1], signal.SIGTERM)
        codes = ranks.wait()

    assert codes == [128 + signal.SIGTERM] * 2
    assert step_of("numbers") == 30


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_lost_rank(here: list[str], undisturbed: dict[str, dict[str, bytes]], held: Path, lost: int) -> None:
    """A rank that is killed ends the other one, with one line; started again, they come to the bytes of a run without that."""
    sync = "07"[lost]
    flags = disturbed(here[:2], sync, "killed")
    with RankProcesses(2, flags) as ranks:
        ranks.await_text("epoch 1")
        os.kill(ranks.pids[lost], signal.SIGKILL)
        held.touch()
        codes = ranks.wait()
    last = said(1 - lost).splitlines()[-1]

    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 1
    assert last.startswith("picogpt-train: " + ("rank 1: " if lost == 0 else "") + "another rank has ended or cannot be reached")
    assert last.endswith("the last checkpoint is intact: start again to resume from it")
    assert "Traceback" not in said(1 - lost)
    assert step_of("killed") >= DISTURBED_EPOCH
    assert run_ranks(2, flags) == [0, 0]
    assert f"resuming from step {DISTURBED_EPOCH}" in said()
    assert checkpoint_bytes("killed") == undisturbed[sync]


@needs_torture
def test_silent_rank(here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that says nothing for too long is given up, with one line."""
    monkeypatch.setattr("picogpt.training.distributed.PATIENCE", timedelta(seconds=5))
    with RankProcesses(2, [*here, "--epochs", "99"]) as ranks:
        ranks.await_text("epoch 1")
        os.kill(ranks.pids[1], signal.SIGSTOP)
        assert ranks.wait_for(0) == 1

    assert re.search(r"another rank has ended or cannot be reached \(.*[Tt]imed out.*\)", said())


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Processes that torchrun has started, in the order of their ranks."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def killed(command: list[str], generator: random.Random, most: int) -> int:
    """Run `command` and kill a rank up to `most` times, at random times; how often that was done."""
    kills = 0
    seen: set[int] = set()
    with kill_at_exit(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)) as process:
        while process.poll() is None:
            workers = [pid for pid in workers_of(process) if pid not in seen]
            if kills == most or len(workers) < 2:
                time.sleep(0.02)
                continue
            time.sleep(5 * generator.random())
            if process.poll() is None and set(workers) <= set(workers_of(process)):
                os.kill(generator.choice(workers), signal.SIGKILL)
                seen |= set(workers)
                kills += 1
    assert process.returncode == 0
    return kills


@needs_torture
def test_killed_under_torchrun(here: list[str], undisturbed: dict[str, dict[str, bytes]]) -> None:
    """`kill -9` of a random rank: torchrun starts them again, and they come to the bytes of a run that nobody disturbed."""
    _, *often = program("train_with_constants", "picogpt.training.trainer.SAVE_INTERVAL=0.02")
    generator = random.Random(0)
    kills = 0
    for number in itertools.count():
        sync = generator.choice(["0", "7"])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "99"]
        command += ["--", *often, *disturbed(here[:2], sync, f"killed-{number}"), "--fresh"]
        kills += killed(command, generator, TIMES - kills)
        assert checkpoint_bytes(f"killed-{number}") == undisturbed[sync]
        assert not Path(f"logs/killed-{number}.old-1").exists()
        if kills == TIMES:
            return


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["--minutes", "0.01"], "timing a few steps"), (["--dry-run"], "dry run: nothing was trained"), ([], "finished, all")],
    ids=["minutes", "dry run", "finished"],
)
def test_other_ways(here: list[str], flags: list[str], expected: str) -> None:
    """What rank 0 measures, rehearses or finds done, the others go through with it."""
    base = [*here[:2], *SMALL] if "--minutes" in flags else here  # one length only
    if not flags:
        train.main([*here, "--epochs", "1"])
        base = [*here, "--epochs", "1"]

    assert run_ranks(2, [*base, *flags]) == [0, 0]
    assert expected in said()
    assert said(1) == ""
    assert Path("logs").exists() == ("--dry-run" not in flags)


@pytest.mark.parametrize(
    ("count", "flags", "code", "message"),
    [
        (3, [], 2, "--batch-size must be a multiple of the 3 ranks that share a step, got 4"),
        (2, ["--text", "nowhere.txt"], 1, "nowhere.txt: cannot be read"),
        (2, ["--device", "cuda"], 1, "--device cuda: torch"),
    ],
)
def test_refusals(here: list[str], count: int, flags: list[str], code: int, message: str) -> None:
    """What cannot be, rank 0 says in one line; all of them end with its exit code."""
    assert run_ranks(count, [*here, *flags]) == [code] * count
    assert message in said()
    assert "Traceback" not in said()
    assert [said(rank) for rank in range(1, count)] == [""] * (count - 1)
    assert not Path("logs").exists()


def test_no_ranks_on_mps(here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing moves between such GPUs, and that is said."""
    monkeypatch.setattr("picogpt.backend.choose_device", lambda *_: (torch.device("mps"), ""))

    assert run_ranks(2, [*here, "--device", "mps"]) == [1, 1]
    assert "--device mps: torch cannot connect ranks on such a GPU" in said()


def test_junk_variables() -> None:
    """Variables that are half there, or no numbers, are named."""
    with pytest.raises(ConfigError, match="the environment has RANK and WORLD_SIZE=''; start ranks with torchrun, or unset RANK"):
        Ranks.join({"RANK": "0"})
    with pytest.raises(ConfigError, match="the environment has RANK and RANK='x'"):
        Ranks.join({"RANK": "x"})
    numbers = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"), "1")
    with pytest.raises(ConfigError, match="the environment has RANK and MASTER_ADDR=''"):
        Ranks.join(numbers)
    assert Ranks.join({}).count == 1


def test_loopback_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of one machine talk over the loopback; those of several, or told otherwise, do not."""
    monkeypatch.setattr("picogpt.training.distributed.rendezvous", lambda *_, **__: iter([(hash_store(), 0, 2)]))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    here = {**dict(zip(names, ("0", "2", "0", "2"), strict=True)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    told = {**here, "GLOO_SOCKET_IFNAME": "eth7"}
    two_machines = {**here, "LOCAL_WORLD_SIZE": "1"}
    for environment in (here, told, two_machines):
        Ranks.join(environment)

    assert here["GLOO_SOCKET_IFNAME"] == "lo"
    assert told["GLOO_SOCKET_IFNAME"] == "eth7"
    assert "GLOO_SOCKET_IFNAME" not in two_machines


def test_starts_are_remembered() -> None:
    """A restart by torchrun finds that the run has begun; without torchrun every start is the first."""
    store = hash_store()
    Ranks(0, 2, 0, store).mark_launched()
    SINGLE_PROCESS.mark_launched()

    assert not Ranks(0, 2, 0, store).is_first_launch()
    assert Ranks(0, 2, 0, hash_store()).is_first_launch()
    assert SINGLE_PROCESS.is_first_launch()


def test_other_errors_stay_what_they_are() -> None:
    """Only the loss of a rank becomes a line about it."""
    with pytest.raises(RuntimeError, match="mine"), translate_dist_errors():
        raise RuntimeError("mine")
    with pytest.raises(RanksError, match=r"another rank .* \(too late\); the last checkpoint is intact"), translate_dist_errors():
        raise dist.DistNetworkError("[/a/b.cc:5] too late. Ask somebody.\nstack")


def test_other_version() -> None:
    """A machine with another picogpt is told."""
    with pytest.raises(RanksError, match=r"rank 0 has picogpt 0\.0 and this machine .*; install the same one everywhere"):
        DataParallelState.from_spec(Checkpoint(tensors={}, state={"version": "0.0"}), SINGLE_PROCESS, None)


@pytest.mark.parametrize("form", ["fused", "products"])
def test_attention_of_rank_0(form: str) -> None:
    """The other ranks compute attention as rank 0 does, whatever is fast on their machines."""
    leader = DataParallelState(TINY, TrainConfig(), torch.float32)
    leader.runner.attention = form
    follower = DataParallelState.from_spec(leader.to_spec(leader.state_tensors()), SINGLE_PROCESS, 1)

    assert follower.runner.attention == form


@pytest.mark.parametrize("vocab_size", [88, 1000])
def test_messages(vocab_size: int) -> None:
    """What is sent is what arrives: a batch, whose ids take a byte or two, and a state with its tensors."""
    config = TrainConfig(batch_size=2, windows=3)
    inputs, targets = tiny_source(config).train_batch(5)
    batch = Batch(inputs + vocab_size - 40, targets + vocab_size - 40)
    again, rate = unpack_step(pack_step(batch, 0.1, vocab_size), 2, vocab_size)
    assert rate == 0.1
    state = unpack(pack(Checkpoint(tensors={"a": np.arange(3.0)}, state={"b": [1]})))

    assert np.array_equal(again.inputs, batch.inputs)
    assert np.array_equal(again.targets, batch.targets)
    assert state.state == {"b": [1]}
    assert state.tensors["a"].tolist() == [0, 1, 2]


def test_outer_step() -> None:
    """Nesterov: with momentum 0.9 the first step goes 0.7 x 1.9 of the mean difference, and the second looks further."""
    anchor = torch.tensor([1.0])
    outer = OuterOptimizer([anchor])
    outer.step([torch.tensor([0.0])])
    first = outer.anchors[0].item()
    outer.step([outer.anchors[0] - 1])

    assert first == pytest.approx(1 - 0.7 * 1.9)
    assert outer.anchors[0].item() == pytest.approx(first - 0.7 * (1 + 0.9 * 1.9))
    assert anchor.item() == 1


@pytest.fixture
def outer_trainers() -> tuple[RankZeroTrainer, RankZeroTrainer]:
    """A trainer with an outer step every four steps, and one without."""
    configs = [TrainConfig(batch_size=2, windows=3, lr=1e-2, warmup_steps=2, sync_every=every) for every in (4, 0)]
    with_outer, without = (RankZeroTrainer(TINY, config, tiny_source(config), torch.float32) for config in configs)
    return with_outer, without


def test_local_steps(outer_trainers: tuple[RankZeroTrainer, RankZeroTrainer]) -> None:
    """Steps are the usual ones until the outer step, which goes 0.7 x 1.9 of their way."""
    with_outer, without = outer_trainers
    before = {name: array.copy() for name, array in without.model.arrays().items()}
    for trainer in outer_trainers:
        for _ in range(3):
            trainer.train_step(1e-3)
    assert all(np.array_equal(array, without.model.arrays()[name]) for name, array in with_outer.model.arrays().items())
    assert with_outer.local_steps == 3
    for trainer in outer_trainers:
        trainer.train_step(1e-3)

    assert with_outer.local_steps == without.local_steps == 0
    for name, array in with_outer.model.arrays().items():
        way = without.model.arrays()[name] - before[name]
        assert array == pytest.approx(before[name] + 0.7 * 1.9 * way, abs=1e-5)


def test_outer_step_before_its_time(outer_trainers: tuple[RankZeroTrainer, RankZeroTrainer], tmp_path: Path) -> None:
    """With another number of ranks in the middle of a round, an outer step brings the weights together: no step is lost."""
    alone, _ = outer_trainers
    before = {name: array.copy() for name, array in alone.model.arrays().items()}
    for _ in range(3):
        alone.train_step(1e-3)
    run = RunFolder(tmp_path)
    alone.save(run)
    two = RankZeroTrainer(TINY, alone.config, tiny_source(alone.config), torch.float32, ranks=Ranks(0, 2))
    two.restore(run.load_checkpoint()[0])
    two.save(run)
    again = run.load_checkpoint()[0]

    assert (two.step, two.local_steps, again.state["ranks"]) == (3, 0, 2)
    for name, array in two.model.arrays().items():
        assert array == pytest.approx(before[name] + 0.7 * 1.9 * (alone.model.arrays()[name] - before[name]), abs=1e-5)
        assert np.array_equal(again.tensors[f"rank1.model.{name}"], array)


def test_missing_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is not there is one line and exit code 1; a name that is none is wrong usage."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda") == (torch.device("cuda", 0), "as requested")
    with pytest.raises(TrainingError, match=r"--device cuda: torch .* sees 1 such device here, and 2 are needed"):
        choose_device("cuda", 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(TrainingError, match=r"--device mps: torch .* sees no such device here; .* or take --device cpu"):
        choose_device("mps")
    assert train.main(["--dataset", "sample", "--device", "gpu"]) == 2
    assert "--device must be one of auto, cpu, cuda, mps, got 'gpu'" in capsys.readouterr().err


def test_chosen_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is a CUDA GPU where there is one, else the CPU; a GPU with bfloat16 computes in it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 3) == (CPU, "torch sees no CUDA GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == (torch.device("cuda", 1), "torch sees a GPU")
    for has, dtype, reason in ((True, torch.bfloat16, "the GPU has bfloat16"), (False, torch.float32, "the GPU has no bfloat16")):
        monkeypatch.setattr("picogpt.device._has_bfloat16", lambda _, has=has: has)
        assert choose_dtype("auto", torch.device("cuda", 1)) == (dtype, reason)
