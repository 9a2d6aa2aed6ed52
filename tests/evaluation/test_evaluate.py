"""Each condition, in numpy and in C, against the torch model called in its plainest way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from picogpt.config import GPTConfig
from picogpt.evaluation.evaluate import chars_to_read, evaluate, evaluate_as_is
from picogpt.evaluation.scores import CONDITIONS, EvalSequences, Losses
from picogpt.inference import Engine, EngineBackend, Ids, NativeWindow
from picogpt.inference.engine import NUMPY
from picogpt.inference.tensors import Floats
from picogpt.model.gpt import GPT
from tests.conftest import TINY, engine_of, needs_any_compiler, one_window

WINDOWS = 3
N = TINY.context_len


@pytest.fixture(scope="module")
def model() -> GPT:
    """A model whose weights are large enough that its context vector matters."""
    torch.manual_seed(0)
    model = GPT(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model.eval()


@pytest.fixture(scope="module")
def sequences() -> EvalSequences:
    """Five sequences of two articles."""
    ids = np.random.Generator(np.random.Philox(1)).integers(1, 75, (5, WINDOWS * N + 1), dtype=np.uint8)
    return EvalSequences(ids, np.array([0, 0, 1, 1, 1]))


@pytest.fixture(scope="module")
def losses(model: GPT, sequences: EvalSequences, backend: EngineBackend) -> dict[str, Losses]:
    """What is tested."""
    return evaluate(engine_of(model, backend), sequences, advance=lambda _: None)


def nats(logits: Tensor, targets: Tensor) -> Losses:
    """Losses (n,) of logits (n, V)."""
    return np.asarray(F.cross_entropy(logits, targets, reduction="none").detach().numpy(), np.float32)


def row(sequences: EvalSequences, i: int) -> Tensor:
    """Ids (1, T + 1) of one sequence."""
    return torch.from_numpy(sequences.ids[i : i + 1].astype(np.int64))


def test_as_is_is_the_loss_of_training(model: GPT, sequences: EvalSequences, losses: dict[str, Losses]) -> None:
    """Character by character, what the model gives for the whole sequence."""
    for i in range(5):
        idx = row(sequences, i)
        logits, loss = model(idx[:, :-1], idx[:, 1:])

        np.testing.assert_allclose(losses["as_is"][i].reshape(-1), nats(logits[0], idx[0, 1:]), atol=1e-5)
        assert loss is not None
        assert losses["as_is"][i].mean() == pytest.approx(loss.item(), abs=1e-5)


def test_zeroed_is_each_window_alone(model: GPT, sequences: EvalSequences, losses: dict[str, Losses]) -> None:
    """A text of one window starts from the zero vector."""
    for i in range(5):
        for start in range(0, WINDOWS * N, N):
            idx = row(sequences, i)[:, start : start + N + 1]
            alone = nats(model(idx[:, :-1], idx[:, 1:])[0][0], idx[0, 1:])
            np.testing.assert_allclose(losses["zeroed"][i, start // N], alone, atol=1e-5)
    assert np.abs(losses["zeroed"] - losses["as_is"])[:, 1:].max() > 0.01


def test_other_takes_the_vectors_of_the_partner(model: GPT, sequences: EvalSequences, losses: dict[str, Losses]) -> None:
    """Window i starts from what window i - 1 of a sequence of the other article put out."""
    for i, partner in enumerate([2, 3, 0, 1, 0]):
        contexts = [context for _, context in model.roll(row(sequences, partner)[:, :-1])]
        for window in range(1, WINDOWS):
            idx = row(sequences, i)[:, window * N : (window + 1) * N + 1]
            logits = model.lm_head(one_window(model, idx[:, :-1], contexts[window - 1]))[0, 1:]
            np.testing.assert_allclose(losses["other"][i, window], nats(logits, idx[0, 1:]), atol=1e-5)
    np.testing.assert_array_equal(losses["other"][:, 0], losses["as_is"][:, 0])


def test_sliding_scores_the_newest_half(model: GPT, sequences: EvalSequences, losses: dict[str, Losses]) -> None:
    """Each character but those of the first window comes from a window alone that shows at least half a window before it."""
    for i in range(5):
        for target in range(N, WINDOWS * N):
            start = (target - N // 2) // (N // 2) * (N // 2)
            idx = row(sequences, i)[:, start : start + N + 1]
            alone = nats(model(idx[:, :-1], idx[:, 1:])[0][0], idx[0, 1:])
            assert losses["sliding"][i].reshape(-1)[target] == pytest.approx(alone[target - start], abs=1e-5)


def by_torch(model: GPT, sequences: EvalSequences) -> dict[str, Losses]:
    """Every condition from its definition, window by window."""
    n, (R, T) = model.config.context_len, (len(sequences.ids), sequences.ids.shape[1] - 1)
    ids, partners = torch.from_numpy(sequences.ids.astype(np.int64)), sequences.partners()
    contexts = [context for _, context in model.roll(ids[:, :-1])]
    zero = torch.zeros(R, model.config.n_embd)

    def read(start: int, context: Tensor) -> Losses:
        logits = model.lm_head(one_window(model, ids[:, start : start + n], context)[:, 1:])
        return nats(logits.flatten(0, 1), ids[:, start + 1 : start + n + 1].flatten()).reshape(R, n)

    starts = range(0, T, n)
    given = [zero, *contexts[:-1]]
    as_is = [read(start, context) for start, context in zip(starts, given, strict=True)]
    found = {
        "as_is": np.concatenate(as_is, axis=1),
        "zeroed": np.concatenate([read(start, zero) for start in starts], axis=1),
        "other": np.concatenate([read(start, context[partners]) for start, context in zip(starts, given, strict=True)], axis=1),
        "sliding": np.empty((R, T), np.float32),
    }
    for start in [T - n, *reversed(range(0, T - n, max(1, n // 2)))]:  # the first window that holds a character scores it
        found["sliding"][:, start : start + n] = read(start, zero)
    return found


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(n_layer=1, n_head=1, n_embd=8, context_len=1),
        GPTConfig(n_layer=2, n_head=2, n_embd=8, context_len=2, bias=False),
        GPTConfig(n_layer=1, n_head=3, n_embd=12, context_len=3),
        GPTConfig(n_layer=2, n_head=3, n_embd=60, context_len=37),
        GPTConfig(n_layer=1, n_head=2, n_embd=64, context_len=128),
    ],
    ids=lambda config: f"{config.n_head}-{config.n_embd}-{config.context_len}",
)
@torch.no_grad()
def test_any_shape(config: GPTConfig, backend: EngineBackend) -> None:
    """All conditions are within 1e-4 nats of torch's, and progress counts as many characters as it says beforehand."""
    torch.manual_seed(0)
    model, n = GPT(config).eval(), config.context_len
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    ids = np.random.Generator(np.random.Philox(2)).integers(1, 75, (3, 3 * n + 1), dtype=np.uint8)
    sequences = EvalSequences(ids, np.array([0, 0, 1]))
    told: list[int] = []
    found = evaluate(engine_of(model, backend), sequences, advance=told.append)

    assert found.keys() == CONDITIONS.keys()
    assert sum(told) == chars_to_read(sequences, n)
    for name, expected in by_torch(model, sequences).items():
        np.testing.assert_allclose(found[name].reshape(3, -1), expected, atol=1e-4, err_msg=name)


def test_as_is_alone(model: GPT, sequences: EvalSequences, losses: dict[str, Losses], backend: EngineBackend) -> None:
    """The same losses as among all conditions, and each character is read once."""
    told: list[int] = []

    np.testing.assert_allclose(
        evaluate_as_is(engine_of(model, backend), sequences, advance=told.append), losses["as_is"], atol=1e-6
    )
    assert sum(told) == sequences.n_chars


@needs_any_compiler
def test_int8_is_scored_as_it_decodes(model: GPT, sequences: EvalSequences, compiled_backend: EngineBackend) -> None:
    """Activations are rounded too, as they are where one character is read after the other."""
    engine = Engine(TINY, model.arrays(), backend=compiled_backend, threads=2, dtype="int8")
    found, _ = engine.score(sequences.ids[:, : N + 1], np.zeros((5, TINY.n_embd), np.float32))
    for i in range(5):
        window = engine.window()
        assert isinstance(window, NativeWindow)
        window._prefill(np.empty((1, 0), np.int32), all_logits=False)
        logits = np.concatenate([window.prefill(sequences.ids[i : i + 1, k : k + 1]) for k in range(N)])

        np.testing.assert_allclose(found[i], nats(torch.from_numpy(logits), row(sequences, i)[0, 1 : N + 1]), atol=1e-5)
    in_float32, _ = engine_of(model, compiled_backend).score(sequences.ids[:, : N + 1], np.zeros((5, TINY.n_embd), np.float32))
    assert np.abs(found - in_float32).max() > 1e-4


def test_pieces_stay_short(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of the engine is given more windows while it is quick, and fewer once it takes long, so that Ctrl-C is heard."""
    engine, now, sizes = engine_of(model, NUMPY), [0.0], list[int]()
    score = engine.score

    def timed(ids: Ids, contexts: Floats) -> tuple[Floats, Floats]:
        sizes.append(len(ids))
        now[0] += 0.02 * len(ids) if len(sizes) < 12 else 0.1 * len(ids)
        return score(ids, contexts)

    monkeypatch.setattr(engine, "score", timed)
    monkeypatch.setattr("picogpt.evaluation.evaluate.time.perf_counter", lambda: now[0])
    sequences = EvalSequences(np.ones((400, N + 1), np.uint8), np.arange(400))
    found = evaluate_as_is(engine, sequences, advance=lambda _: None)

    assert sizes[:7] == [2, 4, 8, 16, 16, 16, 16]
    assert sizes[11:15] == [16, 8, 4, 4]
    np.testing.assert_allclose(found, found[:1].repeat(400, axis=0), atol=1e-6)
