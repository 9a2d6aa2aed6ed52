"""Several processes against one: the same numbers, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from picogpt.config import GPTConfig
from picogpt.engine import Engine, team, window
from picogpt.errors import EngineError
from picogpt.generate import Roll
from picogpt.model import GPT
from picogpt.run import RunFolder

CONFIG = GPTConfig(n_layer=2, n_head=4, n_embd=32, context_len=12)

pytestmark = pytest.mark.skipif(not team.can_have_team(), reason="this machine's processes cannot work as a team")


@pytest.fixture(scope="module")
def model() -> GPT:
    """A model with rough weights, norms and biases too."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture
def pair(model: GPT) -> Iterator[Engine]:
    """The model on two processes."""
    engine = Engine(CONFIG, model.arrays(), processes=2, texts=3)
    yield engine
    assert engine.team is not None
    engine.team.close()


def helpers(engine: Engine) -> list[int]:
    """Process ids of an engine's helpers."""
    assert engine.team is not None
    return list(engine.team._helpers)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_team_gives_what_one_process_gives(model: GPT, processes: int) -> None:
    """Reading at once, one by one, and many texts side by side, over several hops."""
    alone = Roll(Engine(CONFIG, model.arrays()), 5)
    engine = Engine(CONFIG, model.arrays(), processes=processes)
    together = Roll(engine, 5)
    prompt, tails = np.arange(1, 20)[None], np.arange(60).reshape(3, 20) + 1

    np.testing.assert_allclose(together.read_every(prompt), alone.read_every(prompt), rtol=1e-4, atol=1e-4)
    forks = [roll.fork(3) for roll in (alone, together)]
    for i in range(20):
        one, two = (roll.read(tails[:1, i : i + 1]) for roll in (alone, together))
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)
        one, two = (roll.read(tails[:, i : i + 1]) for roll in forks)
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)
    assert engine.team is not None
    engine.team.close()


def test_more_than_the_memory_between_them_holds(model: GPT, pair: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slots of many texts are advanced in pieces."""
    monkeypatch.setattr(pair, "rows", 7)
    ids = np.arange(36).reshape(3, 12) + 1
    expected = Roll(Engine(CONFIG, model.arrays()), 12, batch=3).read_every(ids)

    np.testing.assert_allclose(Roll(pair, 12, batch=3).read_every(ids), expected, rtol=1e-4, atol=1e-4)


def test_large_scores_are_done_carefully(model: GPT) -> None:
    """A character that has to be done again is done again by all."""
    arrays = {name: array.copy() for name, array in model.arrays().items()}
    for i in range(CONFIG.n_layer):
        arrays[f"transformer.h.{i}.attn.c_attn.weight"] *= 100
    alone, together = (Roll(Engine(CONFIG, arrays, processes=n), 12) for n in (1, 2))
    for token in range(1, 11):
        one, two = (roll.read(np.array([[token]])) for roll in (alone, together))
        assert np.isfinite(two).all()
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-3)


def test_teams_side_by_side(model: GPT) -> None:
    """The first team's helper leaves although the second team's was made after it."""
    first, second = (Engine(CONFIG, model.arrays(), processes=2) for _ in range(2))
    assert first.team is not None
    assert second.team is not None
    (helper,) = helpers(first)
    first.team.close()

    assert not runs(helper)
    assert np.isfinite(Roll(second, 5).read(np.array([[1, 2]]))).all()
    second.team.close()


def test_helper_sleeps_and_wakes(pair: Engine) -> None:
    """A helper without work takes no processor time, and goes on when there is work again."""

    def used() -> int:
        return sum(map(int, Path(f"/proc/{helper}/stat").read_text().rpartition(")")[2].split()[11:13]))

    (helper,) = helpers(pair)
    roll = Roll(pair, 5)
    roll.read(np.array([[1, 2, 3]]))
    time.sleep(0.05)
    before = used()
    time.sleep(0.2)
    assert used() - before <= 2  # of 20 hundredths of a second
    assert np.isfinite(roll.read(np.array([[4]]))).all()


def test_windows_are_dropped(pair: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is no longer used is dropped in the helper too, with the next order."""
    assert pair.team is not None
    orders: list[tuple[int, ...]] = []
    give = pair.team._give

    def watched(*words: int) -> None:
        orders.append(words)
        give(*words)

    monkeypatch.setattr(pair.team, "_give", watched)
    Roll(pair, 5).read(np.array([[1]]))
    Roll(pair, 5).read(np.array([[1]]))

    assert (team._CLOSE, 1) in orders


@pytest.mark.parametrize(("number", "how"), [(signal.SIGKILL, "signal 9"), (signal.SIGTERM, "signal 15")])
def test_a_helper_that_dies_is_noticed(pair: Engine, number: int, how: str) -> None:
    """Generation ends with what happened and what to do."""
    roll = Roll(pair, 5)
    roll.read(np.array([[1, 2, 3]]))
    os.kill(helpers(pair)[0], number)

    with pytest.raises(EngineError, match=rf"a helper process ended unasked \({how}\); start again, with --threads 1"):
        roll.read(np.array([[1, 2, 3]]))


CODE = """
import sys, time, numpy as np
from pathlib import Path
from picogpt.engine import Engine
from picogpt.generate import Roll
engine = Engine.load(Path(sys.argv[1]), threads=2)
roll = Roll(engine, 5)
print(*engine.team._helpers, flush=True)
while True:
    roll.read(np.array([[1]]))
    {rest}
"""


@pytest.fixture
def path(model: GPT, tmp_path: Path) -> str:
    """The model in a file."""
    RunFolder(tmp_path).save_model(model.arrays(), CONFIG)
    return str(tmp_path / "model.safetensors")


def test_a_helper_that_fails_says_why(path: str) -> None:
    """What went wrong in a helper is on stderr, with its exit code in the error."""
    code = CODE.format(rest="engine.team.step(77, np.zeros(32, np.float32), 0)")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)

    assert "KeyError: 77" in done.stderr
    assert "EngineError: a helper process ended unasked (exit code 1)" in done.stderr


@pytest.mark.parametrize("rest", ["pass", "time.sleep(0.02)", "time.sleep(60)"])
def test_helpers_leave_when_their_parent_is_killed(path: str, rest: str) -> None:
    """At work or asleep: no process is left behind."""
    command = [sys.executable, "-c", CODE.format(rest=rest), path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        helper = int(process.stdout.readline())
        time.sleep(0.1)
        process.kill()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and runs(helper):
        time.sleep(0.02)

    assert not runs(helper)


def runs(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_thread_is_one(path: str) -> None:
    """With one process numpy's products use no more threads either."""
    with threadpool_limits(2, user_api="blas"):
        Engine.load(Path(path), threads=1)
        assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} == {1}


@pytest.mark.parametrize(
    ("asked", "n_head", "cores", "expected"),
    [(None, 8, 4, 2), (None, 8, 1, 1), (None, 3, 4, 1), (1, 8, 4, 1), (4, 8, 2, 4), (3, 8, 2, 2), (4, 6, 2, 3), (64, 4, 2, 4)],
)
def test_processes(monkeypatch: pytest.MonkeyPatch, asked: int | None, n_head: int, cores: int, expected: int) -> None:
    """As many as asked for, else one a core and two at most; the heads divide evenly."""
    monkeypatch.setattr(window, "physical_cores", lambda: cores)

    assert window.processes_for(GPTConfig(n_head=n_head, n_embd=24 * n_head), asked) == expected


def test_no_team_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the order of stores is not kept, one process computes."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")

    assert not team.can_have_team()
    assert window.processes_for(CONFIG, 4) == 1


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one; as many as there are processors where the pairs are not known."""
    assert 1 <= team.physical_cores() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {100_000, 100_001, 100_002})

    assert team.physical_cores() == 3
