"""Processes that train one model together, through torch.distributed: rank 0 leads, the others do what it says.

Rank 0 does all that a run alone does: it reads the text, measures, validates, writes. The others hear from it in messages: the
state to begin with, the batch of a step, the end. So the text is read once and shared out without overlap, a run goes on with
any number of ranks, and only rank 0 needs the run's folder. Messages are plain bytes: none of them can run code.
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
"""How long a rank may be silent before the others give it up."""
HEARTBEAT = 1.0
"""Seconds between two words of rank 0 while it waits for data or validates: so signals are noticed, and nobody gives up."""
POLL = 0.05
"""Seconds between two looks while the ranks wait for each other to start."""


class Command(IntEnum):
    """What rank 0 tells the others to do."""

    BEGIN = 0
    """Make a replica; what it is made of is handed to each rank."""
    STEP = 1
    """Take a step; the learning rate and the global batch follow."""
    OUTER_STEP = 2
    """Take an outer step now."""
    COLLECT = 3
    """Send back all that is needed to go on."""
    WAIT = 4
    """Nothing: rank 0 is busy."""
    END = 5
    """End with the exit code that follows."""


class SignalState(Protocol):
    """Where the number of a signal is noted that asked the process to end."""

    signal_number: int | None


class _NoSignals:
    signal_number: int | None = None


class Ranks:
    """The place of this process among those that train together. All of them call the same methods in the same order.

    Args:
        rank: number of this process, from 0.
        count: how many there are; alone, every method answers at once.
        local_rank: number of this process on its machine.
        store: where they find each other; lasts through the restarts of torchrun.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, store: Store | None = None) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._store = store
        self._box: SignalState = _NoSignals()
        self._group: dist.ProcessGroup | None = None
        self._spoke_at = 0.0

    @classmethod
    def join(cls, environment: MutableMapping[str, str]) -> Ranks:
        """The place that torchrun's variables give this process; alone where there are none.

        Where all ranks are on this machine they talk over the loopback, unless GLOO_SOCKET_IFNAME says otherwise.

        Raises:
            ConfigError: the variables are not those of torchrun.
            RanksError: torchrun cannot be reached.
        """
        if "RANK" not in environment:
            return cls()
        rank, count, local_rank, local_count = (
            _number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
        _number(environment, "MASTER_PORT")
        if not environment.get("MASTER_ADDR"):
            raise _half_set("MASTER_ADDR", "")
        loopback = [name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}]
        if count == local_count and loopback:
            environment.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
        with translate_dist_errors():
            store, _, _ = next(iter(rendezvous("env://", timeout=PATIENCE)))
        return cls(rank, count, local_rank, PrefixStore("picogpt", store))

    def attach_signals(self, box: SignalState) -> None:
        """Tell the others of the signal in `box`, and note there what they have got."""
        self._box = box

    def is_first_launch(self) -> bool:
        """Whether torchrun has not started this run before, as far as `mark_launched` was told."""
        with translate_dist_errors():
            return self._store is None or not self._store.check(["started"])

    def mark_launched(self) -> None:
        """Remember, through restarts, that the run has begun."""
        if self._store is not None:
            with translate_dist_errors():
                self._store.set("started", "1")

    def connect(self) -> None:
        """Meet the others; rank 0 when it is ready for them, the others as soon as they can.

        Raises:
            RanksError: they cannot be reached.
        """
        if self.count == 1 or dist.is_initialized():
            return
        assert self._store is not None
        with translate_dist_errors():
            name = self._await_workers() if self.rank == 0 else self._await_rank_0()
            store = PrefixStore(name, self._store)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.count, timeout=PATIENCE)
        self._spoke_at = time.monotonic()

    # The store may hold what the ranks of an earlier start wrote. So each of the others writes a number drawn at random, and
    # follows only an answer to that number.

    def _await_workers(self) -> str:
        assert self._store is not None
        name = secrets.token_hex(8)
        missing = set(range(1, self.count))
        while missing:
            for rank in sorted(missing):
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
        """On rank 0: tell the others what to do."""
        if self.count == 1:
            return
        with translate_dist_errors():
            dist.broadcast(torch.tensor([kind, len(payload)]), src=0)
            if payload:
                dist.broadcast(_to_tensor(payload), src=0)
        self._spoke_at = time.monotonic()

    def recv_command(self) -> tuple[Command, bytes]:
        """On the others: what rank 0 says next."""
        header = torch.zeros(2, dtype=torch.int64)
        with translate_dist_errors():
            dist.broadcast(header, src=0)
            kind, size = header.tolist()
            payload = torch.empty(size, dtype=torch.uint8)
            if size:
                dist.broadcast(payload, src=0)
        return Command(kind), payload.numpy().tobytes()

    def send(self, content: bytes, target: int = 0) -> None:
        """Send `content` to rank `target`, which `receive`s it."""
        with translate_dist_errors():
            dist.send(torch.tensor([len(content)]), target)
            dist.send(_to_tensor(content), target)

    def receive(self, source: int = 0) -> bytes:
        """What `source` sends to this rank."""
        size = torch.zeros(1, dtype=torch.int64)
        with translate_dist_errors():
            dist.recv(size, source)
            content = torch.empty(int(size.item()), dtype=torch.uint8)
            dist.recv(content, source)
        return content.numpy().tobytes()

    def all_gather(self, values: Sequence[float]) -> list[list[float]]:
        """The `values` of every rank, in their order; signals travel with them."""
        if self.count == 1:
            return [list(values)]
        own = torch.tensor([*values, self._box.signal_number or 0], dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.count)]
        with translate_dist_errors():
            dist.all_gather(found, own)
        signals = [int(each[-1].item()) for each in found]
        if self._box.signal_number is None:
            self._box.signal_number = max(signals) or None
        return [each[:-1].tolist() for each in found]

    def with_heartbeat(self, stop: Stop) -> Stop:
        """On rank 0: `stop`, with a word to the others now and then, so that they know it lives and can pass on signals."""

        def asked() -> bool:
            if self.count > 1 and time.monotonic() - self._spoke_at > HEARTBEAT:
                self.broadcast_command(Command.WAIT)
                self.all_gather([])
            return stop()

        return asked

    def wrap_ddp(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model`, whose weights are the same on all ranks, with gradients that the backward pass averages over them."""
        if self.count == 1:
            return model
        with translate_dist_errors():
            return DistributedDataParallel(
                model,
                process_group=self._group_for(device),
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
                init_sync=False,
            )

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each of `tensors` over the ranks, in the same order of additions everywhere."""
        if self.count == 1:
            return list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with translate_dist_errors():
            dist.all_reduce(flat, group=self._group_for(flat.device))
        parts = torch.split(flat / self.count, [tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def _group_for(self, device: torch.device) -> dist.ProcessGroup | None:
        """Who moves tensors of `device`: gloo those of a CPU, nccl those of a GPU."""
        if device.type == "cuda" and self._group is None:
            self._group = dist.new_group(backend="nccl")
        return self._group if device.type == "cuda" else None

    @contextlib.contextmanager
    def propagate_exit_code(self) -> Iterator[None]:
        """On rank 0: have the others end when the work inside does, with its exit code."""
        try:
            yield
        except RanksError:
            raise  # the others notice it themselves
        except (PicoGPTError, OSError) as error:
            self._end(error.exit_code if isinstance(error, PicoGPTError) else 1)
            raise
        self._end(0)

    def _end(self, code: int) -> None:
        if self.count > 1:
            # One that is gone by now is missed by nobody.
            with contextlib.suppress(RanksError):
                self.connect()
                self.broadcast_command(Command.END, bytes([code]))
                self.all_gather([])


SINGLE_PROCESS = Ranks()
"""A process that trains by itself."""


@contextlib.contextmanager
def translate_dist_errors() -> Iterator[None]:
    """Turn what torch says when another rank is gone into one line.

    Raises:
        RanksError: that line.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no exception of its own; its messages carry the name of the file they come from.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0]).partition(". ")[0]
        raise RanksError(
            f"another rank has ended or cannot be reached ({reason}); the last checkpoint is intact: "
            "start again to resume from it"
        ) from error


def _to_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not (value.isascii() and value.isdigit()):
        raise _half_set(name, value)
    return int(value)


def _half_set(name: str, value: str) -> ConfigError:
    return ConfigError(f"the environment has RANK and {name}={value!r}; start ranks with torchrun, or unset RANK")
