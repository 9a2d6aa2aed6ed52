"""Data-parallel training over torch.distributed: rank 0 sends commands, the workers execute them.

Rank 0 does everything that a single process does: it reads the text, validates, logs and saves. Workers receive messages: the
initial state, the batch of each step, the end. So the text is read once and divided without overlap, a run can be resumed with
any number of ranks, and only rank 0 needs the run's folder. Messages are plain bytes that cannot run code (no pickle).
"""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from picogpt.data import Stop
from picogpt.errors import ConfigError, PicoGPTError, RanksError

__all__ = ["SINGLE_PROCESS", "Command", "Ranks", "SignalState", "translate_dist_errors"]

PATIENCE = timedelta(minutes=30)
"""Timeout of a collective call: how long a rank may be silent before the others raise."""
HEARTBEAT = 1.0
"""Seconds between two heartbeats of rank 0 while it waits for data or validates: signals are passed on, and nothing times out."""
POLL = 0.05
"""Seconds between two polls of the store while the ranks wait for each other to start."""


class Command(IntEnum):
    """A command of rank 0 to the workers."""

    BEGIN = 0
    """Build the training state from the spec that is sent to each rank."""
    STEP = 1
    """Take a training step; payload: the learning rate and the global batch."""
    OUTER_STEP = 2
    """Take an outer step (DiLoCo) now."""
    COLLECT = 3
    """Send back this rank's tensors of the checkpoint."""
    WAIT = 4
    """Answer a heartbeat: rank 0 is busy."""
    END = 5
    """Exit; payload: the exit code."""


class SignalState(Protocol):
    """Holder of the number of the signal that asked the process to end."""

    signal_number: int | None


# The default, for callers that handle no signals.
class _NoSignals:
    signal_number: int | None = None


class Ranks:
    """This process in the group of ranks. All ranks call the same methods in the same order.

    A single process is a group of one: every method then returns at once and torch.distributed is not used.

    Args:
        rank: rank of this process, from 0.
        count: number of ranks (world size).
        local_rank: rank of this process on its machine.
        store: key-value store in which the ranks find each other; it outlives restarts by torchrun.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, store: Store | None = None) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._store = store
        self._box: SignalState = _NoSignals()
        self._group: dist.ProcessGroup | None = None
        self._sent_at = 0.0  # time of the last message of rank 0

    @classmethod
    def join(cls, environment: MutableMapping[str, str]) -> Ranks:
        """Return the group that torchrun's environment variables describe; a single process where there are none.

        Where all ranks are on this machine they connect over the loopback, unless GLOO_SOCKET_IFNAME names another interface.

        Raises:
            ConfigError: the variables are incomplete or malformed.
            RanksError: torchrun cannot be reached.
        """
        if "RANK" not in environment:
            return cls()
        rank, count, local_rank, local_count = (
            _number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
        # Only validated: torch reads the address and port itself, with errors that are hard to understand.
        _number(environment, "MASTER_PORT")
        if not environment.get("MASTER_ADDR"):
            raise _half_set("MASTER_ADDR", "")
        # gloo otherwise takes the interface of the host's name, which a laptop may lose when its network changes.
        loopback = [name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}]
        if count == local_count and loopback:
            environment.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
        with translate_dist_errors():
            # The store is reached now, but the ranks connect later: rank 0 first loads its text and checks its flags.
            store, _, _ = next(iter(rendezvous("env://", timeout=PATIENCE)))
        return cls(rank, count, local_rank, PrefixStore("picogpt", store))

    def attach_signals(self, box: SignalState) -> None:
        """Pass the signal in `box` to the other ranks, and note the other ranks' signals there."""
        self._box = box

    def is_first_launch(self) -> bool:
        """Whether this is the first launch by torchrun, and no restart: `mark_launched` was not called before."""
        with translate_dist_errors():
            return self._store is None or not self._store.check(["started"])

    def mark_launched(self) -> None:
        """Record in the store, which outlives restarts, that the run has been launched."""
        if self._store is not None:
            with translate_dist_errors():
                self._store.set("started", "1")

    def connect(self) -> None:
        """Form the process group; rank 0 calls this when it is ready, the workers at once.

        Raises:
            RanksError: a rank cannot be reached.
        """
        if self.count == 1 or dist.is_initialized():
            return
        assert self._store is not None
        with translate_dist_errors():
            # Both sides agree on a prefix of the store that is new for each start.
            name = self._await_workers() if self.rank == 0 else self._await_rank_0()
            store = PrefixStore(name, self._store)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.count, timeout=PATIENCE)
        self._sent_at = time.monotonic()

    # The store may hold keys of an earlier launch. So each worker writes a random number as its call, and accepts only an
    # answer to that number: a handshake that a stale key cannot complete.

    def _await_workers(self) -> str:
        assert self._store is not None
        name = secrets.token_hex(8)
        missing = set(range(1, self.count))
        while missing:
            for rank in sorted(missing):
                # The worker has confirmed; or it has called and gets the name as its answer; or it is asked for again.
                if self._store.check([f"{name}/{rank}"]):
                    missing.discard(rank)
                elif self._store.check([f"call/{rank}"]):
                    self._store.set(f"answer/{self._store.get(f'call/{rank}').decode()}", name)
            time.sleep(POLL)
        return name

    def _await_rank_0(self) -> str:
        assert self._store is not None
        call = secrets.token_hex(8)
        self._store.set(f"call/{self.rank}", call)
        while not self._store.check([f"answer/{call}"]):
            time.sleep(POLL)
        name = str(self._store.get(f"answer/{call}").decode())
        self._store.set(f"{name}/{self.rank}", "here")
        return name

    def broadcast_command(self, kind: Command, payload: bytes = b"") -> None:
        """On rank 0: broadcast a command with its payload to all workers."""
        if self.count == 1:
            return
        with translate_dist_errors():
            # The size goes first, so that the workers can allocate; without a payload there is no second message.
            dist.broadcast(torch.tensor([kind, len(payload)]), src=0)
            if payload:
                dist.broadcast(_to_tensor(payload), src=0)
        self._sent_at = time.monotonic()

    def recv_command(self) -> tuple[Command, bytes]:
        """On a worker: receive the next command and its payload."""
        header = torch.zeros(2, dtype=torch.int64)  # command, bytes of payload
        with translate_dist_errors():
            dist.broadcast(header, src=0)
            kind, size = header.tolist()
            payload = torch.empty(size, dtype=torch.uint8)
            if size:
                dist.broadcast(payload, src=0)
        return Command(kind), payload.numpy().tobytes()

    def send(self, content: bytes, target: int = 0) -> None:
        """Send `content` to rank `target`, which calls `receive`."""
        with translate_dist_errors():
            dist.send(torch.tensor([len(content)]), target)
            dist.send(_to_tensor(content), target)

    def receive(self, source: int = 0) -> bytes:
        """Receive the bytes that rank `source` sends."""
        # The size first, as a receiver has to allocate.
        size = torch.zeros(1, dtype=torch.int64)
        with translate_dist_errors():
            dist.recv(size, source)
            content = torch.empty(int(size.item()), dtype=torch.uint8)
            dist.recv(content, source)
        return content.numpy().tobytes()

    def all_gather(self, values: Sequence[float]) -> list[list[float]]:
        """Gather the `values` of all ranks, in the order of ranks; signals travel with them."""
        if self.count == 1:
            return [list(values)]
        # Signals ride on calls that happen anyway: a stop on one rank reaches all of them within a step.
        own = torch.tensor([*values, self._box.signal_number or 0], dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.count)]
        with translate_dist_errors():
            dist.all_gather(found, own)
        signals = [int(each[-1].item()) for each in found]
        if self._box.signal_number is None:
            # A rank keeps a signal of its own; else it takes the one that some other rank got.
            self._box.signal_number = max(signals) or None
        return [each[:-1].tolist() for each in found]

    def with_heartbeat(self, stop: Stop) -> Stop:
        """On rank 0: wrap `stop` so that asking it also sends a heartbeat, at most one each `HEARTBEAT` seconds."""

        def stop_with_heartbeat() -> bool:
            if self.count > 1 and time.monotonic() - self._sent_at > HEARTBEAT:
                self.broadcast_command(Command.WAIT)
                self.all_gather([])  # brings the workers' signals
            return stop()

        return stop_with_heartbeat

    def wrap_ddp(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Wrap `model` in DDP: the backward pass then averages gradients over the ranks, whose weights must be equal."""
        if self.count == 1:
            return model
        with translate_dist_errors():
            return DistributedDataParallel(
                model,
                process_group=self._group_for(device),
                # The model has no buffers, and its weights came in the spec.
                forward_sync_buffers=False,
                # Gradients live in the all-reduce's buckets: no copy of them.
                gradient_as_bucket_view=True,
                init_sync=False,
            )

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the mean of each of `tensors` over the ranks, bit-identical on all ranks."""
        if self.count == 1:
            return list(tensors)
        # One all-reduce for all tensors instead of one for each.
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with translate_dist_errors():
            dist.all_reduce(flat, group=self._group_for(flat.device))
        parts = torch.split(flat / self.count, [tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def _group_for(self, device: torch.device) -> dist.ProcessGroup | None:
        """Return the group for tensors of `device`: the default one (gloo) for a CPU, one with nccl for a GPU."""
        if device.type == "cuda" and self._group is None:
            self._group = dist.new_group(backend="nccl")
        return self._group if device.type == "cuda" else None

    @contextlib.contextmanager
    def propagate_exit_code(self) -> Iterator[None]:
        """On rank 0: when the block ends, end the workers too, with its exit code."""
        # Without it, torchrun would see workers that wait forever, or restart a run that ended as it should.
        try:
            yield
        except RanksError:
            raise  # the other ranks notice the lost connection themselves
        except (PicoGPTError, OSError) as error:
            self._end(error.exit_code if isinstance(error, PicoGPTError) else 1)
            raise
        self._end(0)

    def _end(self, code: int) -> None:
        if self.count > 1:
            # A worker that is gone by now need not be ended.
            with contextlib.suppress(RanksError):
                self.connect()
                self.broadcast_command(Command.END, bytes([code]))
                self.all_gather([])


SINGLE_PROCESS = Ranks()
"""The group of a process that trains by itself."""


@contextlib.contextmanager
def translate_dist_errors() -> Iterator[None]:
    """Turn torch's errors about a lost rank into a `RanksError` with a one-line message.

    Raises:
        RanksError: another rank cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no exception class of its own: its messages carry the path of a gloo source file.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        # Drop the source location in front and everything after the first sentence.
        reason = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0]).partition(". ")[0]
        raise RanksError(
            f"another rank has ended or cannot be reached ({reason}); the last checkpoint is intact: "
            "start again to resume from it"
        ) from error


def _to_tensor(content: bytes) -> Tensor:
    # bytearray makes a copy that can be written to: torch warns about read-only memory.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    # isdigit alone accepts digits of other scripts.
    if not (value.isascii() and value.isdigit()):
        raise _half_set(name, value)
    return int(value)


def _half_set(name: str, value: str) -> ConfigError:
    return ConfigError(f"the environment has RANK and {name}={value!r}; start ranks with torchrun, or unset RANK")
