"""Several ranks of one run, each a process forked from that of the tests: what torchrun starts, without its seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch._dynamo  # noqa: F401 (a rank would import it, which takes a second: here it is done once)

from picogpt.cli import train
from tests.hub import free_port


class RankProcesses:
    """The ranks of a run in the current folder; what rank r says lies in `rank-r.out` and `rank-r.err`."""

    def __init__(self, count: int, flags: Sequence[str], **changes: str) -> None:
        port = str(free_port())
        self.pids: list[int] = []
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

    def wait(self) -> list[int]:
        """The exit code of each, minus the signal's number for one that a signal killed."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def await_text(self, text: str, rank: int = 0) -> None:
        """Wait until rank 0 has printed `text`."""
        path = Path(f"rank-{rank}.out")
        deadline = time.monotonic() + 60
        while not path.exists() or text not in path.read_text():
            assert time.monotonic() < deadline, Path(f"rank-{rank}.err").read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        """End those that are left."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def run_ranks(count: int, flags: Sequence[str], **changes: str) -> list[int]:
    """Run to the end and return the exit codes."""
    return RankProcesses(count, flags, **changes).wait()


def said(rank: int = 0) -> str:
    """What a rank wrote on stderr."""
    return Path(f"rank-{rank}.err").read_text()
