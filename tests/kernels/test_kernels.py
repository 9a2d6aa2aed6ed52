"""The model without its head in C against the modules that it stands for."""

from __future__ import annotations

import copy
import ctypes
import math
import os
import re
import shutil
import weakref
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

from picogpt.config import GPTConfig, TrainConfig
from picogpt.device import has_amx, instruction_set
from picogpt.errors import TrainingError
from picogpt.kernels import bindings, build, compiled
from picogpt.kernels.autograd import FusedTransformer
from picogpt.kernels.bindings import WeightGrads
from picogpt.kernels.compiled import Kernels, compile_kernels, data_ptrs, select_kernels
from picogpt.model.accelerate import accelerate
from picogpt.model.gpt import GPT, Block
from picogpt.runs.folder import RunFolder
from picogpt.schedule import Schedule
from picogpt.training.data_parallel import DataParallelState
from picogpt.training.distributed import SINGLE_PROCESS
from picogpt.training.optim import Muon, orthogonalize
from picogpt.training.trainer import Trainer
from tests.conftest import TINY, Watcher, needs_compiler, tiny_source

SHAPES = {
    "heads of 4": GPTConfig(n_layer=1, n_head=3, n_embd=12, context_len=5),
    "heads of 8": TINY,
    "heads of 16": GPTConfig(n_layer=2, n_head=2, n_embd=32, context_len=17),
    "heads of 32": GPTConfig(n_layer=1, n_head=2, n_embd=64, context_len=128),
    "heads of 64": GPTConfig(n_layer=1, n_head=1, n_embd=64, context_len=64),
    "long windows": GPTConfig(n_layer=1, n_head=1, n_embd=8, context_len=512),
    "heads of 20": GPTConfig(n_layer=1, n_head=3, n_embd=60, context_len=1),
    "half a panel": GPTConfig(n_layer=1, n_head=3, n_embd=48, context_len=20),
}
CONFIG = TrainConfig(batch_size=2, windows=3, lr=1e-2, warmup_steps=2)
CPU = torch.device("cpu")
SOON = compiled._FLAGS.replace("-O3", "-O1")
"""Flags with which the compiler is done in half the time."""


@cache
def kernels_for(shape: str, dtype: torch.dtype = torch.float32, instructions: str | None = None) -> Kernels:
    """Compiled once for all tests, with one thread; of all shapes only heads like the model's own as well as users have them."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if instructions is not None:
            patch.setattr(compiled, "instruction_set", lambda: instructions)
        if shape != "heads of 32":
            patch.setattr(compiled, "_FLAGS", SOON)
        return compile_kernels(SHAPES[shape], dtype)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FusedTransformer]:
    """All that models make on native kernels during the test."""
    found: list[FusedTransformer] = []

    def recorded(*given: Any) -> FusedTransformer:
        found.append(FusedTransformer(*given))
        return found[-1]

    monkeypatch.setattr("picogpt.model.accelerate.FusedTransformer", recorded)
    return found


def model_of(shape: str, *, spread: float = 0.3, seed: int = 1) -> GPT:
    """A model in which no bias is zero and no weight of a norm is one."""
    torch.manual_seed(seed)
    model = GPT(SHAPES[shape])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=spread)
            if ".ln_" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def loss_and_gradients(
    model: GPT,
    kernels: Kernels | None,
    length: int,
    dtype: torch.dtype = torch.float32,
    *,
    sequences: int = 2,
    recompute: bool = False,
) -> tuple[float, dict[str, torch.Tensor]]:
    """On random text."""
    torch.manual_seed(2)
    ids = torch.randint(0, model.config.vocab_size, (sequences, length + 1))
    accelerate(model, kernels).gradient_checkpointing = recompute
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        _, loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.item(), gradients


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, as a share of what is expected."""
    return float((found - expected).norm() / expected.norm())


def exact_gradients(model: GPT, length: int, *, sequences: int = 2) -> dict[str, torch.Tensor]:
    """The gradients in float64, by the modules."""
    exact = GPT(model.config).double()
    exact.load_state_dict(model.state_dict())
    return loss_and_gradients(exact, None, length, sequences=sequences)[1]


def errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far each gradient is from float64's."""
    return {name: distance(found[name].double(), exact[name]) for name in exact}


def assert_as_precise(
    found: dict[str, torch.Tensor], of_modules: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> None:
    """What is found is no farther from float64 than the modules in float32, but for twice the roundings: a bound for any processor."""
    worst, allowed = max(errors(found, exact).values()), 2 * max(errors(of_modules, exact).values()) + 2e-6
    assert worst <= allowed


@needs_compiler
@pytest.mark.parametrize("windows", [0.4, 1, 2.6])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_the_modules(shape: str, windows: float) -> None:
    """Loss and every gradient in float32, for windows that are full and not."""
    model, length = model_of(shape), math.ceil(windows * SHAPES[shape].context_len)
    expected_loss, expected = loss_and_gradients(model, None, length)
    loss, found = loss_and_gradients(model, kernels_for(shape), length)

    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    assert_as_precise(found, expected, exact_gradients(model, length))


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16(shape: str) -> None:
    """Losses and gradients are no farther from float32's than the modules' in bfloat16, over models enough to even out their roundings."""
    worse, of_loss, of_modules_loss = list[float](), 0.0, 0.0
    for seed in range(4 if SHAPES[shape].context_len > 64 else 16):
        model, length = model_of(shape, spread=0.1, seed=seed), 2 * SHAPES[shape].context_len
        exact_loss, exact = loss_and_gradients(model, None, length)
        loss_of_modules, of_modules = loss_and_gradients(model, None, length, torch.bfloat16)
        loss, found = loss_and_gradients(model, kernels_for(shape, torch.bfloat16), length, torch.bfloat16)
        worse += [distance(found[name], exact[name]) / distance(of_modules[name], exact[name]) for name in exact]
        of_loss += abs(loss - exact_loss)
        of_modules_loss += abs(loss_of_modules - exact_loss)

    assert of_loss < 2 * of_modules_loss + 1e-3
    assert math.exp(sum(map(math.log, worse)) / len(worse)) < 1.1
    assert max(worse) < 4


@needs_compiler
@pytest.mark.parametrize(
    ("sequences", "dtype", "when"),
    [
        (1, torch.float32, WeightGrads.DEFERRED),
        (2, torch.float32, WeightGrads.PER_WINDOW),
        (2, torch.bfloat16, WeightGrads.DEFERRED),
    ],
)
def test_weight_gradients_are_deferred(
    sequences: int, dtype: torch.dtype, when: WeightGrads, made: list[FusedTransformer]
) -> None:
    """Until the last window, where their inputs do not take too much memory; either way they are those of the modules."""
    model, length = model_of("heads of 16"), 51
    expected_loss, expected = loss_and_gradients(model, None, length, sequences=sequences)
    loss, found = loss_and_gradients(model, kernels_for("heads of 16", dtype), length, dtype, sequences=sequences)

    assert made[-1]._workspace.weight_grads is when
    assert loss == pytest.approx(expected_loss, rel=1e-5 if dtype == torch.float32 else 1e-2)
    if dtype == torch.float32:
        assert_as_precise(found, expected, exact_gradients(model, length, sequences=sequences))


@needs_compiler
@pytest.mark.parametrize("instructions", ["AVX2", ""])
def test_with_fewer_instructions(instructions: str) -> None:
    """What is compiled for AVX2, and for no vectors but the oldest, computes the same."""
    model = model_of("heads of 32")
    _, expected = loss_and_gradients(model, None, 200)
    _, found = loss_and_gradients(model, kernels_for("heads of 32", instructions=instructions), 200)

    assert_as_precise(found, expected, exact_gradients(model, 200))


@needs_compiler
@pytest.mark.parametrize("instructions", [None, "AVX2", ""])
@pytest.mark.parametrize("shape", ["heads of 16", "heads of 32"])
def test_scores_of_any_size(shape: str, instructions: str | None) -> None:
    """Weights of attention that are all on one slot, and values far out on GELU's tails, are as precise as by plain products.

    Rounding decides near ties here, so it is the mean over several models that counts.
    """
    ratios: list[float] = []
    for seed in range(6):
        model = model_of(shape, seed=seed)
        with torch.no_grad():
            for block in model.transformer.h:
                assert isinstance(block, Block)
                block.attn.c_attn.weight.mul_(30)
                block.mlp.c_fc.weight.mul_(30)
        exact = exact_gradients(model, 40)
        expected_loss, expected = loss_and_gradients(model, None, 40)
        loss, found = loss_and_gradients(model, kernels_for(shape, instructions=instructions), 40)
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        of_modules, of_kernels = errors(expected, exact), errors(found, exact)
        ratios += [of_kernels[name] / of_modules[name] for name in exact]

    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 1.5


@needs_compiler
def test_the_same_again() -> None:
    """The same bytes each time, and when blocks are computed again instead of kept."""
    model, length = model_of("heads of 16"), 51
    _, first = loss_and_gradients(model, kernels_for("heads of 16"), length)
    _, second = loss_and_gradients(model, kernels_for("heads of 16"), length)
    _, recomputed = loss_and_gradients(model, kernels_for("heads of 16"), length, recompute=True)

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], recomputed[name]) for name in first)


@needs_compiler
def test_recomputing_keeps_less(made: list[FusedTransformer]) -> None:
    """With gradient checkpointing each block's input stays, and nothing else of it; without gradients only the first one's."""
    for dtype in (torch.float32, torch.bfloat16):
        held = []
        for recompute, trained in ((False, True), (True, True), (False, False)):
            model, ids = model_of("heads of 16"), torch.zeros(2, 17 * 16, dtype=torch.long)
            accelerate(model, kernels_for("heads of 16", dtype)).gradient_checkpointing = recompute
            with torch.set_grad_enabled(trained), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                model(ids, ids)
            held.append(workspace_bytes(made[-1]))
        everything, inputs, nothing = held

        assert inputs < everything / 4
        assert nothing < 0.75 * inputs


def workspace_bytes(fused: FusedTransformer) -> int:
    """Of all memory that is held for the blocks."""
    values = [tensor for blocks in fused._workspace.windows for block in blocks for tensor in block.values()]
    storages = {tensor.untyped_storage() for tensor in values}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["heads of 8", "heads of 16", "heads of 32"])
def test_scores_beyond_all_numbers(shape: str, dtype: torch.dtype) -> None:
    """Scores that are all minus infinity leave no finite output behind."""
    model, ids = model_of(shape), torch.zeros(1, 3, dtype=torch.long)
    block = model.transformer.h[0]
    assert isinstance(block, Block)
    with torch.no_grad():
        q, k, _ = block.attn.c_attn.bias.chunk(3)
        q.fill_(1e30)
        k.fill_(-1e30)
    accelerate(model, kernels_for(shape, dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        _, loss = model(ids, ids)

    assert math.isnan(loss.item())


@needs_compiler
def test_another_shape() -> None:
    """Functions for another model are refused before they could write where nothing is theirs."""
    with pytest.raises(AssertionError, match="compiled for another model"):
        make_trainer(kernels_for("heads of 16"))


@needs_compiler
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda fields: (fields[1], fields[0], *fields[2:]), r"\('batch.activations', 0, 8\), \('batch.activations', 8, 8\)"),
        (lambda fields: fields[:-1], r"\('batch.save', 92, 4\)"),
        (lambda fields: (*fields[:-1], ("save", ctypes.c_int64)), r"\('batch.save', 92, 4\), \('batch.save', 96, 8\)"),
        (lambda fields: (*fields[:-1], ("saved", ctypes.c_int32)), r"\('batch.save', 92, 4\), \('batch.saved', 92, 4\)"),
    ],
    ids=["swapped", "missing", "longer", "renamed"],
)
def test_layouts_that_differ(
    change: Callable[[tuple[Any, ...]], tuple[Any, ...]], difference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A structure that is not the same on both sides is noticed when the library is loaded, and named."""
    other = type("Batch", (ctypes.Structure,), {"_fields_": change(tuple(bindings.Batch._fields_))})
    library = kernels_for("heads of 8")._library
    bindings.check_layout(library)
    monkeypatch.setitem(bindings._STRUCTURES, "batch", other)

    with pytest.raises(AssertionError, match=rf"^bindings.h and bindings.py differ: \[.*{difference}"):
        bindings.check_layout(library)


@needs_compiler
def test_constants_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is a constant that has another value."""
    monkeypatch.setitem(bindings._CONSTANTS, "GRADS", IntEnum("Other", {"PER_WINDOW": 1, "DEFERRED": 0}))

    with pytest.raises(AssertionError, match=r"\('GRADS_DEFERRED', 0, 0\), \('GRADS_DEFERRED', 1, 0\)"):
        bindings.check_layout(kernels_for("heads of 8")._library)


def test_fields_by_name() -> None:
    """A structure is filled by name, and with contiguous tensors alone."""
    tensors = {name: torch.zeros(2, 3) for name, *_ in bindings.MuonMatrix._fields_}
    assert compiled.structure_of(bindings.MuonMatrix, tensors).momentum == tensors["momentum"].data_ptr()
    with pytest.raises(AssertionError, match="MuonMatrix has .*'mean_square'.*, got .*'mean'"):
        compiled.structure_of(bindings.MuonMatrix, {**dict(list(tensors.items())[:3]), "mean": torch.zeros(1)})
    with pytest.raises(AssertionError):
        compiled.structure_of(bindings.MuonMatrix, {**tensors, "momentum": torch.zeros(3, 2).T})


@needs_compiler
def test_one_backward_pass() -> None:
    """A graph that is kept for a second one refuses it, as the first one has written over what it was made of."""
    model = model_of("heads of 8")
    accelerate(model, kernels_for("heads of 8"))
    _, loss = model(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long))
    assert loss is not None
    loss.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="^backward can run only once per forward; run forward again for a second one$"):
        loss.backward()


@needs_compiler
def test_weights_that_change_in_between() -> None:
    """Weights written to after the forward pass are noticed in the backward pass, which would mix old and new ones."""
    model = model_of("heads of 8")
    accelerate(model, kernels_for("heads of 8"))
    _, loss = model(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long))
    assert loss is not None
    with torch.no_grad():
        next(model.transformer.h.parameters()).add_(1)

    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_weights_that_muon_changes_in_between() -> None:
    """So are those that the functions themselves have updated."""
    model, kernels = model_of("heads of 8"), kernels_for("heads of 8")
    accelerate(model, kernels)
    _, loss = model(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long))
    assert loss is not None
    matrix = next(p for p in model.transformer.h.parameters() if p.dim() == 2)
    matrix.grad = torch.ones_like(matrix)
    Muon([matrix], lr=0.1, dtype=torch.float32, kernels=kernels).step()

    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_side_by_side(dtype: torch.dtype) -> None:
    """A text that begins before another one is through has memory of its own."""
    model, ids = model_of("heads of 8"), torch.randint(88, (2, 2, 21))
    runner, weights = accelerate(model, kernels_for("heads of 8", dtype)), list(model.transformer.parameters())
    sums = [runner.hidden_states(model, x).float().square().mean() for x in ids]
    together = torch.autograd.grad(sums[0] + sums[1], weights)
    apart = [torch.autograd.grad(runner.hidden_states(model, x).float().square().mean(), weights) for x in ids]

    for both, one, other in zip(together, *apart, strict=True):
        torch.testing.assert_close(both, one + other, rtol=1e-2, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("wrong", [-1, TINY.vocab_size])
def test_ids_outside_the_vocabulary(wrong: int) -> None:
    """They are refused before memory that is not theirs is read."""
    model = model_of("heads of 8")
    runner = accelerate(model, kernels_for("heads of 8"))

    with pytest.raises(AssertionError, match="^an id is not in the vocabulary$"):
        runner.hidden_states(model, torch.tensor([[3, wrong]]))


@needs_compiler
def test_memory_is_used_again() -> None:
    """The next text of the same shape has the memory of the one before, whatever comes in between; another shape has its own."""
    model, ids = model_of("heads of 8"), torch.zeros(2, 21, dtype=torch.long)
    fast = accelerate(model, kernels_for("heads of 8"))
    workspaces = []
    for n in (21, 21, 13):
        torch.autograd.grad(model(ids[:, :n], ids[:, :n])[1], list(model.parameters()))
        workspaces.append(fast._fused)
        with torch.no_grad():
            model(ids, ids)

    assert workspaces[0] is workspaces[1]
    assert workspaces[1] is not workspaces[2]


@needs_compiler
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_change_of_a_weight_is_seen(optimizer: Literal["muon", "adamw"]) -> None:
    """A step computes with the weights that the optimizer has left, also where torch does not count its changes."""
    config = TrainConfig(batch_size=2, windows=3, lr=1e-2, warmup_steps=0, optimizer=optimizer)
    trainer = Trainer(TINY, config, tiny_source(config), torch.float32, kernels=kernels_for("heads of 8"))
    for _ in range(3):
        trainer.train_step(1e-2)
    batch = next(iter(trainer.source.val_batches(1)))
    with torch.no_grad():
        found = trainer.loss(batch).item()
        trainer.model.runner = None
        assert found == pytest.approx(trainer.loss(batch).item(), abs=1e-5)


@needs_compiler
@pytest.mark.parametrize("instructions", [None, "AVX2", ""])
def test_any_number_of_rows(instructions: str | None) -> None:
    """Windows of any length give what torch gives: their rows are tiles of two heights, or single rows."""
    model = model_of("half a panel")
    for length in range(1, 21):
        ids = torch.arange(length)[None]
        with torch.no_grad():
            accelerate(model, kernels_for("half a panel", instructions=instructions))
            found = model(ids, ids)[0]
            model.runner = None
            torch.testing.assert_close(found, model(ids, ids)[0], rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("backward", [True, False])
def test_memory_goes_with_the_model(backward: bool) -> None:
    """Nothing that is kept holds on to the graph of a text, which would hold on to it for ever."""
    model, ids = model_of("heads of 8"), torch.zeros(2, 21, dtype=torch.long)
    fast = accelerate(model, kernels_for("heads of 8"))
    _, loss = model(ids, ids)
    if backward:
        torch.autograd.grad(loss, list(model.parameters()))
    fused = weakref.ref(fast._fused)
    del model, fast, loss, _

    assert fused() is None


@needs_compiler
@pytest.mark.parametrize("instructions", ["AVX512", "AVX2", ""])
def test_without_matrix_tiles(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has no registers for tiles, and no products of bfloat16, what is computed is as close to float32."""
    if instructions not in ("", instruction_set(), "AVX2"):
        pytest.skip(f"this processor has no {instructions}")
    monkeypatch.setattr(compiled, "instruction_set", lambda: instructions)
    monkeypatch.setattr(compiled, "has_amx", lambda: False)
    kernels = compile_kernels(SHAPES["heads of 32"], torch.bfloat16)
    model = model_of("heads of 32", spread=0.1)
    _, exact = loss_and_gradients(model, None, 200)
    _, of_modules = loss_and_gradients(model, None, 200, torch.bfloat16)
    _, found = loss_and_gradients(model, kernels, 200, torch.bfloat16)

    assert not kernels.has_amx
    assert max(distance(found[name], exact[name]) / distance(of_modules[name], exact[name]) for name in exact) < 2


@needs_compiler
def test_matrix_tiles_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason names them where they are used, which is in bfloat16 and for widths that they divide."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiled, "_FLAGS", SOON)
    said = {
        (shape, dtype): select_kernels("auto", SHAPES[shape], dtype, CPU)[1]
        for shape in ("heads of 32", "heads of 20")
        for dtype in (torch.bfloat16, torch.float32)
    }
    uses = has_amx() and instruction_set() == "AVX512"

    assert said.pop(("heads of 32", torch.bfloat16)) == "compiled by cc" + (", with AMX" if uses else "")
    assert set(said.values()) == {"compiled by cc"}


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [1, 3])
def test_rows_that_no_tile_divides(sequences: int, dtype: torch.dtype) -> None:
    """Any number of rows, in more texts than are summed at once, has the gradients of float32's modules."""
    model = model_of("heads of 32", spread=0.1)
    torch.manual_seed(3)
    for length in (1, 15, 16, 33, 128, 600):
        ids = torch.randint(0, 88, (sequences, length))
        gradients = []
        for kernels in (None, kernels_for("heads of 32", dtype)):
            accelerate(model, kernels)
            with torch.autocast("cpu", torch.bfloat16, enabled=kernels is not None and dtype == torch.bfloat16):
                _, loss = model(ids, ids)
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))

        assert distance(gradients[1], gradients[0]) < (2e-5 if dtype == torch.float32 else 0.02)


def after_steps(shape: str, dtype: torch.dtype, kernels: Kernels | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What three steps of Muon add to matrices like a block's, and the mean squares that they leave."""
    torch.manual_seed(1)
    width = SHAPES[shape].n_embd
    matrices = [torch.randn(size) for size in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))]
    before = [matrix.clone() for matrix in matrices]
    muon = Muon(matrices, lr=0.02, weight_decay=0.1, dtype=dtype, kernels=kernels)
    for _ in range(3):
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix) * torch.logspace(0, -1, matrix.size(1))
        muon.step()
    updates = [after - matrix for after, matrix in zip(matrices, before, strict=True)]
    return updates, [muon.state[matrix]["mean_square"] for matrix in matrices]


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_muon(shape: str) -> None:
    """Updates of matrices are those of torch's functions, in bfloat16 about as far from float32's as they."""
    exact, exact_squares = after_steps(shape, torch.float32, None)
    found, squares = after_steps(shape, torch.float32, kernels_for(shape))
    by_torch, _ = after_steps(shape, torch.bfloat16, None)
    rounded, _ = after_steps(shape, torch.bfloat16, kernels_for(shape, torch.bfloat16))

    assert max(map(distance, found, exact)) < 1e-3
    assert max(map(distance, squares, exact_squares)) < 1e-3
    assert sum(map(distance, rounded, exact)) < 1.5 * sum(map(distance, by_torch, exact)) < 0.8


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_never_runs_away(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small some singular values are, or where some are far above all others, none of an update's is far above 1."""
    monkeypatch.setattr(compiled, "_FLAGS", SOON)
    kernels = compile_kernels(GPTConfig(), dtype)
    torch.manual_seed(1)
    for size in ((256, 256), (1024, 256), (256, 1024)):
        u, _, v = torch.linalg.svd(torch.randn(size), full_matrices=False)
        some = torch.arange(256) < 8
        spectra = [torch.logspace(largest, smallest, 256) for largest, smallest in ((0, -3), (0, -1), (-1, -1), (-0.5, -2))]
        for gradient in (torch.rand(size), *(u * torch.where(some, 1.0, values) @ v for values in spectra)):
            matrix = torch.zeros(size)
            matrix.grad = gradient
            # With this decay nothing is evened out.
            Muon([matrix], lr=1.0, momentum=0.0, beta2=1.0, dtype=dtype, kernels=kernels).step()
            values = torch.linalg.svdvals(matrix) / math.sqrt(max(1.0, size[0] / size[1]))
            exact = torch.linalg.svdvals(orthogonalize(gradient[None], torch.float32))

            assert values.max() < 1.25
            assert distance(values, exact[0]) < 0.06


@needs_compiler
@pytest.mark.parametrize("instructions", ["AVX2", ""])
def test_muon_with_fewer_instructions(instructions: str) -> None:
    """What is compiled for AVX2, and for no vectors but the oldest, updates alike."""
    exact, _ = after_steps("heads of 32", torch.float32, None)
    found, _ = after_steps("heads of 32", torch.float32, kernels_for("heads of 32", instructions=instructions))

    assert max(map(distance, found, exact)) < 1e-3


@needs_compiler
def test_muon_of_other_shapes() -> None:
    """What is not like a block's matrix is left to torch's functions."""
    torch.manual_seed(1)
    matrix = torch.randn(5, 9)
    expected = matrix.clone()
    for parameter, kernels in ((matrix, kernels_for("heads of 16")), (expected, None)):
        parameter.grad = torch.ones_like(parameter)
        Muon([parameter], lr=0.1, dtype=torch.float32, kernels=kernels).step()

    assert torch.equal(matrix, expected)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [2, 3])
def test_more_threads(threads: int, dtype: torch.dtype) -> None:
    """Shares of the rows that are added up apart give the same gradients, kept and computed again, and the same updates."""
    shape, tolerance = "heads of 32", 2e-5 if dtype == torch.float32 else 5e-3
    kernels, model = kernels_for(shape, dtype), model_of(shape)
    shared = copy.copy(kernels)
    shared.threads = threads
    shared.__dict__.pop("workspace", None)  # is as large as its threads need
    _, one = loss_and_gradients(model, kernels, 300, dtype)
    for again in (False, True):
        _, several = loss_and_gradients(model, shared, 300, dtype, recompute=again)
        assert max(distance(several[name], one[name]) for name in one) < tolerance

    updates = (after_steps(shape, dtype, each)[0] for each in (kernels, shared))
    assert all(map(torch.equal, *updates))


@needs_compiler
def test_without_gradients() -> None:
    """Validation has the same loss, and keeps nothing."""
    model = model_of("heads of 8")
    ids = torch.arange(21).view(1, -1)
    losses = []
    for kernels in (None, kernels_for("heads of 8")):
        accelerate(model, kernels)
        with torch.no_grad():
            _, loss = model(ids[:, :-1], ids[:, 1:])
        assert not loss.requires_grad
        losses.append(loss.item())

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def make_trainer(kernels: Kernels | None) -> Trainer:
    """A small trainer."""
    return Trainer(TINY, CONFIG, tiny_source(CONFIG, TINY), torch.float32, kernels=kernels)


@needs_compiler
def test_torch_beside_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own operations run on one thread beside the kernels, with a small alphabet; on all of them before and after."""
    trainer, modules, seen, cross_entropy = (
        make_trainer(kernels_for("heads of 8")),
        make_trainer(None),
        list[int](),
        F.cross_entropy,
    )

    def watched(*args: Any, **named: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return cross_entropy(*args, **named)

    monkeypatch.setattr(F, "cross_entropy", watched)
    torch.set_num_threads(2)
    try:
        for each in (trainer, modules):
            each.train_step(1e-3)
            each.validate(1)
            assert torch.get_num_threads() == 2
            assert set(seen) == {each.threads_beside_kernels}
            seen.clear()
        monkeypatch.setattr("picogpt.training.state._MIN_SHARED_VOCAB", TINY.vocab_size)
        assert (trainer.threads_beside_kernels, modules.threads_beside_kernels) == (2, 2)
    finally:
        torch.set_num_threads(1)


@needs_compiler
def test_training_goes_on_byte_for_byte(tmp_path: Path) -> None:
    """Saved after four steps and restored, a run ends as if it had never stopped, near to where the modules end."""
    schedule = Schedule(total_steps=8, steps_per_epoch=4, val_steps=1)
    kernels = kernels_for("heads of 8")
    run = RunFolder(tmp_path / "run")
    run.create()
    straight, first, second, modules = (make_trainer(made) for made in (kernels, kernels, kernels, None))
    straight.fit(run, schedule, Watcher(), lambda: False)
    assert not first.fit(run, schedule, Watcher(), lambda: first.step == 4)
    second.restore(run.load_checkpoint()[0])
    second.fit(run, schedule, Watcher(), lambda: False)
    modules.fit(run, schedule, Watcher(), lambda: False)

    assert {n: a.tobytes() for n, a in second.model.arrays().items()} == {
        n: a.tobytes() for n, a in straight.model.arrays().items()
    }
    assert second.log.val == straight.log.val
    assert second.log.val == pytest.approx(modules.log.val, rel=1e-3)


@needs_compiler
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name, _ in GPT(TINY).transformer.h[0].named_parameters()])
def test_what_is_not_finite_reaches_the_loss(name: str, value: float) -> None:
    """In bfloat16, in the processor's longest vectors and its tiles, where it has them."""
    model = model_of("heads of 32")
    with torch.no_grad():
        dict(model.transformer.h[0].named_parameters())[name].view(-1)[3] = value
    loss, found = loss_and_gradients(model, kernels_for("heads of 32", torch.bfloat16), 130, torch.bfloat16)

    assert not (math.isfinite(loss) and all(bool(gradient.isfinite().all()) for gradient in found.values()))


@needs_compiler
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name, _ in GPT(TINY).transformer.h[1].named_parameters()])
def test_what_is_not_finite_is_noticed(name: str, value: float) -> None:
    """A single entry of any weight that is not a number, or infinite, makes loss or gradient so too."""
    trainer = make_trainer(kernels_for("heads of 8"))
    with torch.no_grad():
        dict(trainer.model.transformer.h[1].named_parameters())[name].view(-1)[3] = value

    with pytest.raises(TrainingError, match="the loss is (nan|inf)|the gradient's norm (nan|inf)"):
        trainer.train_step(1e-2)


@needs_compiler
@pytest.mark.parametrize("instructions", [None, "AVX2"])
def test_rounding_to_bfloat16(instructions: str | None) -> None:
    """Packed matrices are rounded as torch rounds: to nearest, ties to even, with what is infinite or not a number, of any bits, kept."""
    kernels = kernels_for("heads of 16", torch.bfloat16, instructions)
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (12, 32, 32)).int()
    bits[0, 0, :8] = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0])
    x = bits.view(torch.float32)
    x = torch.where(x.abs() < 1e-37, 0, x)  # smaller ones may become zero
    matrices = [part.flatten(0, 1) for part in torch.split(x[:8], [3, 1, 4])] + [x[8:].reshape(32, 128)]
    packed = [memory for matrix in matrices for memory in kernels.packed(*matrix.shape)]
    kernels.pack(data_ptrs(matrices), data_ptrs(packed), 1)

    for index, found in enumerate(packed):
        expected = matrices[index // 2].bfloat16().flatten()
        torch.testing.assert_close(found.sort()[0], expected.sort()[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@needs_compiler
def test_other_ranks_have_them_too() -> None:
    """The plan that rank 0 sends has the others compile their own."""
    for kernels in (None, kernels_for("heads of 8")):
        leader = DataParallelState(TINY, CONFIG, torch.float32, kernels=kernels)
        spec = leader.to_spec({**leader.state_tensors(), **leader.outer_tensors()})
        follower = DataParallelState.from_spec(spec, SINGLE_PROCESS, 1)

        assert (follower.runner.kernels is None) == (kernels is None)


class TestChoice:
    @pytest.fixture(autouse=True)
    def _own_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(compiled, "_FLAGS", SOON)

    @needs_compiler
    def test_auto(self) -> None:
        """Where there is a compiler, C; unless torch is asked for."""
        for dtype in (torch.bfloat16, torch.float32):
            found, said = select_kernels("auto", TINY, dtype, CPU)
            assert isinstance(found, Kernels)
            assert (found.dtype, said) == (dtype, "compiled by cc")
        assert select_kernels("torch", TINY, torch.bfloat16, CPU) == (None, "as requested")

    @pytest.mark.parametrize(
        ("changes", "device", "reason"),
        [
            ({}, "cuda", "native kernels do not run on cuda"),
            ({"dropout": 0.1}, "cpu", "native kernels do not support dropout or bias=False"),
            ({"bias": False}, "cpu", "native kernels do not support dropout or bias=False"),
            ({"context_len": 513}, "cpu", "native kernels support windows of at most 512, got 513"),
            ({"n_embd": 12}, "cpu", "native kernels need a head size that is a multiple of 4, got 6"),
        ],
    )
    def test_obstacles(self, changes: dict[str, float], device: str, reason: str) -> None:
        """What they cannot do is left to torch, and said; it is an error only for those who insist."""
        config = GPTConfig(**{"n_head": 2, "n_embd": 16, **changes})  # type: ignore[arg-type]
        assert select_kernels("auto", config, torch.float32, torch.device(device)) == (None, reason)
        with pytest.raises(TrainingError) as error:
            select_kernels("c", config, torch.float32, torch.device(device))
        assert str(error.value) == f"--kernels c: {reason}; take --kernels torch"

    def test_another_processor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where torch has none of the instructions that they were measured with, it computes."""
        monkeypatch.setattr(compiled, "instruction_set", lambda: "DEFAULT")
        reason = "native kernels need AVX2 or AVX512, and this processor has DEFAULT"
        assert select_kernels("auto", TINY, torch.float32, CPU) == (None, reason)

    @pytest.mark.parametrize(
        ("script", "reason"),
        [
            (
                "#!/bin/sh\necho 'x.c:1: error: no such thing' >&2\nexit 3\n",
                r"\S*/compiler fails \(x.c:1: error: no such thing\)",
            ),
            ("#!/bin/sh\nexit 3\n", r"\S*/compiler fails \(exit code 3\)"),
            ("#!/bin/sh\nexit 0\n", r"what \S*/compiler makes cannot be loaded \(.*block.so.*; TMPDIR may name another folder\)"),
            ("nothing that runs", r"\S*/compiler does not run \(.*Exec format error.*\)"),
            ("#!/bin/sh\nexec sleep 30\n", r"\S*/compiler does not run \(.*timed out.*\)"),
        ],
    )
    def test_compiler_fails(self, script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One line says what the compiler said; with auto, torch computes."""
        monkeypatch.setattr(compiled, "instruction_set", lambda: "AVX2")
        if "sleep" in script:
            monkeypatch.setattr(build, "_TIMEOUT", 1.0)
        compiler = tmp_path / "compiler"
        compiler.write_text(script)
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))

        kernels, said = select_kernels("auto", TINY, torch.float32, CPU)
        assert kernels is None
        assert re.fullmatch(reason, said)
        with pytest.raises(TrainingError, match=f"^--kernels c: {reason}; take --kernels torch$"):
            select_kernels("c", TINY, torch.float32, CPU)

    def test_no_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither by CC nor by PATH."""
        monkeypatch.setattr(compiled, "instruction_set", lambda: "AVX2")
        monkeypatch.setenv("CC", "/nowhere/cc -O1")
        assert select_kernels("auto", TINY, torch.float32, CPU) == (None, "no C compiler (/nowhere/cc, by PATH or CC)")
        monkeypatch.delenv("CC")
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(TrainingError, match=r"^--kernels c: no C compiler \(cc, gcc, clang, by PATH or CC\); take"):
            select_kernels("c", TINY, torch.float32, CPU)

    def test_a_command_that_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """CC with a quotation that does not end."""
        monkeypatch.setattr(compiled, "instruction_set", lambda: "AVX2")
        monkeypatch.setenv("CC", 'gcc "')
        assert select_kernels("auto", TINY, torch.float32, CPU) == (None, "CC is not a command (No closing quotation)")

    @needs_compiler
    def test_the_next_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where cc fails gcc is tried."""
        (tmp_path / "cc").write_text("#!/bin/sh\nexit 3\n")
        (tmp_path / "cc").chmod(0o755)
        (tmp_path / "gcc").symlink_to(str(shutil.which("cc")))
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert select_kernels("c", TINY, torch.bfloat16, CPU)[1] == "compiled by gcc"

    @needs_compiler
    def test_no_temporary_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is said, and torch computes."""
        monkeypatch.setattr("tempfile.tempdir", "/nowhere")
        monkeypatch.setenv("CC", "cc -DNOT_CACHED=1")
        kernels, reason = select_kernels("auto", TINY, torch.bfloat16, CPU)
        assert kernels is None
        assert "/nowhere/picogpt-" in reason

    @needs_compiler
    def test_flags_of_the_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """CC may have flags of its own."""
        monkeypatch.setenv("CC", "cc -DNOTHING=1")
        assert select_kernels("c", TINY, torch.bfloat16, CPU)[1] == "compiled by cc"

    @needs_compiler
    def test_nothing_is_left(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The folder in which they are made is gone."""
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setenv("CC", "cc -DNOT_CACHED=2")
        monkeypatch.setattr("tempfile.tempdir", None)
        compile_kernels(TINY, torch.float32)
        assert os.listdir(tmp_path) == []  # noqa: PTH208
