"""The engine against the plain way in torch and against a plain C loop, with a trained model."""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import ROOT, interleave, kilobytes, load_source, machine, process
from benchmarks.reference import ReferenceModel
from benchmarks.train import PROFILES
from picogpt.checks import ENGINE_DTYPES
from picogpt.config import EngineDType, GenerateConfig, GPTConfig, SampleConfig
from picogpt.inference import Engine
from picogpt.inference.decoder import Decoder, RollingDecoder, StepwiseDecoder
from picogpt.inference.generate import StopSequenceFilter, generate
from picogpt.inference.sampling import Sampler, suppressed_ids
from picogpt.kernels.processor import vector_instructions
from picogpt.model.accelerate import accelerate
from picogpt.rng import sample_generator
from picogpt.runs.find import find_model
from picogpt.runs.model_file import load_model
from picogpt.threads import choose_threads
from picogpt.wording import plural

__all__ = ["PlainCLoop", "add_arguments", "generation"]

PROMPT = 1280
SLICE = 32
"""Characters of a turn."""
SECONDS = 40.0
"""How long turns are taken for one text."""
PLAIN_SOURCE = Path(__file__).with_name("plain_loop.c")
PLAIN_INSTRUCTIONS = {"AVX512": "-march=native", "AVX2": "-march=haswell"}
SHAPE_FIELDS = ("n_layer", "n_head", "n_embd", "slots", "vocab_size")
LAYER = [
    f"{part}.{kind}"
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
]


@dataclass(frozen=True)
class Settings:
    """What is compared."""

    model: str
    dtypes: tuple[EngineDType, ...]
    threads: tuple[int, ...]
    texts: int
    sections: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this comparison."""
    sections = tuple(SECTIONS)
    parser.add_argument("--model", metavar="RUN", default="wikipedia", help="a trained model (default: wikipedia)")
    parser.add_argument("--dtypes", nargs="+", choices=ENGINE_DTYPES[1:], default=ENGINE_DTYPES[1:], help="default: all")
    parser.add_argument("--threads", nargs="+", type=int, default=[], help="default: 1, and one a core")
    parser.add_argument("--texts", type=int, default=64, help="texts side by side (default: 64)")
    parser.add_argument("--profile", choices=[*PROFILES, "both"], default="native", help="laptop: as if without AVX-512")
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections, help="what to measure (default: all)")


def generation(arguments: argparse.Namespace) -> None:
    """Print the comparison for each profile, each in a process that sees no other instructions."""
    threads = tuple(arguments.threads) or tuple(sorted({1, choose_threads().count}))
    settings = Settings(arguments.model, tuple(arguments.dtypes), threads, arguments.texts, tuple(arguments.sections))
    for profile in PROFILES if arguments.profile == "both" else (arguments.profile,):
        print(f"\nprofile {profile}", flush=True)
        with process(PROFILES[profile]) as call:
            call(compare, settings)


def compare(settings: Settings) -> None:
    """Print all sections."""
    path = find_model(settings.model, Path("logs"))[0]
    print(f"{vector_instructions()}; {machine()}; {path}", flush=True)
    for section in settings.sections:
        SECTIONS[section](path, settings)


def random_ids(length: int, batch: int = 1) -> npt.NDArray[np.uint8]:
    """Some text, (batch, length)."""
    return np.random.default_rng(length).integers(1, 75, (batch, length), dtype=np.uint8)


def speed(reader: Decoder, prompt: npt.NDArray[np.uint8], count: int, batch: int = 1) -> float:
    """Characters a second, of all texts together, that are drawn and read behind `prompt`."""
    logits = reader.prefill(prompt)
    if isinstance(reader, RollingDecoder) and batch > 1:
        reader, logits = reader.fork(batch), np.repeat(logits, batch, axis=0)
    sampler = Sampler(SampleConfig(), [sample_generator(0, i) for i in range(batch)], suppressed_ids(None))
    made = generate(reader, logits, count + 1, sampler=sampler, stop_filters=[StopSequenceFilter([]) for _ in range(batch)])
    next(made)  # drawn from the prompt's own logits
    start = time.perf_counter()
    for _ in made:
        pass
    return count * batch / (time.perf_counter() - start)


class PlainCLoop:
    """`plain_loop.c` with a model's weights.

    Args:
        config: the model's shape.
        arrays: its weights.
    """

    def __init__(self, config: GPTConfig, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        final = ["wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"]
        layers = [f"h.{i}.{name}" for i in range(config.n_layer) for name in LAYER]
        self._arrays = [np.ascontiguousarray(arrays[f"transformer.{name}"], np.float32) for name in final + layers]
        self._weights = (ctypes.c_void_p * len(self._arrays))(*(array.ctypes.data for array in self._arrays))
        shape = (config.n_layer, config.n_head, config.n_embd, config.context_len + 1, config.vocab_size)
        self._shape = _Shape(*shape)
        self._function = _compile_plain().generate

    def __call__(self, first: int, count: int) -> npt.NDArray[np.int32]:
        """The likeliest `count` ids behind `first`, which begins the text."""
        made = np.empty(count, np.int32)
        self._function(self._weights, self._shape, first, count, made.ctypes.data_as(ctypes.c_void_p))
        return made

    def speed(self, count: int) -> float:
        """Characters a second."""
        start = time.perf_counter()
        self(1, count)
        return count / (time.perf_counter() - start)


class _Shape(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in SHAPE_FIELDS)


def _compile_plain() -> ctypes.CDLL:
    """The loop, compiled as its author would: for this machine, with all liberties."""
    loaded = load_source(PLAIN_SOURCE, [*PLAIN_INSTRUCTIONS.get(vector_instructions(), "").split(), "-ffast-math"])
    loaded.generate.argtypes = [ctypes.c_void_p, _Shape, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    return loaded


def one_text(path: Path, settings: Settings) -> None:
    """Print characters a second of one text, and what they are of the plain ways.

    The ways take turns of a few characters for some time, so that all of them meet the same disturbances.
    """
    stored = load_model(path)
    plain = PlainCLoop(stored.config, stored.weights)
    reference = ReferenceModel.load(path).model
    accelerate(reference).attention = "fused"  # as any PyTorch engineer would compute it
    calls: dict[str, Callable[[], float]] = {
        "plain C loop, float32, 1 thread": partial(plain.speed, SLICE),
        "plain torch, whole text anew": lambda: speed(StepwiseDecoder(ReferenceModel(reference).prefill), random_ids(PROMPT), 1),
    }
    for dtype in settings.dtypes:
        for threads in settings.threads:
            calls[f"{dtype}, {plural(threads, 'thread')}"] = OngoingText(Engine.load(path, threads=threads, dtype=dtype)).speed
    rounds = [[call() for call in calls.values()]]
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        rounds.append([call() for call in calls.values()])
    results = dict(zip(calls, (list(found) for found in zip(*rounds, strict=True)), strict=True))
    plain_c, plain_torch = list(results.values())[:2]
    print(f"\none text after {PROMPT:,} characters, medians of {len(rounds)} rounds\n")
    print("| | characters/s | best round | of the plain C loop | of plain torch |\n|---|---|---|---|---|")
    for name, found in results.items():
        medians = f"{statistics.median(found):,.1f} | {max(found):,.1f}"
        print(f"| {name} | {medians} | {ratio(found, plain_c):.2f} | {ratio(found, plain_torch):,.0f} |", flush=True)


class OngoingText:
    """One text that goes on from turn to turn.

    Args:
        engine: the model.
    """

    def __init__(self, engine: Engine) -> None:
        self._decoder = decoder_of(engine)
        self._sampler = Sampler(SampleConfig(), [sample_generator(0)], suppressed_ids(None))
        self._last = self._sampler.draw(self._decoder.prefill(random_ids(PROMPT)))

    def speed(self) -> float:
        """Characters a second over the next ones."""
        start, made = time.perf_counter(), 0
        while made < SLICE:
            drawn = self._decoder.decode(self._last, self._sampler, SLICE - made)
            self._last = drawn[-1]
            made += len(drawn)
        return SLICE / (time.perf_counter() - start)


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def decoder_of(engine: Engine) -> RollingDecoder:
    """A decoder as `picogpt-generate` makes it."""
    return RollingDecoder(engine, GenerateConfig().hop_for(engine.config.context_len))


def speed_of_engine(engine: Engine, prompt: int, count: int, texts: int = 1) -> float:
    """Characters a second after a prompt of so many characters."""
    return speed(decoder_of(engine), random_ids(prompt), count, texts)


def many_texts(path: Path, settings: Settings) -> None:
    """Print characters a second of many texts at once, and how much of the machine's matrix products that is."""
    matrices = [array for name, array in load_model(path).weights.items() if array.ndim == 2 and "wpe" not in name]
    flops = 2 * sum(array.size for array in matrices)
    threads = max(settings.threads)
    torch.set_num_threads(threads)
    texts = settings.texts
    engines = {dtype: Engine.load(path, threads=threads, dtype=dtype) for dtype in settings.dtypes}
    calls = {dtype: partial(speed_of_engine, engine, 128, 120, texts) for dtype, engine in engines.items()}
    peak, *found = interleave(partial(product_peak, threads), *calls.values())
    print(f"\n{texts} texts at once, {threads} threads; products reach {statistics.median(peak) / 1e9:,.0f} GFLOP/s\n")
    print(f"| | characters/s | share of that, at {flops / 1e6:.1f} MFLOP a character |\n|---|---|---|")
    for dtype, speeds in zip(calls, found, strict=True):
        share = statistics.median(speed * flops / most for speed, most in zip(speeds, peak, strict=True))
        print(f"| {dtype} | {statistics.median(speeds):,.0f} | {share:.0%} |", flush=True)


def product_peak(threads: int) -> float:
    """Operations a second of torch's best product of float32 matrices."""
    torch.set_num_threads(threads)
    a, b = torch.ones(2048, 1024), torch.ones(1024, 1024)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048 * 1024 * 1024 / (time.perf_counter() - start))
    return best


def prompt_and_start(path: Path, settings: Settings) -> None:
    """Print how long a prompt takes to be read, and the first character to come; and the peak of memory."""
    threads = max(settings.threads)
    engine = Engine.load(path, threads=threads)
    hop = GenerateConfig().hop_for(engine.config.context_len)

    def read() -> float:
        decoder, prompt = RollingDecoder(engine, hop), random_ids(PROMPT)
        start = time.perf_counter()
        decoder.prefill(prompt)
        return time.perf_counter() - start

    seconds, starts = interleave(read, partial(first_character, path))
    print(f"\na prompt of {PROMPT:,} characters is read in {statistics.median(seconds):.3f} s")
    print(f"first character {statistics.median(starts):.2f} s after the command's start")
    print(f"peak memory {peak_memory(path):.0f} MB", flush=True)


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
    """Most memory (MB) that `picogpt-generate` holds over 3,000 characters, as seen every 5 ms.

    Pages that processes share count in part (Linux's proportional set size).
    """
    command = [sys.executable, "-m", "picogpt.cli.generate", "-m", str(model), "-p", "a", "-n", "3000"]
    most = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        while process.poll() is None:
            most = max(most, kilobytes(process.pid, "smaps_rollup", "Pss"))
            time.sleep(0.005)
    return most / 1024


def long_text(path: Path, settings: Settings) -> None:
    """Print the speed over the last tenth of 100,000 characters against the first."""
    decoder = decoder_of(Engine.load(path, threads=max(settings.threads), dtype=settings.dtypes[-1]))
    sampler = Sampler(SampleConfig(), [sample_generator(0)], suppressed_ids(None))
    made = generate(decoder, decoder.prefill(random_ids(128)), 100_000, sampler=sampler, stop_filters=[StopSequenceFilter([])])
    marks, count = {0: time.perf_counter()}, 0
    for (ids,) in made:
        count += len(ids)
        marks.setdefault(count // 10_000, time.perf_counter())
    first, last = marks[1] - marks[0], marks[10] - marks[9]
    print(f"\ncharacters 90,000-100,000 are made {first / last:.2f} times as fast as the first 10,000", flush=True)


def beside_a_busy_core(path: Path, settings: Settings) -> None:
    """Print the speed beside a program that keeps one core busy, on all threads and on one."""
    busy = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(busy) as process:
        time.sleep(0.5)
        dtype = settings.dtypes[0]
        engines = [Engine.load(path, threads=threads, dtype=dtype) for threads in (max(settings.threads), 1)]
        calls = [partial(speed_for, engine, 3.0) for engine in engines]
        many, one = interleave(*calls)
        process.kill()
    print(f"\nbeside a busy core, {dtype}: the default is {ratio(many, one):.2f} times as fast as one thread", flush=True)


def speed_for(engine: Engine, seconds: float) -> float:
    """Characters a second over some seconds."""
    decoder = decoder_of(engine)
    sampler = Sampler(SampleConfig(), [sample_generator(0)], suppressed_ids(None))
    made = generate(decoder, decoder.prefill(random_ids(128)), None, sampler=sampler, stop_filters=[StopSequenceFilter([])])
    start, count = time.perf_counter(), 0
    for (ids,) in made:
        count += len(ids)
        if time.perf_counter() > start + seconds:
            break
    return count / (time.perf_counter() - start)


SECTIONS: dict[str, Callable[[Path, Settings], None]] = {
    "one": one_text,
    "many": many_texts,
    "start": prompt_and_start,
    "long": long_text,
    "busy": beside_a_busy_core,
}
