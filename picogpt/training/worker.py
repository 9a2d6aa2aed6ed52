"""What a rank does that is not the first: what rank 0 says, until it says the end."""

from __future__ import annotations

import contextlib

from picogpt.errors import TrainingError
from picogpt.runs.folder import Checkpoint, pack, unpack
from picogpt.training.distributed import Kind, Ranks
from picogpt.training.state import Replica, unpack_step

__all__ = ["follow"]


def follow(ranks: Ranks, threads: int | None) -> int:
    """Do what rank 0 says; return the exit code that it says at the end.

    Args:
        ranks: this rank's place, connected.
        threads: how many to compute with; as many as rank 0 for None.

    Raises:
        RanksError: rank 0 is gone, or of another version.
        TrainingError: the device that rank 0 computes on is not here.
    """
    replica: Replica | None = None
    while True:
        kind, payload = ranks.hear()
        if kind is Kind.BEGIN:
            replica = Replica.from_plan(unpack(ranks.receive()), ranks, threads)
            replica.come_together()
        elif kind in {Kind.WAIT, Kind.END}:
            ranks.share([])
            if kind is Kind.END:
                return payload[0]
        else:
            assert replica is not None
            _obey(kind, payload, replica)


def _obey(kind: Kind, payload: bytes, replica: Replica) -> None:
    if kind is Kind.SYNCHRONIZE:
        replica.synchronize()
    elif kind is Kind.COLLECT:
        replica.ranks.send(pack(Checkpoint(tensors=replica.own_tensors(), state={})))
    else:
        assert kind is Kind.STEP
        with contextlib.suppress(TrainingError):  # which all ranks meet alike: rank 0 says it, saves and ends
            replica.take_step(*unpack_step(payload, replica.config.batch_size))
