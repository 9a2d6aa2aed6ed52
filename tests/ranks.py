"""Several ranks of one run, each a process forked from that of the tests: what torchrun starts, without its seconds."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch._dynamo  # noqa: F401 (a rank would import it, which takes a second: here it is done once)

from picogpt.cli import train
from tests.hub import free_port


class RankProcesses:
    """The ranks of a run in the current folder; what rank r says lies in `rank-r.out` and `rank-r.err`.

    At the end of a `with` block those that are left are killed.
    """

    def __init__(self, count: int, flags: Sequence[str], **changes: str) -> None:
        port = str(free_port())
        self.pids: list[int] = []
        self._codes: dict[int, int] = {}
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # other threads are asleep
                pid = os.fork()
            if pid == 0:
                self._train(rank, flags, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **own, **changes})
            self.pids.append(pid)

    @staticmethod
    def _train(rank: int, flags: Sequence[str], variables: dict[str, str]) -> None:
        code = 70
        try:
            os.environ.update(variables)
            with Path(f"rank-{rank}.out").open("w") as out, Path(f"rank-{rank}.err").open("w") as err:
                sys.stdout, sys.stderr = out, err
                os.dup2(err.fileno(), 2)
                code = train.main(list(flags))
        finally:
            os._exit(code)

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pid in self.pids:
            if pid not in self._codes:
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def wait_for(self, rank: int) -> int:
        """Wait, at most two minutes, for the end of a rank: its exit code, minus the signal's number if a signal killed it."""
        pid = self.pids[rank]
        deadline = time.monotonic() + 120
        while pid not in self._codes:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._codes[pid] = os.waitstatus_to_exitcode(status)
            else:
                assert time.monotonic() < deadline, f"rank {rank} does not end: {said(rank)}"
                time.sleep(0.01)
        return self._codes[pid]

    def wait(self) -> list[int]:
        """Wait for all ranks; their exit codes."""
        return [self.wait_for(rank) for rank in range(len(self.pids))]

    def await_text(self, text: str, rank: int = 0) -> None:
        """Wait until `rank` has printed `text`."""
        path = Path(f"rank-{rank}.out")
        deadline = time.monotonic() + 60
        while not path.exists() or text not in path.read_text():
            assert time.monotonic() < deadline, said(rank)
            time.sleep(0.02)


def run_ranks(count: int, flags: Sequence[str], **changes: str) -> list[int]:
    """Run to the end and return the exit codes."""
    with RankProcesses(count, flags, **changes) as ranks:
        return ranks.wait()


def said(rank: int = 0) -> str:
    """What a rank wrote on stderr."""
    return Path(f"rank-{rank}.err").read_text()
