"""What a rank does that is not the first: what rank 0 says, until it says the end."""

from __future__ import annotations

import contextlib

from picogpt.errors import TrainingError
from picogpt.runs.folder import Checkpoint, pack, unpack
from picogpt.training.distributed import Command, Ranks
from picogpt.training.state import TrainState, unpack_step

__all__ = ["run_worker"]


def run_worker(ranks: Ranks, threads: int | None) -> int:
    """Do what rank 0 says; return the exit code that it says at the end.

    Args:
        ranks: this rank's place, connected.
        threads: how many to compute with; as many as rank 0 for None.

    Raises:
        RanksError: rank 0 is gone, or of another version.
        TrainingError: the device that rank 0 computes on is not here.
    """
    state: TrainState | None = None
    while True:
        command, payload = ranks.recv_command()
        if command is Command.BEGIN:
            state = TrainState.from_spec(unpack(ranks.receive()), ranks, threads)
            state.wrap_ddp()
        elif command in {Command.WAIT, Command.END}:
            ranks.all_gather([])
            if command is Command.END:
                return payload[0]
        else:
            assert state is not None
            _execute(command, payload, state)


def _execute(command: Command, payload: bytes, state: TrainState) -> None:
    if command is Command.OUTER_STEP:
        state.outer_step()
    elif command is Command.COLLECT:
        state.ranks.send(pack(Checkpoint(tensors=state.state_tensors(), state={})))
    else:
        assert command is Command.STEP
        with contextlib.suppress(TrainingError):  # which all ranks meet alike: rank 0 says it, saves and ends
            state.local_step(*unpack_step(payload, state.config.batch_size))
