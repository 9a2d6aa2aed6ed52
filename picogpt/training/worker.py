"""The loop of a worker, a rank other than 0: receive commands of rank 0 and execute them until the end."""

from __future__ import annotations

import contextlib

from picogpt.errors import TrainingError
from picogpt.runs.checkpoint import Checkpoint, pack, unpack
from picogpt.training.data_parallel import DataParallelState, unpack_step
from picogpt.training.distributed import Command, Ranks

__all__ = ["run_worker"]


def run_worker(ranks: Ranks, threads: int | None) -> int:
    """Execute the commands of rank 0; return the exit code that its last command carries.

    Args:
        ranks: this process among the ranks, connected.
        threads: threads to compute with; None takes the number of rank 0.

    Raises:
        RanksError: rank 0 is gone, or runs another version of picogpt.
        TrainingError: this machine lacks the kind of device that rank 0 computes on.
    """
    state: DataParallelState | None = None
    while True:
        command, payload = ranks.recv_command()
        if command is Command.BEGIN:
            # The spec follows by point-to-point, as ranks of a DiLoCo run have weights of their own.
            state = DataParallelState.from_spec(unpack(ranks.receive()), ranks, threads)
            state.wrap_ddp()  # takes part in a backward pass, at the same time as rank 0
        elif command in {Command.WAIT, Command.END}:
            # The answer to rank 0's heartbeat; signals travel with it in both directions.
            ranks.all_gather([])
            if command is Command.END:
                return payload[0]
        else:
            assert state is not None
            _execute(command, payload, state)


def _execute(command: Command, payload: bytes, state: DataParallelState) -> None:
    # Each branch makes the same collective calls as rank 0 does after it has sent the command.
    if command is Command.OUTER_STEP:
        state.outer_step()
    elif command is Command.COLLECT:
        state.ranks.send(pack(Checkpoint(tensors=state.state_tensors(), state={})))
    else:
        assert command is Command.STEP
        # A loss that is not finite raises on all ranks alike; rank 0 reports it, saves and ends the run.
        with contextlib.suppress(TrainingError):
            state.local_step(*unpack_step(payload, state.config.batch_size, state.model.config.vocab_size))
