"""Ratios against plain baselines, each pair measured in one run, taking turns; medians are printed.

python scripts/benchmark.py generate [--model RUN]
python scripts/benchmark.py load --folder DIR
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from picogpt.config import GenerateConfig, GPTConfig, SampleConfig, TrainConfig
from picogpt.data import (
    ArticleReader,
    Batch,
    RepeatedSource,
    Source,
    Stop,
    StreamSource,
    StreamSpec,
    draw_validation,
    find_shards,
)
from picogpt.device import choose_dtype, instruction_set, set_threads
from picogpt.engine import Engine
from picogpt.generate import Reader, Roll, StopWatcher, generate, make_generator
from picogpt.model import GPT
from picogpt.reference import ReferenceModel
from picogpt.run import RunFolder, find_model
from picogpt.train import Trainer, seconds_of
from tests.hub import Hub, serving

LENGTHS = (128, 640, 1280, 5000)
ROUNDS = 5
SAMPLES = 64
PAIRS = 40
"""Training steps from the stream, and as many from memory."""
LOADER_BATCHES = 2000


def in_turns(*calls: Callable[[], float]) -> list[list[float]]:
    """Results of each of `calls` over `ROUNDS` rounds, in which they take turns: A B A B ..."""
    rounds = [[call() for call in calls] for _ in range(ROUNDS)]
    return [list(results) for results in zip(*rounds, strict=True)]


def ids_of(length: int, batch: int = 1) -> npt.NDArray[np.uint8]:
    """Some text, (batch, length)."""
    return np.random.default_rng(length).integers(1, 75, (batch, length), dtype=np.uint8)


def speed(reader: Reader, prompt: npt.NDArray[np.uint8], count: int, batch: int = 1) -> float:
    """Characters a second, of all texts together, that are drawn and read behind `prompt`."""
    logits = reader.read(prompt)
    if isinstance(reader, Roll) and batch > 1:
        reader, logits = reader.fork(batch), np.repeat(logits, batch, axis=0)
    generators, watchers = [make_generator(0, i) for i in range(batch)], [StopWatcher([]) for _ in range(batch)]
    made = generate(reader, logits, count + 2, config=SampleConfig(), generators=generators, watchers=watchers)
    next(made)  # drawn from the prompt's own logits
    start = time.perf_counter()
    for _ in range(count):
        next(made)
    return count * batch / (time.perf_counter() - start)


def first_character(model: Path) -> float:
    """Seconds from the start of `picogpt-generate` to its first character."""
    command = [sys.executable, "-m", "picogpt.cli.generate", "-m", str(model), "-p", "a", "--no-echo", "-s", "1"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.communicate()
    return seconds


def peak_memory(model: Path) -> float:
    """Most memory (MB) that the processes of `picogpt-generate` hold together over 3,000 characters, as seen every 5 ms.

    Pages that they share count once (Linux's proportional set size).
    """
    command = [sys.executable, "-m", "picogpt.cli.generate", "-m", str(model), "-p", "a", "-n", "3000"]
    most = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        while process.poll() is None:
            with contextlib.suppress(OSError):  # a process that has just ended
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                most = max(most, sum(map(proportional_kb, [process.pid, *map(int, children)])))
            time.sleep(0.005)
    return most / 1024


def proportional_kb(process: int) -> int:
    """The proportional set size of a process in kB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def generation(arguments: argparse.Namespace) -> None:
    """Compare the engine with the plain reference."""
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            torch.manual_seed(0)
            run = RunFolder(Path(folder))
            run.save_model(GPT(GPTConfig()).arrays(), GPTConfig())
            path = run.path / "model.safetensors"
        else:
            path = find_model(arguments.model, Path("logs"))[0]
        compare_with_reference(path)
        many_and_long(path)
        starts = [first_character(path) for _ in range(ROUNDS)]
        print(f"\nstart of the command to its first character: {statistics.median(starts):.2f} s")
        print(f"its peak memory: {peak_memory(path):.0f} MB")


def compare_with_reference(path: Path) -> None:
    """Print characters a second of both at several lengths of text, and their ratio."""
    engine, reference = Engine.load(path, threads=None), ReferenceModel.load(path).model
    hop = GenerateConfig().hop_for(engine.config.context_len)
    print(f"hop {hop}, engine on {engine.threads} processes\n")
    print("| text | engine, characters/s | reference, characters/s | ratio |\n|---|---|---|---|")
    for length in LENGTHS:
        prompt = ids_of(length)
        slow_count = 10 if length <= 640 else 4

        def fast(prompt: npt.NDArray[np.uint8] = prompt) -> float:
            return speed(Roll(engine, hop), prompt, 360)

        def slow(prompt: npt.NDArray[np.uint8] = prompt, count: int = slow_count) -> float:
            return speed(ReferenceModel(reference), prompt, count)

        ours, theirs = in_turns(fast, slow)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(f"| {length:,} | {statistics.median(ours):,.0f} | {statistics.median(theirs):,.1f} | {ratio:,.0f} |", flush=True)


def many_and_long(path: Path) -> None:
    """Print what many samples at once gain, and what a long text costs."""
    engine = Engine.load(path, threads=None, texts=SAMPLES)
    hop = GenerateConfig().hop_for(engine.config.context_len)
    one, many = in_turns(
        lambda: speed(Roll(engine, hop), ids_of(128), 360), lambda: speed(Roll(engine, hop), ids_of(128), 120, SAMPLES)
    )
    ratio = statistics.median(b / a for a, b in zip(one, many, strict=True))
    print(f"\n{SAMPLES} samples at once: {statistics.median(many):,.0f} characters/s, {ratio:.1f} times those of one")
    early, late = in_turns(
        lambda: speed(Roll(engine, hop), ids_of(1000), 1000), lambda: speed(Roll(engine, hop), ids_of(9000), 1000)
    )
    ratio = statistics.median(b / a for a, b in zip(early, late, strict=True))
    print(f"characters 9,000-10,000: {statistics.median(late):,.0f} characters/s, {ratio:.2f} of those over 1,000-2,000")


REPOSITORY = "bench/mark"


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Tap(StreamSource):
    """A stream whose last batch is kept."""

    last: Batch

    def train_batch(self, k: int, stop: Stop = lambda: False) -> Batch:
        """The stream's next batch."""
        self.last = super().train_batch(k, stop)
        return self.last


class Replay(RepeatedSource):
    """The last batch of a stream again, from memory."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(roll_len=roll_len(), batch_size=TrainConfig().batch_size)
        self._tap = tap

    def train_batch(self, k: int, stop: Stop = lambda: False) -> Batch:  # noqa: ARG002
        """That batch."""
        return self._tap.last


def default_trainer(source: Source) -> Trainer:
    """The default model and batch, in this machine's own number type."""
    set_threads(None)
    return Trainer(GPTConfig(), TrainConfig(), source, choose_dtype("auto")[0])


def roll_len() -> int:
    """Characters of a roll by default."""
    return TrainConfig().windows * GPTConfig().context_len


def open_stream(bytes_sent: Callable[[], int]) -> tuple[Tap, Loaded]:
    """The stream as a run begins it, up to its first batch."""
    found, start, before = Loaded(), time.perf_counter(), bytes_sent()
    shards = find_shards(StreamSpec(name=REPOSITORY, path=REPOSITORY))
    validation = draw_validation(ArticleReader(shards, 0, print))
    size = TrainConfig().batch_size
    source = Tap(ArticleReader(shards, 0, print), validation, roll_len=roll_len(), batch_size=size, seed=0)
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
    found.chars_per_second = LOADER_BATCHES * TrainConfig().batch_size * roll_len() / (time.perf_counter() - start)
    finish(source, found, results)


def train_from_stream(bytes_sent: Callable[[], int], results: Connection) -> None:
    """Time steps fed by the stream against steps on the same batches from memory, one of each in turn."""
    tap, found = open_stream(bytes_sent)
    trainer = default_trainer(tap)
    replay = Replay(tap)
    shares, speeds = [], []
    for k in range(PAIRS + 1):
        trainer.step, trainer.source = k + 1, tap
        streamed = seconds_of(lambda: trainer.update(1e-3))
        trainer.source = replay
        from_memory = seconds_of(lambda: trainer.update(1e-3))
        if k:  # the first steps make buffers and kernels
            shares.append(1 - from_memory / streamed)
            speeds.append(trainer.chars_per_step / streamed)
    found.share, found.chars_per_second_training = statistics.median(shares), statistics.median(speeds)
    finish(tap, found, results)


def train_from_memory(bytes_sent: Callable[[], int], results: Connection) -> None:  # noqa: ARG001
    """Take a few steps on noise in memory, for the memory they take."""
    trainer = default_trainer(RepeatedSource(roll_len=roll_len(), batch_size=TrainConfig().batch_size))
    for _ in range(5):
        trainer.update(1e-3)
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


def main() -> None:
    """Run one of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    generate_parser = commands.add_parser("generate", help="the engine against the plain reference")
    generate_parser.add_argument("--model", metavar="RUN", help="a trained model (default: the full shape, untrained)")
    generate_parser.set_defaults(run=generation)
    load_parser = commands.add_parser("load", help="a stream against the same batches from memory")
    load_parser.add_argument("--folder", metavar="DIR", type=Path, required=True, help="a data set laid out like the hub's")
    load_parser.set_defaults(run=loading)
    arguments = parser.parse_args()
    machine = f"{instruction_set()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores"
    print(f"{machine}; numpy {np.__version__}, torch {torch.__version__}")
    arguments.run(arguments)


if __name__ == "__main__":
    main()
