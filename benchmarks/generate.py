"""The engine against the plain reference."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import ROOT, ROUNDS, in_turns
from picogpt.config import GenerateConfig, GPTConfig, SampleConfig
from picogpt.engine import Engine
from picogpt.find import find_model
from picogpt.generate import OneByOne, Reader, RollingDecoder, Sampler, StopWatcher, generate, make_generator, never_drawn
from picogpt.model import GPT
from picogpt.reference import ReferenceModel
from picogpt.run import RunFolder

__all__ = ["generation"]

LENGTHS = (128, 640, 1280, 5000)
SAMPLES = 64


def ids_of(length: int, batch: int = 1) -> npt.NDArray[np.uint8]:
    """Some text, (batch, length)."""
    return np.random.default_rng(length).integers(1, 75, (batch, length), dtype=np.uint8)


def speed(reader: Reader, prompt: npt.NDArray[np.uint8], count: int, batch: int = 1) -> float:
    """Characters a second, of all texts together, that are drawn and read behind `prompt`."""
    logits = reader.prefill(prompt)
    if isinstance(reader, RollingDecoder) and batch > 1:
        reader, logits = reader.fork(batch), np.repeat(logits, batch, axis=0)
    sampler = Sampler(SampleConfig(), [make_generator(0, i) for i in range(batch)], never_drawn(None))
    made = generate(reader, logits, count + 1, sampler=sampler, watchers=[StopWatcher([]) for _ in range(batch)])
    next(made)  # drawn from the prompt's own logits
    start = time.perf_counter()
    for _ in made:
        pass
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
    engine, reference = Engine.load(path), ReferenceModel.load(path).model
    hop = GenerateConfig().hop_for(engine.config.context_len)
    print(f"hop {hop}, {engine.dtype} on {engine.threads} threads\n")
    print("| text | engine, characters/s | reference, characters/s | ratio |\n|---|---|---|---|")
    for length in LENGTHS:
        prompt = ids_of(length)
        slow_count = 10 if length <= 640 else 4

        def fast(prompt: npt.NDArray[np.uint8] = prompt) -> float:
            return speed(RollingDecoder(engine, hop), prompt, 360)

        def slow(prompt: npt.NDArray[np.uint8] = prompt, count: int = slow_count) -> float:
            return speed(OneByOne(ReferenceModel(reference).prefill), prompt, count)

        ours, theirs = in_turns(fast, slow)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(f"| {length:,} | {statistics.median(ours):,.0f} | {statistics.median(theirs):,.1f} | {ratio:,.0f} |", flush=True)


def many_and_long(path: Path) -> None:
    """Print what many samples at once gain, and what a long text costs."""
    engine = Engine.load(path)
    hop = GenerateConfig().hop_for(engine.config.context_len)
    one, many = in_turns(
        lambda: speed(RollingDecoder(engine, hop), ids_of(128), 360),
        lambda: speed(RollingDecoder(engine, hop), ids_of(128), 120, SAMPLES),
    )
    ratio = statistics.median(b / a for a, b in zip(one, many, strict=True))
    print(f"\n{SAMPLES} samples at once: {statistics.median(many):,.0f} characters/s, {ratio:.1f} times those of one")
    early, late = in_turns(
        lambda: speed(RollingDecoder(engine, hop), ids_of(1000), 1000),
        lambda: speed(RollingDecoder(engine, hop), ids_of(9000), 1000),
    )
    ratio = statistics.median(b / a for a, b in zip(early, late, strict=True))
    print(f"characters 9,000-10,000: {statistics.median(late):,.0f} characters/s, {ratio:.2f} of those over 1,000-2,000")
