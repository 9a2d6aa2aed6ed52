"""The inference engine in C: shapes, types, threads, and what it shares with a process."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from picogpt.config import EngineDType, GPTConfig, SampleConfig
from picogpt.errors import ConfigError
from picogpt.inference import Engine, EngineBackend, load_engine_backend
from picogpt.inference.decoder import RollingDecoder, StepwiseDecoder
from picogpt.inference.engine import SOURCE
from picogpt.inference.layout import STRUCTURES, MatrixStruct
from picogpt.inference.native import MAX_WORKERS
from picogpt.inference.sampling import Sampler
from picogpt.inference.tuner import ThreadTuner
from picogpt.kernels.processor import vector_instructions
from picogpt.model.gpt import GPT
from picogpt.rng import sample_generator
from picogpt.runs.find import PRETRAINED
from picogpt.runs.model_file import load_model
from picogpt.tokenizer import CharTokenizer
from tests.conftest import engine_of, needs_any_compiler, one_window
from tests.inference.test_engine import rough_model

pytestmark = needs_any_compiler

SMALL = GPTConfig(n_layer=2, n_head=4, n_embd=32, context_len=12)
SHAPES = [
    SMALL,
    GPTConfig(n_layer=1, n_head=5, n_embd=20, context_len=37, bias=False),
    GPTConfig(n_layer=2, n_head=2, n_embd=96, context_len=1),
    GPTConfig(n_layer=1, n_head=1, n_embd=1, context_len=3),
    GPTConfig(n_layer=1, n_head=3, n_embd=102, context_len=511),
    GPTConfig(n_layer=1, n_head=4, n_embd=256, context_len=128),
    GPTConfig(n_layer=1, n_head=2, n_embd=32, context_len=16, vocab_size=1000),
]
"""Heads of 8, 4, 48, 1, 34, 64 and 16; one narrower than a vector, one with whole panels, and a larger vocabulary."""
TYPES: list[EngineDType] = ["float32", "bfloat16", "int8"]


def some_ids(count: int, batch: int = 1) -> npt.NDArray[np.int64]:
    """Ids of a text (batch, count)."""
    return np.random.default_rng(count).integers(1, 75, (batch, count))


def name_of(config: GPTConfig) -> str:
    """A name for a test of a shape."""
    return f"{config.n_embd}-{config.n_head}-{config.context_len}"


@pytest.mark.parametrize("config", SHAPES, ids=name_of)
@torch.no_grad()
def test_any_shape(config: GPTConfig, compiled_backend: EngineBackend) -> None:
    """Whatever the trainer can make predicts as in torch, read at once and one by one, over several windows."""
    model = rough_model(config, 0.1)
    n = min(3 * config.context_len, 600)
    ids = some_ids(n - n % config.context_len or n) * (config.vocab_size // 88)
    expected = model(torch.from_numpy(ids), torch.from_numpy(ids))[0].numpy()
    engine = engine_of(model, compiled_backend, threads=3)
    decoder = RollingDecoder(engine, config.context_len)
    singly = np.concatenate([decoder.prefill_all_logits(ids[:, i : i + 1]) for i in range(ids.shape[1])], axis=1)

    np.testing.assert_allclose(RollingDecoder(engine, config.context_len).prefill_all_logits(ids), expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(singly, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("config", SHAPES[:4], ids=name_of)
def test_threads_change_nothing(config: GPTConfig, dtype: EngineDType, compiled_backend: EngineBackend) -> None:
    """One thread or more, and more than there are rows, compute the same to the bit."""
    model = rough_model(config, 0.1)

    def results(threads: int) -> list[bytes]:
        engine = Engine(config, model.arrays(), backend=compiled_backend, threads=threads, dtype=dtype)
        decoder = RollingDecoder(engine, max(1, config.context_len - 1))
        logits = decoder.prefill_all_logits(some_ids(40))
        sampler = Sampler(SampleConfig(), [sample_generator(0)])
        drawn = [decoder.decode(np.array([1]), sampler, 20) for _ in range(5)]
        many = decoder.fork(5)
        sampler = Sampler(SampleConfig(), [sample_generator(i) for i in range(5)])
        side_by_side = [many.decode(np.full(5, i), sampler, 20) for i in range(5)]
        losses, means = engine.score(some_ids(config.context_len + 1, 5), np.zeros((5, config.n_embd), np.float32))
        return [array.tobytes() for array in (logits, *drawn, *side_by_side, losses, means)]

    expected = results(1)
    for threads in (2, 3, 7):
        assert results(threads) == expected


def test_most_threads(compiled_backend: EngineBackend) -> None:
    """The engine says how many threads the kernels take at most, as the C source has it."""
    engine = engine_of(rough_model(SHAPES[0], 0.1), compiled_backend, threads=1000)
    source = SOURCE.with_name("threads.h").read_text()
    limit = re.search(r"^#define MAX_THREADS (\d+)$", source, re.M)

    assert limit
    assert engine.threads == MAX_WORKERS == int(limit[1])


@pytest.mark.parametrize("config", SHAPES[:2], ids=name_of)
def test_bfloat16_weights(config: GPTConfig, compiled_backend: EngineBackend) -> None:
    """Of weights that are bfloat16 numbers it computes what float32 does, within rounding."""
    model = rough_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    found = [
        RollingDecoder(Engine(config, model.arrays(), backend=compiled_backend, dtype=dtype), 12).prefill_all_logits(some_ids(36))
        for dtype in ("float32", "bfloat16")
    ]

    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_rounding_of_weights(compiled_backend: EngineBackend) -> None:
    """Weights that bfloat16 cannot hold are rounded to the nearest, ties to even, as torch does."""
    model = rough_model(SMALL)
    rounded = rough_model(SMALL)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.dim() == 2 and "wpe" not in name:
                parameter.copy_(parameter.bfloat16())
    embedding = model.transformer.wte.weight
    with torch.no_grad():
        embedding.copy_(rounded.transformer.wte.weight)
    ids = some_ids(12)
    found = RollingDecoder(Engine(SMALL, model.arrays(), backend=compiled_backend, dtype="bfloat16"), 12).prefill_all_logits(ids)
    expected = RollingDecoder(engine_of(rounded, compiled_backend), 12).prefill_all_logits(ids)

    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_int8_is_close(compiled_backend: EngineBackend) -> None:
    """Bytes with a scale a row, read at once and one by one, give nearly the probabilities of float32."""
    model = rough_model(replace(SMALL, n_embd=64), 0.05)
    ids = some_ids(12)
    exact = RollingDecoder(engine_of(model, compiled_backend), 12).prefill_all_logits(ids)
    engine = Engine(model.config, model.arrays(), backend=compiled_backend, dtype="int8")
    decoder = RollingDecoder(engine, 12)
    singly = np.concatenate([decoder.prefill_all_logits(ids[:, i : i + 1]) for i in range(12)], axis=1)

    spread = exact.std()
    assert 0 < np.abs(RollingDecoder(engine, 12).prefill_all_logits(ids) - exact).max() < 0.1 * spread
    assert 0 < np.abs(singly - exact).max() < 0.2 * spread


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(temperature=1.0),
        SampleConfig(temperature=0.0),
        SampleConfig(temperature=1e-310),
        SampleConfig(temperature=1.3, top_k=5),
        SampleConfig(temperature=2.0, top_p=0.7),
        SampleConfig(temperature=1.0, min_p=0.02),
        SampleConfig(temperature=3.0, top_k=20, top_p=0.9, min_p=0.1),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("hop", "vocab_size"), [(11, 88), (12, 88), (12, 1000)])
def test_draws_as_in_numpy(config: SampleConfig, hop: int, vocab_size: int, compiled_backend: EngineBackend) -> None:
    """The same seed draws the same ids from the functions in C and from numpy's filters, over many windows."""
    engine = engine_of(rough_model(replace(SMALL, vocab_size=vocab_size), 0.1), compiled_backend)
    decoder = RollingDecoder(engine, hop, batch=2)
    plain = StepwiseDecoder(RollingDecoder(engine, hop, batch=2).prefill)
    samplers = [Sampler(config, [sample_generator(3, i) for i in range(2)], vocab_size=vocab_size) for _ in range(2)]
    ids = np.array([1, 2])
    drawn: list[npt.NDArray[np.integer]] = []
    while sum(map(len, drawn)) < 300:
        drawn.append(decoder.decode(drawn[-1][-1] if drawn else ids, samplers[0], 50))
    found = np.concatenate(drawn)
    expected = []
    for _ in range(len(found)):
        ids = plain.decode(ids, samplers[1], 1)[-1]
        expected.append(ids)

    assert found.tolist() == np.array(expected).tolist()


@torch.no_grad()
def test_losses(compiled_backend: EngineBackend) -> None:
    """Losses and context vectors of many windows are those of the torch model, in C and in numpy."""
    model = rough_model(SMALL, 0.1)
    ids, contexts = some_ids(13, 7), np.random.default_rng(0).normal(size=(7, 32)).astype(np.float32)
    h = one_window(model, torch.from_numpy(ids[:, :-1]), torch.from_numpy(contexts))
    expected = F.cross_entropy(model.lm_head(h[:, 1:]).transpose(1, 2), torch.from_numpy(ids[:, 1:]), reduction="none")
    for engine in (engine_of(model, compiled_backend), Engine(SMALL, model.arrays())):
        losses, means = engine.score(ids, contexts)

        np.testing.assert_allclose(losses, expected.numpy(), atol=1e-4)
        np.testing.assert_allclose(means, h.mean(dim=1).numpy(), atol=1e-5)


def test_many_rows_are_read_in_pieces(compiled_backend: EngineBackend) -> None:
    """More rows than there is memory for at once give what each text gives by itself."""
    engine = engine_of(rough_model(replace(SMALL, context_len=128), 0.1), compiled_backend)
    ids = some_ids(128, 9)
    together = RollingDecoder(engine, 128, batch=9).prefill_all_logits(ids)

    for row, alone in zip(together, ids, strict=True):
        np.testing.assert_allclose(row[None], RollingDecoder(engine, 128).prefill_all_logits(alone[None]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_many_texts_fork_from_one(dtype: EngineDType, error: float, compiled_backend: EngineBackend) -> None:
    """Many texts continue a prompt as one does; in bfloat16 their KV cache is rounded, and no more than that."""
    model = rough_model(replace(SMALL, context_len=64), 0.05)
    engine = Engine(model.config, model.arrays(), backend=compiled_backend, threads=2, dtype=dtype)
    one = RollingDecoder(engine, 60)
    one.prefill(some_ids(100))
    many = one.fork(9)
    for token in some_ids(80)[0]:
        expected = one.prefill(np.array([[token]]))
        found = many.prefill(np.full((9, 1), token))

        np.testing.assert_allclose(found, np.repeat(expected, 9, axis=0), atol=error * expected.std(), rtol=1e-4)


def test_structures_of_another_size_are_noticed(compiled_backend: EngineBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that one side lacks is noticed before anything is computed."""

    class Longer(ctypes.Structure):
        _fields_ = (*MatrixStruct._fields_, ("more", ctypes.c_void_p))

    monkeypatch.setitem(STRUCTURES, "matrix", Longer)
    with pytest.raises(AssertionError, match=r"^decode.c and picogpt/inference/layout.py differ: \[.*matrix\.more"):
        engine_of(GPT(SMALL), compiled_backend)


def test_structures_in_another_order_are_noticed(compiled_backend: EngineBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fields of one size that have changed places are noticed too."""
    first, second, *others = MatrixStruct._fields_
    other = type("Other", (ctypes.Structure,), {"_fields_": (second, first, *others)})
    monkeypatch.setitem(STRUCTURES, "matrix", other)
    with pytest.raises(AssertionError, match=r"\('matrix\.packed', 0, 8\), \('matrix\.packed', 8, 8\)"):
        engine_of(GPT(SMALL), compiled_backend)


def test_a_forked_process_has_threads_of_its_own(compiled_backend: EngineBackend) -> None:
    """A child that is forked after threads have worked computes too, and ends."""
    engine = engine_of(rough_model(SMALL), compiled_backend, threads=3)
    expected = RollingDecoder(engine, 12).prefill_all_logits(some_ids(30)).tobytes()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)
            code = int(RollingDecoder(engine, 12).prefill_all_logits(some_ids(30)).tobytes() != expected)
        finally:
            os._exit(code)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler that works numpy computes, and says why; a type that it lacks is refused."""
    monkeypatch.setenv("CC", "false")
    backend = load_engine_backend()
    model = rough_model(SMALL)

    assert backend.library is None
    assert "false fails" in backend.reason
    assert Engine(SMALL, model.arrays(), backend=backend).dtype == "float32"
    with pytest.raises(ConfigError, match="dtype int8 needs the native kernels, which are not available: false fails"):
        Engine(SMALL, model.arrays(), backend=backend, dtype="int8")


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(("slow", "fastest"), [(1, 4), (4, 1)])
def test_the_fastest_number_of_threads(monkeypatch: pytest.MonkeyPatch, slow: int, fastest: int) -> None:
    """It settles on what is fastest, and tries others in little time, more and more seldom."""
    clock = Clock()
    monkeypatch.setattr("picogpt.inference.tuner.time", clock)
    tuner, spent = ThreadTuner(4), {1: 0.0, 2: 0.0, 4: 0.0}
    while sum(spent.values()) < 10:
        with tuner.block(1000) as (threads, count):
            seconds = count * (0.003 if threads == slow else 0.001 if threads == fastest else 0.002)
            clock.now += seconds
            spent[threads] += seconds

    assert tuner.threads == fastest
    assert spent[fastest] > 9.5


def test_a_change_of_load_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """When another program comes and goes, the number of threads follows within seconds."""
    clock = Clock()
    monkeypatch.setattr("picogpt.inference.tuner.time", clock)
    tuner = ThreadTuner(2)
    for seconds_of_two, expected in ((0.001, 2), (0.009, 1), (0.001, 2)):
        start = clock.now
        while clock.now < start + 8:
            with tuner.block(1000) as (threads, count):
                clock.now += count * (0.002 if threads == 1 else seconds_of_two)

        assert tuner.threads == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "instructions"),
    [("gcc", ""), ("gcc", "-mavx2 -mfma"), ("gcc", "-march=native -mprefer-vector-width=512"), ("clang", "-mavx2 -mfma")],
)
def test_sanitizers(compiler: str, instructions: str, tmp_path: Path) -> None:
    """Without a warning, a read or write out of place, undefined behaviour or a leak, over odd shapes, types and threads."""
    if "avx2" in instructions and vector_instructions() not in {"AVX2", "AVX512"}:
        pytest.skip("this processor has no AVX2")
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", *instructions.split(), "-pthread"]
    flags += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", f"-I{SOURCE.parent}"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    empty, driver = tmp_path / "empty.c", tmp_path / "driver"
    empty.write_text("int main(void) { return 0; }")
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler}")
    if subprocess.run([compiler, *sanitizers, str(empty), "-o", str(driver)], capture_output=True, check=False).returncode:
        pytest.skip("the compiler has no runtime for AddressSanitizer and UndefinedBehaviorSanitizer")
    source = Path(__file__).parents[1] / "native" / "decode_driver.c"
    done = subprocess.run(
        [compiler, *flags, *sanitizers, str(source), "-o", str(driver), "-lm"], capture_output=True, text=True, check=False
    )
    assert not done.stderr
    done = subprocess.run([str(driver)], capture_output=True, text=True, check=False)

    assert (done.stdout, done.stderr, done.returncode) == ("ok\n", "", 0)


def logits_by_windows(model: GPT, ids: npt.NDArray[np.int64], hop: int) -> npt.NDArray[np.float32]:
    """The hop scheme with the torch model and no cache: the logits after each character, window by window."""
    length, contexts = model.config.context_len, {0: torch.zeros(1, model.config.n_embd)}
    rows: list[npt.NDArray[np.float32]] = []

    def outputs(start: int, end: int) -> torch.Tensor:
        h: torch.Tensor = one_window(model, torch.from_numpy(ids[None, start:end]), contexts[start])
        return h

    start = 0
    while len(rows) < len(ids):
        end = min(start + length, len(ids))
        rows += list(model.lm_head(outputs(start, end)[0, 1 + len(rows) - start :]).numpy())
        start += hop
        # The earliest window that begins at most a window's length before the next one.
        source = max(0, -(-(start - length) // hop) * hop)
        contexts[start] = outputs(source, start).mean(dim=1)
    return np.array(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("hop", "count"), [(128, 2000), (120, 2000), (64, 1000), (1, 150)])
@torch.no_grad()
def test_a_trained_model_as_in_torch(hop: int, count: int, compiled_backend: EngineBackend) -> None:
    """The full-size trained model predicts a real text as in torch to 1e-4 in every logit, character by character."""
    stored = load_model(PRETRAINED / "wikipedia" / "model.safetensors")
    model = GPT(stored.config).eval()
    model.load_arrays(stored.weights)
    text = (Path(__file__).parents[2] / "dataset" / "sample.txt").read_text()
    ids = CharTokenizer().encode(text)[:count].astype(np.int64)
    decoder = RollingDecoder(Engine(stored.config, stored.weights, backend=compiled_backend, threads=2, dtype="float32"), hop)
    found = np.concatenate([decoder.prefill(ids[None, i : i + 1]) for i in range(count)])

    np.testing.assert_allclose(found, logits_by_windows(model, ids, hop), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tinyshakespeare", "wikipedia"])
def test_what_a_type_costs(name: str, compiled_backend: EngineBackend) -> None:
    """Of a trained model each type predicts a real text, character by character, as well as float32, within a bound."""
    stored = load_model(PRETRAINED / name / "model.safetensors")
    text = Path(__file__).parents[2] / "dataset" / "sample.txt"
    ids = CharTokenizer().encode(text.read_text())[:20_001].astype(np.int64)

    def losses(dtype: EngineDType) -> torch.Tensor:
        decoder = RollingDecoder(Engine(stored.config, stored.weights, backend=compiled_backend, threads=2, dtype=dtype), 120)
        logits = np.concatenate([decoder.prefill(ids[None, i : i + 1]) for i in range(len(ids) - 1)])
        return F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(ids[1:]), reduction="none").double()

    exact = losses("float32")
    bounds: dict[EngineDType, float] = {"bfloat16": 0.0002, "int8": 0.001}
    for dtype, bound in bounds.items():
        difference = losses(dtype) - exact
        blocks = difference.reshape(-1, 100).mean(dim=1)
        error = float(blocks.std() / len(blocks) ** 0.5)

        assert abs(float(difference.mean())) < bound + 2 * error, dtype
