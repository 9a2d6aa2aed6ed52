"""What the tests share: small texts, small models, and no network but the loopback."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import settings
from safetensors.numpy import load_file

import picogpt.training.run
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import Corpus, TextSource
from picogpt.device import instruction_set
from picogpt.inference import Engine, EngineBackend, load_engine_backend
from picogpt.inference.engine import NUMPY
from picogpt.kernels.compiled import INSTRUCTIONS
from picogpt.model.gpt import GPT
from picogpt.training.forecast import EpochEnd
from picogpt.training.sample import engine_backend
from picogpt.training.trainer import StepReport, Trainer
from tests.hub import Hub, free_port

HUB_PORT = free_port()
"""Where this process looks for the hub: `datasets` reads it once, when it is imported."""
_hub_home = tempfile.TemporaryDirectory()
os.environ |= Hub("", {}).environment(HUB_PORT, Path(_hub_home.name))

_cache = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _cache.name
"""Compiled libraries are kept for this run of the tests, and what a test starts finds them too."""

VECTORS = Path(__file__).parent / "vectors"

# Beside other work an example can take longer than hypothesis allows, and no test here is about time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=16, context_len=8)
"""A shape that trains in milliseconds."""
TINY_FLAGS = [
    "--n-layer",
    "2",
    "--n-head",
    "2",
    "--n-embd",
    "16",
    "--context-len",
    "8",
    "--windows",
    "3",
    "--dtype",
    "float32",
    "--kernels",
    "torch",
    "--threads",
    "1",
]


needs_any_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or instruction_set() not in INSTRUCTIONS,
    reason="needs a C compiler, and a processor with AVX2",
)


def one_window(model: GPT, ids: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Outputs (B, n + 1, C) of the model for a single window of ids (B, n)."""
    transformer = model.transformer
    out: torch.Tensor = transformer(ids, context)
    return out


class Watcher:
    """Counts what it is told, and asks for a stop after some steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.reports: list[StepReport] = []
        self.epochs = 0
        self.stop_after = stop_after

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_epoch(self, trainer: Trainer) -> None:
        self.epochs += 1

    def stop(self) -> bool:
        return self.stop_after is not None and len(self.reports) >= self.stop_after


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Have these lines typed on a terminal, and then Ctrl-D."""
    typed = iter(lines)

    def line(_: str = "") -> str:
        for text in typed:
            return text
        raise EOFError

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(sys, "stdin", Terminal())


@pytest.fixture(autouse=True)
def _only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches beyond this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in {"127.0.0.1", "::1"}:
            raise ConnectionRefusedError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _untimed_epoch_ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in this process rehearses no end of an epoch for its forecast, unless it is marked `epoch_ends`: it would take longer than the run."""
    if request.node.get_closest_marker("epoch_ends") is None:
        known = EpochEnd(seconds_per_val_batch=0.001, seconds=0.05)
        monkeypatch.setattr(picogpt.training.run, "time_epoch_end", lambda *_, **__: known)
        monkeypatch.setattr(picogpt.training.forecast, "time_epoch_end", lambda *_, **__: known)


@pytest.fixture(autouse=True, scope="session")
def _usual_signals() -> None:
    """Where the tests run in the background some signals are ignored, and what they start would go on ignoring them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def compiled_backend() -> EngineBackend:
    """The inference engine's functions in C, compiled before any test looks at what a command writes."""
    return load_engine_backend()


@pytest.fixture(scope="module", params=["numpy", pytest.param("c", marks=needs_any_compiler)])
def backend(request: pytest.FixtureRequest, compiled_backend: EngineBackend) -> EngineBackend:
    """Both ways to compute what the inference engine does."""
    return compiled_backend if request.param == "c" else NUMPY


@pytest.fixture(autouse=True)
def _settings_of_the_process() -> None:
    """What a command run in this process leaves: its number of threads, denormal numbers as zero, and the compiler that it found or missed."""
    torch.set_num_threads(1)  # small products on several threads wait for each other
    torch.set_flush_denormal(False)
    engine_backend.cache_clear()


@pytest.fixture(scope="session")
def roll_vectors() -> dict[str, npt.NDArray[Any]]:
    """Inputs and outputs of a small model, computed by the original rule of the context roll."""
    with np.load(VECTORS / "context_roll_small.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of 6,000 characters with something to learn in it."""
    path = tmp_path / "numbers.txt"
    write_numbers(path)
    return path


def write_numbers(path: Path) -> None:
    """Write that text."""
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    path.write_text("".join(f"{words[i % 7]} and {words[i * i % 7]}\n" for i in range(600))[:6000])


def checkpoint_bytes(run: str) -> dict[str, bytes]:
    """The bytes of each tensor in the last checkpoint of a run in the current folder."""
    return {name: array.tobytes() for name, array in load_file(f"logs/{run}/checkpoint.safetensors").items()}


def engine_of(model: GPT, backend: EngineBackend, threads: int = 2) -> Engine:
    """The engine of a torch model, in float32."""
    return Engine(model.config, model.arrays(), backend=backend, threads=threads, dtype="float32")


def tiny_source(config: TrainConfig, model: GPTConfig = TINY, n_chars: int = 3000) -> TextSource:
    """Batches of a text that repeats, with a shape that fits `config`."""
    ids = np.tile(np.arange(1, 31, dtype=np.uint8), n_chars // 30)
    corpus = Corpus(name="tiny", ids=ids)
    return TextSource(corpus, sequence_len=config.windows * model.context_len, batch_size=config.batch_size, seed=config.seed)
