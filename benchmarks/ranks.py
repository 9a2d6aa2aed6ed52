"""Several ranks against one: speed on one machine, and over a network that is held to a rate.

Also the program of each rank: `python -m benchmarks.ranks STEPS SYNC_EVERY THREADS DTYPE`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.common import ROOT
from picogpt.backend import Backend, BackendChoice
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import RandomSource
from picogpt.device import choose_dtype, set_threads
from picogpt.training.build import build_trainer
from picogpt.training.distributed import Ranks
from picogpt.training.trainer import time_call
from picogpt.training.worker import run_worker

__all__ = ["add_arguments", "compare_ranks"]

PORT = 29_517
SPACES = ("picogpt-0", "picogpt-1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train."""

    name: str
    ranks: int
    threads: int = 1
    steps: int = 10
    sync_every: int = 0
    rate: str | None = None
    """What the network between the ranks is held to, as `tc` names it; None for the loopback."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--steps", metavar="N", type=int, default=10, help="steps to time (default: 10)")
    parser.add_argument(
        "--link", metavar="RATE", help="instead: over a network of this rate, such as 50mbit, and an unlimited one (Linux, root)"
    )
    parser.add_argument("--sync-every", metavar="H", type=int, default=50, help="with --link: H of DiLoCo (default: 50)")


def compare_ranks(arguments: argparse.Namespace) -> None:
    """Print characters a second of each setting."""
    dtype = str(choose_dtype("auto")[0]).removeprefix("torch.")
    print(f"\n{dtype}\n\n| setting | characters/s |\n|---|---|")
    for setting in link_settings(arguments) if arguments.link else local_settings(arguments.steps):
        print(f"| {setting.name} | {measure(setting, dtype):,.0f} |", flush=True)


def local_settings(steps: int) -> Iterator[Setting]:
    """One rank, with one thread and with two, and two ranks with one each."""
    yield Setting(name="1 rank, 1 thread", ranks=1, steps=steps)
    yield Setting(name="1 rank, 2 threads", ranks=1, threads=2, steps=steps)
    yield Setting(name="2 ranks, 1 thread each", ranks=2, steps=steps)


def link_settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    """Two ranks in network namespaces of their own, with and without a limit, with and without outer steps."""
    for rate in ("unlimited", arguments.link):
        yield Setting(name=f"{rate}, every step", ranks=2, steps=arguments.steps, rate=rate)
        every = arguments.sync_every
        yield Setting(name=f"{rate}, --sync-every {every}", ranks=2, steps=every, sync_every=every, rate=rate)


def measure(setting: Setting, dtype: str) -> float:
    """Characters a second: of the median step, or over all steps where some of them are followed by an outer one."""
    flags = [str(value) for value in (setting.steps, setting.sync_every, setting.threads, dtype)]
    command = [sys.executable, "-m", "benchmarks.ranks", *flags]
    if setting.rate is None:
        seconds = launch([command] * setting.ranks, "127.0.0.1")
    else:
        with linked(setting.rate):
            seconds = launch([["ip", "netns", "exec", space, *command] for space in SPACES], ADDRESSES[0])
    step = statistics.mean(seconds) if setting.sync_every else statistics.median(seconds)
    return TrainConfig().batch_size * TrainConfig().windows * GPTConfig().context_len / step


def launch(commands: Sequence[Sequence[str]], address: str) -> list[float]:
    """Start a rank for each of `commands`; what rank 0 prints."""
    count = str(len(commands))
    # As if each were on a machine of its own, so that they use the network that they are given.
    shared = {**os.environ, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)}
    shared |= {"MASTER_ADDR": address, "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": "lo" if "127" in address else "picogpt"}
    processes = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank, command in enumerate(commands)
    ]
    printed = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    found: list[float] = json.loads(printed[0])
    return found


@contextmanager
def linked(rate: str) -> Iterator[None]:
    """Two network namespaces and a link between them, of `rate` in both directions unless it is `unlimited`."""

    def call(command: str) -> None:
        subprocess.run(command.split(), check=True)

    try:
        for space in SPACES:
            call(f"ip netns add {space}")
            call(f"ip -n {space} link set lo up")
        call(f"ip link add picogpt netns {SPACES[0]} type veth peer name picogpt netns {SPACES[1]}")
        for space, address in zip(SPACES, ADDRESSES, strict=True):
            call(f"ip -n {space} addr add {address}/30 dev picogpt")
            call(f"ip -n {space} link set picogpt up")
            if rate != "unlimited":
                call(f"ip netns exec {space} tc qdisc add dev picogpt root tbf rate {rate} burst 64kb latency 400ms")
        yield
    finally:
        for space in SPACES:
            subprocess.run(f"ip netns del {space}".split(), check=False)


def rank(steps: int, sync_every: int, threads: int, dtype: str) -> None:
    """What each rank does; rank 0 prints the seconds of each step."""
    ranks = Ranks.join(os.environ)
    ranks.connect()
    if ranks.rank:
        run_worker(ranks, threads)
        return
    set_threads(threads)
    model, config = GPTConfig(), TrainConfig(sync_every=sync_every)
    source = RandomSource(sequence_len=config.windows * model.context_len, batch_size=config.batch_size)
    with ranks.propagate_exit_code():
        choice = BackendChoice(device="cpu", dtype=dtype, threads=threads)
        selected = Backend.select(model, choice, sequences=config.batch_size // ranks.count)
        trainer = build_trainer(model, config, source, selected, ranks)
        for _ in range(2):  # which make buffers and kernels
            trainer.train_step(1e-3)
        print(json.dumps([time_call(lambda: trainer.train_step(1e-3)) for _ in range(steps)]))


if __name__ == "__main__":
    rank(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
