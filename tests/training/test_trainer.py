"""The loop: it learns, it goes on byte for byte, and it stops in time."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from picogpt.config import GPTConfig, TrainConfig
from picogpt.device import check_compiler, choose_dtype, disable_malloc_trim, flush_denormals, instruction_set, set_threads
from picogpt.errors import TrainingError
from picogpt.runs.folder import RunFolder
from picogpt.runs.loss_log import read_log
from picogpt.runs.model_file import load_model
from picogpt.schedule import Schedule
from picogpt.threads import Threads
from picogpt.training.history import History
from picogpt.training.trainer import Trainer
from tests.conftest import TINY, Watcher, tiny_source
from tests.programs import program

CONFIG = TrainConfig(batch_size=2, windows=3, lr=1e-2, warmup_steps=2, muon_interval=2)
SCHEDULE = Schedule(total_steps=12, steps_per_epoch=5, val_steps=2)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A new run's folder."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def make_trainer(config: TrainConfig = CONFIG, model: GPTConfig = TINY) -> Trainer:
    """A small trainer."""
    return Trainer(model, config, tiny_source(config, model), torch.float32)


def weights_of(trainer: Trainer) -> dict[str, bytes]:
    """Every weight's bytes."""
    return {name: array.tobytes() for name, array in trainer.model.arrays().items()}


def test_learns(run: RunFolder) -> None:
    """A hundred steps on a text that repeats bring the loss from ln 88 to next to nothing."""
    trainer = make_trainer(TrainConfig(batch_size=4, windows=3, lr=3e-2, warmup_steps=5))
    watcher = Watcher()

    assert trainer.fit(run, Schedule(total_steps=100, steps_per_epoch=50, val_steps=2), watcher, watcher.stop)

    assert watcher.reports[0].loss == pytest.approx(np.log(88), abs=0.2)
    assert trainer.log.val[-1] < 0.5
    assert trainer.log.best_loss == min(trainer.log.val)


def test_epochs_and_log(run: RunFolder) -> None:
    """12 steps in epochs of 5 are 3 epochs; the log counts characters, and the best weights are on the disk."""
    trainer, watcher = make_trainer(), Watcher()
    trainer.fit(run, SCHEDULE, watcher, watcher.stop)
    log = trainer.log

    assert watcher.epochs == 3
    assert log.chars == [5 * 48, 10 * 48, 12 * 48]
    assert log.train[0] == pytest.approx(np.mean([report.loss for report in watcher.reports[:5]]))
    assert log.train[2] == pytest.approx(np.mean([report.loss for report in watcher.reports[10:]]))
    assert log.seconds == sorted(log.seconds)
    assert load_model(run.path / "model.safetensors").config == TINY


def test_log_and_picture_are_written(run: RunFolder) -> None:
    """Training itself writes the loss log and its picture at each epoch's end, for whoever trains without the command."""
    trainer = make_trainer()
    trainer.fit(run, SCHEDULE, Watcher(), lambda: False)

    assert read_log(run.path / "log.pkl") == trainer.log
    assert (run.path / "log.csv").read_text() == trainer.log.to_csv()
    assert run.plot_path.read_bytes().startswith(b"\xff\xd8\xff")


def test_picture_that_cannot_be_written(run: RunFolder) -> None:
    """A line says so at each epoch, and the run goes to its end."""
    run.plot_path.mkdir()
    lines: list[str] = []

    assert make_trainer().fit(run, SCHEDULE, Watcher(), lambda: False, notify=lines.append)
    assert lines == [f"warning: {run.plot_path}: log or picture not written (Is a directory); training continues"] * 3


def test_page_is_written(run: RunFolder) -> None:
    """After each epoch there is a page that reloads itself while training lasts, and at the end it does not."""
    pages: list[str] = []

    class Reader(Watcher):
        def on_epoch(self, trainer: Trainer) -> None:
            pages.append(run.page_path.read_text())

    trainer = make_trainer()
    trainer.fit(run, SCHEDULE, Reader(), lambda: False)
    pages.append(run.page_path.read_text())

    assert ['http-equiv="refresh"' in page for page in pages] == [True, True, False, False]
    assert [f"{n} epochs, " in page for n, page in enumerate(pages, start=1)] == [True, True, True, False]
    assert History.read(run.path).epochs[-1].sample == trainer.history.epochs[-1].sample


def test_stopped_run_has_a_page_at_rest(run: RunFolder) -> None:
    """A stop in the middle of an epoch leaves a page that no longer reloads, and a resumed run keeps its epochs."""
    watcher = Watcher(7)
    make_trainer().fit(run, SCHEDULE, watcher, watcher.stop)
    assert 'http-equiv="refresh"' not in run.page_path.read_text()
    second = make_trainer()
    second.restore(run.load_checkpoint()[0])
    second.fit(run, SCHEDULE, Watcher(), lambda: False)

    assert len(History.read(run.path).epochs) == 3


def test_page_that_cannot_be_written(run: RunFolder) -> None:
    """A line says so at each epoch and at the end, and the run goes to its end."""
    run.page_path.mkdir()
    lines: list[str] = []

    assert make_trainer().fit(run, SCHEDULE, Watcher(), lambda: False, notify=lines.append)
    assert lines == [f"warning: {run.page_path}: page not written (Is a directory); training continues"] * 4


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("stop_after", [1, 5, 7, 12])
def test_goes_on_byte_for_byte(run: RunFolder, stop_after: int, dropout: float) -> None:
    """Stopped after any step and restored in a new trainer, a run ends with the bytes of one that was not."""
    model = GPTConfig(n_layer=2, n_head=2, n_embd=16, context_len=8, dropout=dropout)
    straight = make_trainer(model=model)
    straight.fit(run, SCHEDULE, Watcher(), lambda: False)

    first = make_trainer(model=model)
    watcher = Watcher(stop_after)
    finished = first.fit(run, SCHEDULE, watcher, watcher.stop)
    second = make_trainer(model=model)
    second.restore(run.load_checkpoint()[0])
    second.fit(run, SCHEDULE, Watcher(), lambda: False)

    assert not finished
    assert weights_of(second) == weights_of(straight)
    assert (second.log.train, second.log.val, second.log.chars) == (straight.log.train, straight.log.val, straight.log.chars)


def test_restored_optimizer_updates_the_model(run: RunFolder) -> None:
    """After a restore two steps change every weight: the original's optimizer held parameters of its own and changed none."""
    first = make_trainer()
    first.fit(run, Schedule(total_steps=3, steps_per_epoch=3, val_steps=1), Watcher(), lambda: False)
    second = make_trainer()
    second.restore(run.load_checkpoint()[0])
    before = weights_of(second)
    assert before == weights_of(first)

    for _ in range(CONFIG.muon_interval):
        second.train_step(1e-2)

    assert all(before[name] != now for name, now in weights_of(second).items())
    assert all(state["step"].item() == 5 for optimizer in second.optimizers for state in optimizer.state.values())


def test_blocks_take_turns() -> None:
    """A step changes the matrices of every second block, and everything else."""
    trainer = make_trainer()
    for turn in (1, 0, 1):
        before = weights_of(trainer)
        trainer.train_step(1e-2)
        changed = {name for name, now in weights_of(trainer).items() if before[name] != now}
        other = f"transformer.h.{1 - turn}."
        resting = {name for name in before if name.startswith(other) and ".ln_" not in name and name.endswith("weight")}

        assert len(resting) == 4
        assert changed == before.keys() - resting


def test_stops_during_validation(run: RunFolder) -> None:
    """A stop that comes while validating leaves the epoch open; it is validated when the run goes on."""
    trainer = make_trainer()
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 5  # after each of five steps, then before the first validation batch

    assert not trainer.fit(run, SCHEDULE, Watcher(), stop)
    assert trainer.log.val == []
    assert trainer.epoch_is_open
    resumed = make_trainer()
    resumed.restore(run.load_checkpoint()[0])
    assert not resumed.fit(run, SCHEDULE, Watcher(), lambda: resumed.log.val != [])
    assert (resumed.step, len(resumed.log.val), resumed.epoch_is_open) == (5, 1, False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_a_loss_that_is_not_finite(run: RunFolder, value: float) -> None:
    """A poisoned weight stops the run before the optimizer takes it up; the state before the step is saved."""
    trainer = make_trainer()
    trainer.fit(run, Schedule(total_steps=2, steps_per_epoch=2, val_steps=1), Watcher(), lambda: False)
    with torch.no_grad():
        trainer.model.transformer.ln_f.bias.fill_(value)

    with pytest.raises(TrainingError, match=r"step 3: the loss is nan .* start again with a smaller --lr"):
        trainer.fit(run, SCHEDULE, Watcher(), lambda: False)

    assert trainer.step == 2


def test_weights_that_are_not_finite_are_not_saved(run: RunFolder) -> None:
    """A weight that is NaN after the last step of an epoch is caught before it is saved; what was saved stays."""
    trainer = make_trainer()
    trainer.save(run)
    with torch.no_grad():
        trainer.model.transformer.ln_f.bias[0] = float("nan")

    with pytest.raises(TrainingError, match=r"step 0: a weight is no longer finite, nothing is saved; the previous checkpoint"):
        trainer.save(run)
    tensors = run.load_checkpoint()[0].tensors
    assert all(np.isfinite(array).all() for array in tensors.values())


def test_saves_in_the_middle_of_an_epoch(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the interval is over a checkpoint is written, epoch or not; and where none is there, before the model."""
    monkeypatch.setattr("picogpt.training.trainer.SAVE_INTERVAL", 0.0)
    saved = []
    monkeypatch.setattr(run, "save_checkpoint", lambda checkpoint: saved.append(checkpoint.state["log"]["iter_num"]))
    make_trainer().fit(run, Schedule(total_steps=4, steps_per_epoch=4, val_steps=1), Watcher(), lambda: False)

    assert saved == [1, 2, 3, 4, 4, 4, 4]


def test_gradient_clipping_and_its_absence() -> None:
    """A tiny limit makes for another step; 0 is no limit at all."""
    unlimited, none, tiny = (
        make_trainer(TrainConfig(batch_size=2, windows=3, lr=1e-2, grad_clip=clip, beta2=0.5)) for clip in (1e6, 0.0, 1e-9)
    )
    for trainer in (unlimited, none, tiny):
        trainer.train_step(1e-2)

    assert weights_of(unlimited) == weights_of(none) != weights_of(tiny)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_no_bit(dropout: float) -> None:
    """Blocks that are computed again, dropout's draws among it, leave every weight as it would have been; all are."""
    model = GPTConfig(n_layer=2, n_head=2, n_embd=16, context_len=8, dropout=dropout)
    kept, again = make_trainer(model=model), make_trainer(model=model)
    again.runner.gradient_checkpointing = True
    calls: list[Trainer] = []

    def count(trainer: Trainer) -> None:
        trainer.model.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(trainer))

    for trainer in (kept, again):
        count(trainer)
        for _ in range(3):
            trainer.train_step(1e-2)

    assert weights_of(again) == weights_of(kept)
    # Three windows in each of three steps.
    assert (calls.count(kept), calls.count(again)) == (9, 18)


def test_bfloat16_learns_the_same() -> None:
    """With bfloat16 products the first losses agree to a hundredth."""
    coarse = Trainer(TINY, CONFIG, tiny_source(CONFIG), torch.bfloat16)
    fine = make_trainer()

    for _ in range(5):
        assert coarse.train_step(1e-3) == pytest.approx(fine.train_step(1e-3), abs=0.02)
    assert all(p.dtype == torch.float32 for p in coarse.model.parameters())


def test_device() -> None:
    """The type of number is as asked, or the faster one with its reason; threads are set and told."""
    assert choose_dtype("float32")[0] is torch.float32
    assert choose_dtype("bfloat16")[0] is torch.bfloat16
    dtype, reason = choose_dtype("auto")
    assert dtype in {torch.float32, torch.bfloat16}
    assert instruction_set() in reason
    assert set_threads(1) == Threads(1, "as requested")
    assert torch.get_num_threads() == 1
    assert set_threads(None).count == torch.get_num_threads()


@pytest.mark.parametrize(("ratio", "expected"), [(3.0, torch.bfloat16), (0.1, torch.float32), (1.1, torch.float32)])
def test_the_clock_decides(monkeypatch: pytest.MonkeyPatch, ratio: float, expected: torch.dtype) -> None:
    """bfloat16 is taken only where it is clearly faster."""
    monkeypatch.setattr("picogpt.device._bf16_speedup", lambda: ratio)

    assert choose_dtype("auto")[0] is expected


@pytest.mark.timing
def test_a_moment_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type whose first products are held up by something else is timed for longer than that."""
    calls: Counter[torch.dtype] = Counter()

    def product(a: torch.Tensor, _: torch.Tensor) -> None:
        calls[a.dtype] += 1
        held_up = a.dtype is torch.bfloat16 and calls[a.dtype] <= 8
        time.sleep(0.004 if held_up or a.dtype is torch.float32 else 0.001)

    monkeypatch.setattr("torch.nn.functional.linear", product)

    assert choose_dtype("auto")[0] is torch.bfloat16


def test_no_compiler() -> None:
    """Where CXX points nowhere it is one line that says what to do."""
    from torch._inductor import config
    from torch._inductor.cpp_builder import cpp_compiler_search

    cpp_compiler_search.cache_clear()
    message = r"--compile: no C\+\+ compiler that works \(/nowhere/g\+\+, .*\); install g\+\+, or leave"
    with config.patch({"cpp.cxx": (None, "/nowhere/g++")}), pytest.raises(TrainingError, match=message):
        check_compiler()


def test_denormals_are_flushed() -> None:
    """The smallest numbers become zero, and can be had again."""
    try:
        assert not flush_denormals() or (torch.tensor(1e-38) / 1e3).item() == 0
    finally:
        torch.set_flush_denormal(False)
    assert (torch.tensor(1e-38) / 1e3).item() > 0


def test_freed_memory_is_kept() -> None:
    """What is freed and needed again is not asked of the system anew, page by page: 10,240 in a round, from some round on."""
    done = subprocess.run(program("count_page_faults"), capture_output=True, text=True, check=True)
    kept, *_, faults = done.stdout.split()
    if kept == "False":
        pytest.skip("the C library has no such setting")
    assert int(faults) < 1000


@pytest.mark.parametrize("error", [TypeError, OSError, AttributeError])
def test_c_library_without_the_setting(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows and macOS."""

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("ctypes.CDLL", fail)
    assert not disable_malloc_trim()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiling_keeps_names() -> None:
    """Every block is to be compiled when it is called, and what is saved has the same names."""
    plain, compiled = make_trainer(), make_trainer()
    compiled.compile_blocks()

    assert all(block._compiled_call_impl is not None for block in compiled.model.transformer.h)
    assert list(compiled.model.arrays()) == list(plain.model.arrays())
