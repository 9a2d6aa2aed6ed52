"""The baselines are the same model, and what is counted is counted right."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import common
from benchmarks.commands import COMMANDS, Command, Usage, compare_commands, run_once
from benchmarks.common import interleave, machine
from benchmarks.kernels import compare_kernels
from benchmarks.learn import train_until
from benchmarks.measure import SECTIONS, measure, page
from benchmarks.page import memory_of
from benchmarks.peaks import compile_source, disturbances, measure_peaks, peak_flops
from benchmarks.plain import NanoGPTLoop, PlainLoop
from benchmarks.ranks import launch
from benchmarks.train import Row, flops_per_char, report
from benchmarks.train import add_arguments as add_training_arguments
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import Batch, RandomSource
from picogpt.training.trainer import Trainer
from tests.conftest import TINY, needs_compiler, tiny_source

CONFIG = TrainConfig(optimizer="adamw", batch_size=2, windows=3, lr=1e-2)


def test_without_the_development_tools() -> None:
    """The README's installation, which has no pytest, is enough for the benchmarks."""
    script = Path(common.__file__).parents[1] / "scripts" / "benchmark.py"
    program = f"import runpy, sys; sys.modules['pytest'] = None; sys.argv = ['b', '-h']; runpy.run_path({str(script)!r}, run_name='__main__')"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


def test_plain_loop_learns_the_same() -> None:
    """Our loop with AdamW in float32 and the plain one go through the same losses."""
    ours = Trainer(TINY, CONFIG, tiny_source(CONFIG), torch.float32)
    plain = PlainLoop(TINY, CONFIG, tiny_source(CONFIG))

    assert [plain.train_step(1e-2) for _ in range(4)] == pytest.approx([ours.train_step(1e-2) for _ in range(4)], abs=1e-4)


def nanogpt() -> tuple[NanoGPTLoop, RandomSource]:
    """Its loop on windows of noise, three a step, and where they come from."""
    source = RandomSource(sequence_len=TINY.context_len, batch_size=3)
    return NanoGPTLoop(TINY, source), source


def test_nanogpt_reads_each_window_alone() -> None:
    """A window's loss does not depend on the others of its batch, and is that of the model without a context slot."""
    loop, source = nanogpt()
    inputs, targets = source.train_batch(0)
    alone = [loop.loss(Batch(inputs[i : i + 1], targets[i : i + 1])).item() for i in range(3)]
    body, ids = loop.model.transformer, torch.from_numpy(inputs[:1].copy())
    x = body.wte(ids) + body.wpe.weight[: TINY.context_len]
    for block in body.h:
        x = block(x)
    expected = torch.nn.functional.cross_entropy(loop.model.lm_head(body.ln_f(x))[0], torch.from_numpy(targets[0].copy()))

    assert alone[0] == pytest.approx(expected.item())
    assert loop.loss(Batch(inputs, targets)).item() == pytest.approx(sum(alone) / 3)


def test_nanogpt_settings() -> None:
    """AdamW's weight decay is 0.1 on matrices and embeddings alone and its betas 0.9 and 0.99; it learns."""
    loop, source = nanogpt()
    batch = source.train_batch(0)
    before = loop.loss(batch).item()
    loop.train_step(1e-3)
    groups = loop.optimizer.param_groups

    assert {(p.dim() >= 2, group["weight_decay"], group["betas"]) for group in groups for p in group["params"]} == {
        (True, 0.1, (0.9, 0.99)),
        (False, 0.0, (0.9, 0.99)),
    }
    assert loop.loss(batch).item() < before
    assert loop.chars_per_step == 3 * TINY.context_len


def test_nanogpt_clips_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient's norm is brought down to 1."""
    seen: list[float] = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda _parameters, most: seen.append(most))
    nanogpt()[0].train_step(1e-3)

    assert seen == [1.0]


@needs_compiler
def test_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply-adds and reads with one thread and with all, and both kinds of products, at rates a second."""
    monkeypatch.setattr("benchmarks.peaks._WHILE", 0.0)
    monkeypatch.setattr("benchmarks.peaks._BYTES", 2**22)
    monkeypatch.setattr("benchmarks.peaks._PRODUCTS", ((64, 64, 64),))
    peaks = measure_peaks()
    threads = torch.get_num_threads()
    all_threads = [] if threads == 1 else [f"FMA, {threads} threads", f"memory, {threads} threads"]

    assert sorted(peaks) == sorted(["FMA, 1 thread", "memory, 1 thread", *all_threads, "float32", "bfloat16"])
    assert all(1e6 < rate < 1e15 for rate in peaks.values())


@needs_compiler
def test_peaks_count_their_work() -> None:
    """12 chains of a vector's lanes, two operations each; and four bytes a float, in whole steps."""
    library = compile_source()
    assert library is not None
    lanes = {"AVX512": 16, "AVX2": 8}[torch.backends.cpu.get_cpu_capability()]
    floats, found = np.arange(12 * lanes * 3, dtype=np.float32), ctypes.c_float()
    read = library.read_floats(ctypes.c_void_p(floats.ctypes.data), ctypes.c_long(floats.size), ctypes.byref(found))

    assert (read, found.value) == (floats.nbytes, floats.sum())
    found = ctypes.c_float(0.75)
    assert library.multiply_add(ctypes.c_long(3), ctypes.byref(found)) == 2 * 3 * 12 * lanes
    assert found.value == lanes * sum(0.75 * i / 12 / 8 + 1.75 for i in range(12))  # from 0: 1, 1.5, 1.75


def test_peaks_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs one is left out."""
    monkeypatch.setenv("CC", "false")
    monkeypatch.setattr("benchmarks.peaks._WHILE", 0.0)
    monkeypatch.setattr("benchmarks.peaks._PRODUCTS", ((64, 64, 64),))

    assert list(measure_peaks()) == ["float32", "bfloat16"]


def test_peak_of_a_type() -> None:
    """Products in float32 can at best be as fast as multiply-adds; those in bfloat16 have a limit of their own."""
    peaks = {"FMA, 1 thread": 1.0, "FMA, 2 threads": 2.0, "memory, 2 threads": 9.0, "float32": 1.5, "bfloat16": 8.0}

    assert (peak_flops(peaks, "float32"), peak_flops(peaks, "bfloat16")) == (2.0, 8.0)
    assert peak_flops({"float32": 1.5, "bfloat16": 8.0}, "float32") == 1.5


def test_disturbances() -> None:
    """A limit that has changed by more than a tenth, down or up, shows that the machine had other work."""
    before = {"a": 100.0, "b": 100.0, "c": 100.0}

    assert disturbances(before, {"a": 91.0, "b": 89.0, "c": 111.0}) == ["b", "c"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_memory_of_a_family() -> None:
    """A child's memory counts with its parent's; a process that has ended holds none."""
    alone = memory_of(os.getpid())
    child = subprocess.Popen(
        [sys.executable, "-c", "x = bytes(range(256)) * 400_000; print(flush=True); input()"], stdin=-1, stdout=-1
    )
    assert child.stdout is not None
    child.stdout.readline()
    together = memory_of(os.getpid())
    child.communicate(b"\n")

    assert together - alone > 90_000_000
    assert memory_of(child.pid) == 0


def test_report() -> None:
    """Ratios are medians over turns, against the faster nanoGPT way; a machine that was not quiet is said to be one."""
    flops = flops_per_char(GPTConfig())
    limits = {"FMA, 2 threads": 1000 * flops, "memory, 2 threads": 2e10, "float32": 800 * flops, "bfloat16": 1.0}
    rows = [
        Row("ours", "float32", [600.0, 500.0, 100.0], 700.0),
        Row("plain", "float32", [300.0, 250.0, 100.0], 900.0),
        Row("nanoGPT, 20 windows", "float32", [100.0, 100.0, 100.0], 900.0),
        Row("nanoGPT, 64 windows", "float32", [400.0, 400.0, 100.0], 900.0),
    ]
    text = report(rows, limits, limits)

    assert "times nanoGPT: against nanoGPT, 64 windows" in text
    assert "| ours | float32 | 500 | 1.25 | 2.00 | 50% | 700 |" in text
    assert "| memory, 2 threads | 20.0 GB/s | 20.0 GB/s |" in text
    assert "DISTURBED" not in text
    assert "no C compiler" not in text
    assert "no C compiler: multiply-adds and memory reads are not measured" in report(
        rows, *[{"float32": 1.0, "bfloat16": 1.0}] * 2
    )
    assert "DISTURBED: not the same before and after: memory, 2 threads;" in report(
        rows, limits, {**limits, "memory, 2 threads": 1e10}
    )


def test_flops() -> None:
    """One layer of width 2, windows of 1 and 3 ids: 2 slots a character of 6 x 48 + 12 x 2 x 2, and 36 for the head."""
    shape = GPTConfig(n_layer=1, n_head=1, n_embd=2, context_len=1, vocab_size=3)

    assert flops_per_char(shape) == 2 * (288 + 48) + 36


def test_launch() -> None:
    """Ranks are told who they are, and what rank 0 prints comes back."""
    code = "import os; print([float(os.environ[name]) for name in ('RANK', 'WORLD_SIZE')])"

    assert launch([[sys.executable, "-c", code]] * 2, "127.0.0.1") == [0, 2]


def test_turns() -> None:
    """Calls take turns, and each one's results stand together."""
    order: list[float] = []

    def call(value: float) -> float:
        order.append(value)
        return value

    assert interleave(lambda: call(1), lambda: call(2)) == [[1] * 5, [2] * 5]
    assert order == [1, 2] * 5


def test_machine_names_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instructions of numpy's matrix products are printed beside those of torch."""
    libraries = [{"internal_api": "openblas", "architecture": "Haswell"}, {"internal_api": "mkl"}, {"internal_api": "openmp"}]
    monkeypatch.setattr(common, "threadpool_info", lambda: libraries)

    assert " (Haswell), torch " in machine()


@pytest.mark.parametrize(("target", "chars", "reached"), [(3.0, 60, True), (0.0, 100, False)])
def test_learning_ends_at_the_target(capsys: pytest.CaptureFixture[str], target: float, chars: int, reached: bool) -> None:
    """It ends at the first loss that is low enough, or at the length it was given; each validation is a line."""
    losses = iter([9.0, 4.0, 3.0, 2.0, 1.0])
    course = train_until(lambda: 10, lambda: next(losses), target=target, every=20, most=100, name="x")

    assert (course.chars, course.reached) == (chars, reached)
    assert capsys.readouterr().out.count("characters in 0 s, validation loss") == chars // 20


@pytest.mark.slow
@needs_compiler
def test_kernels_are_compared(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each direction, with a time for torch and one for C."""
    monkeypatch.setattr("benchmarks.kernels.REPEATS", 1)
    compare_kernels(argparse.Namespace(batch_size=1))

    rows = re.findall(r"^\| ([a-z ]+) \| ([\d.]+) \| ([\d.]+) \|$", capsys.readouterr().out, re.M)
    assert [row[0] for row in rows] == ["forward", "forward and backward"]


class TestCommands:
    """Whole commands, timed."""

    def test_a_run_is_measured(self) -> None:
        """Time from start to end, and memory of the command itself: not that of the process that starts it."""
        usage = run_once(Command("holds 50 MB", ("-c", "import time; b = b'x' * 50_000_000; time.sleep(0.2)"), {}))

        assert 0.2 < usage.seconds < 30
        assert 50 < usage.peak < 100

    def test_a_failure_is_not_measured(self) -> None:
        """A command that fails raises, with what it said."""
        with pytest.raises(subprocess.CalledProcessError) as failed:
            run_once(Command("fails", ("-c", "raise SystemExit('no')"), {}))

        assert failed.value.stderr == b"no\n"

    def test_the_environment_is_passed_on(self) -> None:
        """What the command changes in it, beside all that is there."""
        code = "import os; assert os.environ['CC'] == 'false' and 'PATH' in os.environ"

        assert run_once(Command("looks", ("-c", code), {"CC": "false"})).peak >= 0

    def test_all_commands_are_valid(self) -> None:
        """Each one names a module and flags that exist."""
        for command in COMMANDS:
            if command.arguments[0] == "-m":
                module = importlib.import_module(command.arguments[1])
                if "--help" not in command.arguments:
                    module.build_parser().parse_args(command.arguments[2:])

    def test_the_table(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """Medians and minima over the rounds, the highest peak; evaluations only without --quick."""
        seconds = iter(float(i) for i in range(1000))
        monkeypatch.setattr("benchmarks.commands.run_once", lambda _: Usage(next(seconds), 7.4))
        compare_commands(argparse.Namespace(quick=True))
        quick = capsys.readouterr().out.splitlines()
        compare_commands(argparse.Namespace(quick=False))

        assert quick[3] == "| python that does nothing | 14.00 | 0.00 | 7 |"
        assert len(quick) == 3 + len(COMMANDS) - 2  # a blank line, the head, and all but the two evaluations
        assert "picogpt-eval" in capsys.readouterr().out


class TestMeasure:
    """The page of all figures."""

    def test_page(self) -> None:
        """The machine first, then each section below its heading."""
        before = datetime.date.today()
        text = page({"training": "| a |", "generation": "| b |"})
        days = {before.isoformat(), datetime.date.today().isoformat()}  # two of them at midnight

        assert text.splitlines()[0].removeprefix("# Figures of ") in days
        assert machine() in text
        assert text.endswith("\n## Training\n\n| a |\n\n## Generation\n\n| b |\n")

    def test_sequences_of_five_and_of_ten_windows(self) -> None:
        """No section repeats another, whatever the recipe's defaults have become."""
        parser = argparse.ArgumentParser()
        add_training_arguments(parser)
        trained = [flags.split()[1:] for flags in SECTIONS.values() if flags.split()[0] == "train"]

        assert [(step.batch_size, step.windows) for step in map(parser.parse_args, trained)] == [(2, 5), (2, 10)]

    def test_the_page_so_far_is_kept(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A section that fails does not lose those before it."""
        ran: list[str] = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            if "scripts/benchmark.py" in command:
                ran.append(" ".join(command[2:]))
                if len(ran) == 2:
                    raise subprocess.CalledProcessError(1, command)
            return subprocess.CompletedProcess(command, 0, "the machine\nfigures\n")

        monkeypatch.setattr("benchmarks.measure.subprocess.run", run)
        with pytest.raises(subprocess.CalledProcessError):
            measure(argparse.Namespace(page=tmp_path / "all.md", sections=list(SECTIONS)))

        written = (tmp_path / "all.md").read_text()
        assert ran == list(SECTIONS.values())[:2]
        assert "`python scripts/benchmark.py train --profile both`, 0 minutes; load before it " in written
        assert written.endswith("\n\nfigures\n")

    def test_outside_of_a_clone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without git and without a compiler, the page says so."""

        def missing(*_: object, **__: object) -> None:
            raise FileNotFoundError

        monkeypatch.setattr("benchmarks.measure.subprocess.run", missing)

        text = page({})
        assert "commit unknown (not a clone)" in text
        assert f"{platform.python_version()}, none |" in text
