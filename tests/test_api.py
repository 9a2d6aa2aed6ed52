"""The Python interface: a model by name, its texts, logits and scores, without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import picogpt
from picogpt.errors import ConfigError
from picogpt.model.gpt import GPT
from picogpt.runs.folder import RunFolder
from picogpt.runs.loss_log import LossLog
from tests.conftest import TINY

TEXT = "the lamp was out, and the rain had stopped."


@pytest.fixture
def model(tmp_path: Path) -> picogpt.Model:
    """A tiny model that has learned nothing, in float32."""
    torch.manual_seed(1)
    run = RunFolder(tmp_path / "tiny")
    run.create()
    run.save_model(GPT(TINY).arrays(), TINY)
    return picogpt.load("tiny", logs_dir=tmp_path, dtype="float32", threads=1)


def reference(model: picogpt.Model) -> GPT:
    """The same model in torch."""
    torch.manual_seed(1)
    return GPT(TINY)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 43])
def test_logits(model: picogpt.Model, length: int) -> None:
    """The logits after each character are those of the torch model on the same text."""
    text = TEXT[:length]
    ids = torch.from_numpy(model.encode(text).astype(np.int64))[None]
    expected, _ = reference(model)(ids, ids)

    found = model.logits(text)
    assert found.shape == (length, 88)
    np.testing.assert_allclose(found, expected[0].detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("length", [2, 9, 10, 43])
def test_score(model: picogpt.Model, length: int) -> None:
    """The mean of the losses is the torch model's loss, in nats and in bits."""
    ids = torch.from_numpy(model.encode(TEXT[:length]).astype(np.int64))[None]
    _, loss = reference(model)(ids[:, :-1], ids[:, 1:])
    assert loss is not None

    score = model.score(TEXT[:length])
    assert score.losses.shape == (length - 1,)
    assert score.nats == pytest.approx(loss.item(), abs=1e-5)
    assert score.bits == pytest.approx(loss.item() / np.log(2), abs=1e-5)


def test_generate(model: picogpt.Model) -> None:
    """The same seed gives the same text, in one piece or several; another seed another one; greedy needs none."""
    text = model.generate(TEXT, max_new_tokens=40, temperature=1.0, seed=3)

    assert len(text) == 40
    assert "".join(model.stream(TEXT, max_new_tokens=40, temperature=1.0, seed=3)) == text
    assert model.generate(TEXT, max_new_tokens=40, temperature=1.0, seed=4) != text
    assert model.generate(TEXT, max_new_tokens=40, temperature=0) == model.generate(TEXT, max_new_tokens=40, temperature=0)
    assert len(model.generate(max_new_tokens=5)) == 5


def test_generate_stops(model: picogpt.Model) -> None:
    """A stop sequence ends the text and is no part of it."""
    text = model.generate(TEXT, max_new_tokens=40, temperature=1.0, seed=3)

    assert model.generate(TEXT, max_new_tokens=40, temperature=1.0, seed=3, stop=[text[10:13]]) == text[: text.index(text[10:13])]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.logits(""), "the text has 0 characters, and at least 1 are needed"),
        (lambda model: model.score("a"), "the text has 1 characters, and at least 2 are needed"),
        (lambda model: model.generate("a", stop=["é" * 0]), "stop must be"),
        (lambda model: model.generate("a", stop=["語"]), "stop must be made of characters that the model knows, got '語'"),
        (lambda model: model.generate("a", temperature=-1), "temperature must be"),
        (lambda model: model.generate("a", hop=9), "hop must be from 1 to 8"),
    ],
)
def test_wrong_values(model: picogpt.Model, call: Any, message: str) -> None:
    """What cannot be done is one error that says so."""
    with pytest.raises(picogpt.PicoGPTError, match=re.escape(message)):
        call(model)


def test_top_k_beyond_the_alphabet(model: picogpt.Model) -> None:
    """More characters than there are is all of them, also where the number has more than 32 bits."""
    given: dict[str, Any] = {"max_new_tokens": 60, "temperature": 1.0, "seed": 3}
    plain = model.generate(TEXT, **given)

    assert [model.generate(TEXT, **given, top_k=top_k) for top_k in (3_000_000_000, (1 << 32) + 1)] == [plain, plain]


@pytest.mark.parametrize(
    ("given", "message"), [({"threads": 0}, "threads must be from 1 to"), ({"dtype": "float16"}, "dtype must be one of auto, ")]
)
def test_wrong_settings(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    """As the commands check them."""
    with pytest.raises(ConfigError, match=f"^{message}"):
        picogpt.load("wikipedia", logs_dir=tmp_path, **given)


def test_unknown_model(tmp_path: Path) -> None:
    """A name that is none of a run is an error."""
    with pytest.raises(picogpt.PicoGPTError, match="no such file, and no run of that name"):
        picogpt.load("nobody", logs_dir=tmp_path)


def test_model_says_what_it_is(model: picogpt.Model, tmp_path: Path) -> None:
    """Its shape, its type and where it came from; text and ids go both ways."""
    assert model.config == TINY
    assert repr(model) == f"Model('{tmp_path}/tiny/model.safetensors', float32)"
    assert model.decode(model.encode("Ärger")) == "arger"


def test_log(tmp_path: Path) -> None:
    """The loss log of a run, by name."""
    log = LossLog(train=[2.0], val=[1.9], chars=[100], seconds=[1.5], best_loss=1.9, iter_num=7)
    run = RunFolder(tmp_path / "a")
    run.create()
    run.write_log(log)

    assert picogpt.read_log("a", logs_dir=tmp_path) == log


def test_names_are_imported_when_used() -> None:
    """All public names are there; a model needs no torch, and the package alone not even numpy."""
    assert all(getattr(picogpt, name) is not None for name in picogpt.__all__)
    assert set(picogpt.__all__) <= set(dir(picogpt))
    with pytest.raises(AttributeError, match="module 'picogpt' has no attribute 'nothing'"):
        picogpt.nothing  # noqa: B018
    code = (
        "import sys, picogpt; assert 'numpy' not in sys.modules; picogpt.load; "
        "assert not {'torch', 'datasets', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
