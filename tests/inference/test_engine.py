"""The engine, in numpy and in C, against the torch model and the vectors."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from picogpt.config import GPTConfig
from picogpt.errors import RunError
from picogpt.inference import Engine, EngineBackend
from picogpt.inference import weights as weights_module
from picogpt.inference.decoder import RollingDecoder
from picogpt.inference.tensors import WeightReader
from picogpt.model.gpt import GPT
from picogpt.runs.folder import RunFolder
from tests.conftest import engine_of, needs_any_compiler, one_window

Vectors = dict[str, npt.NDArray[Any]]
SMALL = GPTConfig(n_layer=2, n_head=4, n_embd=32, context_len=16)


def rough_model(config: GPTConfig, scale: float = 0.3) -> GPT:
    """A model whose every weight, norms and biases too, is far from its first value."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()


@pytest.fixture(scope="module")
def engine(roll_vectors: Vectors, backend: EngineBackend) -> Engine:
    """The model of the vectors."""
    weights = {name.removeprefix("w/"): array for name, array in roll_vectors.items() if name.startswith("w/")}
    return Engine(SMALL, weights, backend=backend, threads=2, dtype="float32")


@pytest.fixture(scope="module")
def rough(backend: EngineBackend) -> tuple[GPT, Engine]:
    """A model of another shape, whose heads are as long as no vector."""
    model = rough_model(GPTConfig(n_layer=3, n_head=3, n_embd=60, context_len=12))
    return model, engine_of(model, backend)


@pytest.mark.parametrize("n", [1, 7, 16, 17, 32, 53])
def test_hop_1_is_the_original(engine: Engine, roll_vectors: Vectors, n: int) -> None:
    """With hop 1 every character is predicted as if the text had been cut anew for it."""
    ids = roll_vectors[f"idx/{n}"][:1]
    roll = RollingDecoder(engine, 1)
    logits = np.concatenate([roll.prefill(ids[:, i : i + 1]) for i in range(n)])

    np.testing.assert_allclose(logits, roll_vectors[f"prefix_logits/{n}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("n", [16, 32, 160])
@pytest.mark.parametrize("at_once", [1, 5, 160])
def test_full_hop_is_the_plain_roll(engine: Engine, roll_vectors: Vectors, n: int, at_once: int) -> None:
    """With the hop of a whole window the predictions are those of training, however many characters are read at once."""
    ids = roll_vectors[f"idx/{n}"]
    roll = RollingDecoder(engine, 16, batch=2)
    logits = np.concatenate([roll.prefill_all_logits(ids[:, i : i + at_once]) for i in range(0, n, at_once)], axis=1)

    np.testing.assert_allclose(logits, roll_vectors[f"logits/{n}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("n", [1, 7, 16])
def test_context_vector(engine: Engine, roll_vectors: Vectors, n: int) -> None:
    """The mean over a window's slots, the context slot included."""
    window = engine.window(2)
    window.prefill(roll_vectors[f"idx/{n}"])

    np.testing.assert_allclose(window.context(), roll_vectors[f"context/{n}"][:, 0], atol=1e-4, rtol=0)


def test_every_weight_counts(rough: tuple[GPT, Engine]) -> None:
    """Gains, biases and means are all carried over: with rough weights the logits are large and agree in proportion."""
    model, engine = rough
    ids = np.arange(1, 37)[None] % 80
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), torch.from_numpy(ids))[0].numpy()
    at_once = RollingDecoder(engine, 12).prefill_all_logits(ids)
    roll = RollingDecoder(engine, 12)
    one_by_one = np.concatenate([roll.prefill_all_logits(ids[:, i : i + 1]) for i in range(36)], axis=1)

    scale = np.abs(expected).max()
    np.testing.assert_allclose(at_once / scale, expected / scale, atol=2e-5, rtol=0)
    np.testing.assert_allclose(one_by_one / scale, expected / scale, atol=2e-5, rtol=0)


def hop_by_definition(model: GPT, ids: list[int], hop: int) -> list[npt.NDArray[np.float32]]:
    """The hop scheme from its definition, with the torch model and no cache: the logits after each character."""
    length = model.config.context_len
    contexts: dict[int, torch.Tensor] = {0: torch.zeros(1, model.config.n_embd)}

    def run(start: int, end: int) -> torch.Tensor:
        h: torch.Tensor = one_window(model, torch.tensor([ids[start:end]]), contexts[start])
        return h

    rows = []
    start = 0
    for i in range(len(ids)):
        if i - start == length:
            start += hop
            # The earliest window that begins at most a window's length before this one.
            source = max(0, -(-(start - length) // hop) * hop)
            contexts[start] = run(source, start).mean(dim=1)
        rows.append(model.lm_head(run(start, i + 1)[:, -1])[0].numpy())
    return rows


@pytest.mark.parametrize("hop", [1, 2, 3, 4, 5, 6, 7, 11, 12])
@torch.no_grad()
def test_any_hop(rough: tuple[GPT, Engine], hop: int) -> None:
    """Every hop, dividing the window or not, does what its definition says."""
    model, engine = rough
    ids = [(i * i) % 79 + 1 for i in range(50)]
    roll = RollingDecoder(engine, hop)
    found = np.concatenate([roll.prefill(np.array([[token]])) for token in ids])
    expected = np.array(hop_by_definition(model, ids, hop))

    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=2e-5, rtol=0)


def test_fork(rough: tuple[GPT, Engine]) -> None:
    """Texts that go on from one prompt predict what each would by itself, over several hops."""
    engine = rough[1]
    prompt, tails = np.arange(1, 20)[None], np.arange(60).reshape(3, 20) + 1
    roll = RollingDecoder(engine, 5)
    roll.prefill(prompt)
    forked = roll.fork(3)
    together = np.stack([forked.prefill(tails[:, i : i + 1]) for i in range(20)], axis=1)
    for row, tail in zip(together, tails, strict=True):
        alone = RollingDecoder(engine, 5)
        alone.prefill(prompt)
        expected = np.concatenate([alone.prefill(tail[None, i : i + 1]) for i in range(20)])
        np.testing.assert_allclose(row, expected, atol=1e-3, rtol=1e-4)

    assert together.shape == (3, 20, 88)


def test_memory_does_not_grow(engine: Engine) -> None:
    """However long the text, a roll holds the same number of context vectors."""
    roll = RollingDecoder(engine, 3)
    held = set()
    for i in range(200):
        roll.prefill(np.array([[i % 80]]))
        if i > 60:
            held.add(len(roll._contexts))

    assert max(held) <= 7


def test_gelu_table() -> None:
    """The table gives GELU to 1e-6 over its range and below it."""
    values, slopes = weights_module._gelu_table(9.3)
    x = np.concatenate((np.linspace(-7, 10, 20_001), [-1e4]))
    places = (x + weights_module._GELU_FLOOR) * weights_module._GELU_STEPS
    cells = np.clip(np.floor(places).astype(int), 0, None)
    found = values[cells] + slopes[cells] * (places - np.floor(places))
    expected = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()]

    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-7)


def test_gelu_table_is_long_enough() -> None:
    """The largest input is bounded by the weights: no input of the right norm goes beyond the table."""
    model = rough_model(GPTConfig(n_layer=3, n_head=3, n_embd=48, context_len=12))
    weights = weights_module.Weights(WeightReader(model.config, model.arrays()))
    n = np.random.default_rng(0).normal(size=(1000, 48)).astype(np.float32)
    n *= math.sqrt(48) / np.linalg.norm(n, axis=1, keepdims=True)

    for layer in weights.layers:
        worst = layer.fc[:-1].T * math.sqrt(48) / np.linalg.norm(layer.fc[:-1], axis=0)[:, None]
        for inputs in (n, worst):
            assert (inputs @ layer.fc[:-1] + layer.fc[-1]).max() < len(weights.gelu_values)


def test_large_scores(backend: EngineBackend) -> None:
    """Scores too large for a plain exponential, as trained models have them, still give the model's logits."""
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight *= 600  # type: ignore[union-attr, operator]
    ids = np.arange(1, 11)[None]
    roll = RollingDecoder(engine_of(model, backend), 16)
    found = np.concatenate([roll.prefill(ids[:, i : i + 1]) for i in range(10)])
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), torch.from_numpy(ids))[0][0].numpy()

    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)


@needs_any_compiler
@pytest.mark.skipif(
    platform.machine().lower() not in {"x86_64", "amd64"}, reason="other processors are quick with denormal numbers"
)
def test_denormal_numbers_are_zero(compiled_backend: EngineBackend) -> None:
    """Every thread of C takes them for zero, as they cost a hundred multiplications; the program's own stay as they are."""
    model = GPT(SMALL)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1e-39)
        model.transformer.ln_f.bias.zero_()
    engine = engine_of(model, compiled_backend)
    losses, means = engine.score(np.ones((4, 17), np.int32), np.zeros((4, 32), np.float32))

    assert not engine.window().prefill(np.ones((1, 16), np.int32), all_logits=True).any()
    assert not means.any()
    np.testing.assert_allclose(losses, math.log(88), rtol=1e-6)
    assert np.float32(1e-38) / np.float32(10) > 0


def test_without_biases(backend: EngineBackend) -> None:
    """A model without biases runs too."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, context_len=8, bias=False)
    model = GPT(config).eval()
    ids = np.arange(1, 9)[None]
    found = RollingDecoder(engine_of(model, backend), 8).prefill(ids)

    np.testing.assert_allclose(found[:, None], model(torch.from_numpy(ids))[0].detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("transformer.ln_f.bias", np.full(32, np.nan, np.float32), "ln_f.bias has values that are not finite"),
        (
            "transformer.h.0.mlp.c_fc.weight",
            np.full((128, 32), 1e9, np.float32),
            "the weights have diverged: activations may reach",
        ),
        ("transformer.wte.weight", None, r"transformer.wte.weight should have shape \(88, 32\), got none"),
        ("transformer.h.1.ln_2.bias", np.zeros(3, np.float32), r"ln_2.bias should have shape \(32,\), got \(3,\)"),
    ],
)
def test_other_weights_are_refused(
    roll_vectors: Vectors, backend: EngineBackend, name: str, array: npt.NDArray[Any] | None, message: str
) -> None:
    """A weight that is missing or of another shape is named."""
    weights = {key.removeprefix("w/"): value for key, value in roll_vectors.items() if key.startswith("w/")}
    del weights[name]

    with pytest.raises(RunError, match=message):
        Engine(SMALL, weights if array is None else {**weights, name: array}, backend=backend)


def test_other_vocabulary_is_refused(tmp_path: Path) -> None:
    """The ids of another vocabulary would mean something else."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, context_len=4, vocab_size=50)
    RunFolder(tmp_path).save_model(GPT(config).arrays(), config)

    with pytest.raises(RunError, match="a vocabulary of 50, expected 88"):
        Engine.load(tmp_path / "model.safetensors")
