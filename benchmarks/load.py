"""A stream against the same batches from memory."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.common import full_trainer
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import (
    ArticleReader,
    Batch,
    RandomSource,
    Source,
    Stop,
    StreamSource,
    StreamSpec,
    draw_validation,
    find_shards,
)
from picogpt.device import set_threads
from picogpt.runs.folder import RunFolder
from picogpt.training.memory import peak_memory
from picogpt.training.trainer import Trainer, time_call
from tests.hub import Hub, serving

__all__ = ["add_arguments", "loading"]

PAIRS = 40
"""Training steps from the stream, and as many from memory."""
LOADER_BATCHES = 2000
REPOSITORY = "bench/mark"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flag of this comparison."""
    parser.add_argument("--folder", metavar="DIR", type=Path, required=True, help="a data set laid out like the hub's")


def serve(folder: Path, requests: Connection) -> None:
    """Serve `folder` like the hub, in a process of its own: send the port, then for each request the bytes sent so far."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    hub = Hub(REPOSITORY, files)
    with serving(hub) as port:
        requests.send(port)
        while requests.recv():
            requests.send(hub.bytes_sent)


@dataclass
class Loaded:
    """What a process measured."""

    seconds: float = 0.0
    """From the first request to the first batch."""
    downloaded: float = 0.0
    """MB, until then."""
    peak_at_first_batch: float = 0.0
    """MB of memory."""
    chars_per_second: float = 0.0
    """Of the loader alone."""
    chars_per_second_training: float = 0.0
    share: float = 0.0
    """Of training time that the stream costs."""
    peak: float = 0.0
    """MB of memory at the end."""


def peak() -> float:
    """The most memory this process has held, in MB."""
    return peak_memory() / 2**20


class Tap(StreamSource):
    """A stream whose last batch is kept."""

    last: Batch

    def train_batch(self, k: int, stop: Stop = lambda: False) -> Batch:
        """The stream's next batch."""
        self.last = super().train_batch(k, stop)
        return self.last


class Replay(RandomSource):
    """The last batch of a stream again, from memory."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(sequence_len=sequence_len(), batch_size=TrainConfig().batch_size)
        self._tap = tap

    def train_batch(self, k: int, stop: Stop = lambda: False) -> Batch:  # noqa: ARG002
        """That batch."""
        return self._tap.last


def default_trainer(source: Source) -> Trainer:
    """The default model and batch, in this machine's own number type."""
    set_threads(None)
    return full_trainer(TrainConfig(), source)


def sequence_len() -> int:
    """Characters of a sequence by default."""
    return TrainConfig().windows * GPTConfig().context_len


def open_stream(bytes_sent: Callable[[], int]) -> tuple[Tap, Loaded]:
    """The stream as a run begins it, up to its first batch."""
    found, start, before = Loaded(), time.perf_counter(), bytes_sent()
    shards = find_shards(StreamSpec(name=REPOSITORY, path=REPOSITORY))
    validation = draw_validation(ArticleReader(shards, 0, print)).ids
    size = TrainConfig().batch_size
    source = Tap(ArticleReader(shards, 0, print), validation, sequence_len=sequence_len(), batch_size=size, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        source.begin(RunFolder(Path(folder)))
    source.train_batch(0)
    found.seconds, found.peak_at_first_batch = time.perf_counter() - start, peak()
    found.downloaded = (bytes_sent() - before) / 1e6
    return source, found


def load_alone(bytes_sent: Callable[[], int], results: Connection) -> None:
    """Time the loader without training."""
    source, found = open_stream(bytes_sent)
    start = time.perf_counter()
    for k in range(1, LOADER_BATCHES + 1):
        source.train_batch(k)
    found.chars_per_second = LOADER_BATCHES * TrainConfig().batch_size * sequence_len() / (time.perf_counter() - start)
    finish(source, found, results)


def train_from_stream(bytes_sent: Callable[[], int], results: Connection) -> None:
    """Time steps fed by the stream against steps on the same batches from memory, one of each in turn."""
    tap, found = open_stream(bytes_sent)
    trainer = default_trainer(tap)
    replay = Replay(tap)
    shares, speeds = [], []
    for k in range(PAIRS + 1):
        trainer.step, trainer.source = k + 1, tap
        streamed = time_call(lambda: trainer.train_step(1e-3))
        trainer.source = replay
        from_memory = time_call(lambda: trainer.train_step(1e-3))
        if k:  # the first steps make buffers and kernels
            shares.append(1 - from_memory / streamed)
            speeds.append(trainer.chars_per_step / streamed)
    found.share, found.chars_per_second_training = statistics.median(shares), statistics.median(speeds)
    finish(tap, found, results)


def train_from_memory(bytes_sent: Callable[[], int], results: Connection) -> None:  # noqa: ARG001
    """Take a few steps on noise in memory, for the memory they take."""
    trainer = default_trainer(RandomSource(sequence_len=sequence_len(), batch_size=TrainConfig().batch_size))
    for _ in range(5):
        trainer.train_step(1e-3)
    results.send(asdict(Loaded(peak=peak())))


def finish(source: StreamSource, found: Loaded, results: Connection) -> None:
    """End the stream and report."""
    found.peak = peak()
    source.close()
    results.send(asdict(found))
    results.close()
    # The library's threads may still read.
    os._exit(0)


def loading(arguments: argparse.Namespace) -> None:
    """Measure what a stream costs, over HTTP from a process that serves a folder laid out like the hub's."""
    # Processes that end at once leave tqdm's lock behind, which Python would warn of.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(arguments.folder.resolve(), theirs), daemon=True)
    server.start()
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{ours.recv()}", "HF_HOME": home, "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        alone, training, memory = (in_process(measure, ours) for measure in (load_alone, train_from_stream, train_from_memory))
    ours.send(False)
    print(f"loader alone: {alone.chars_per_second:,.0f} characters/s")
    print(f"training: {training.chars_per_second_training:,.0f} characters/s; the stream costs {training.share:.1%} of it")
    first = f"{training.seconds:.1f} s, {training.downloaded:.1f} MB downloaded, {training.peak_at_first_batch:.0f} MB held"
    print(f"until the first batch: {first}")
    print(f"peak memory: {training.peak:.0f} MB, from memory {memory.peak:.0f}: {training.peak - memory.peak:.0f} MB more")


def in_process(measure: Callable[[Callable[[], int], Connection], None], server: Connection) -> Loaded:
    """Run `measure` in a new process and return what it found."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(BytesSent(server), theirs))
    process.start()
    theirs.close()
    found = Loaded(**ours.recv())
    process.join()
    return found


@dataclass
class BytesSent:
    """Asks the server how many bytes it has sent."""

    server: Connection

    def __call__(self) -> int:
        """The number."""
        self.server.send(True)
        return int(self.server.recv())
