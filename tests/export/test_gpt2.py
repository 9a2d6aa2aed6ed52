"""The folder for transformers: GPT-2's layout, a tokenizer that is ours, and logits that are the engine's within one window."""

from __future__ import annotations

import errno
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

import picogpt
from picogpt.alphabet import PICOGPT
from picogpt.cli import export
from picogpt.config import GPTConfig, TextConfig
from picogpt.errors import RunError
from picogpt.export.gpt2 import Gpt2Model, write_gpt2
from picogpt.model.gpt import GPT
from picogpt.runs.folder import RunFolder
from picogpt.tokenizer import CharTokenizer
from tests.conftest import TINY

WIKIPEDIA = Path(__file__).parents[2] / "logs" / "wikipedia" / "model.safetensors"
needs_wikipedia = pytest.mark.skipif(not WIKIPEDIA.exists(), reason="needs the bundled model")
TEXT = TextConfig(fold=True, ids=tuple(range(1, 60)))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A tiny model that has learned nothing."""
    torch.manual_seed(2)
    folder = RunFolder(tmp_path / "tiny")
    folder.create()
    folder.save_model(GPT(TINY).arrays(), TINY, TEXT)
    return folder


@pytest.fixture
def model(run: RunFolder) -> Gpt2Model:
    """The same, to be exported."""
    torch.manual_seed(2)
    return Gpt2Model("tiny", TINY, GPT(TINY).arrays(), TEXT)


def test_layout(model: Gpt2Model) -> None:
    """Linear layers are transposed, the head is left out, and the first token's embedding is zero; nothing else changes."""
    tensors = model.tensors()

    assert set(tensors) == {name for name in model.weights if name != "lm_head.weight"}
    np.testing.assert_array_equal(
        tensors["transformer.h.0.attn.c_attn.weight"], model.weights["transformer.h.0.attn.c_attn.weight"].T
    )
    np.testing.assert_array_equal(tensors["transformer.h.1.ln_1.weight"], model.weights["transformer.h.1.ln_1.weight"])
    rows = np.abs(tensors["transformer.wte.weight"]).sum(axis=1)
    assert np.flatnonzero(rows == 0).tolist() == [model.bos_id]
    assert model.bos_id not in PICOGPT.special_ids.values()


def test_generated_ids(model: Gpt2Model) -> None:
    """Of ids that the training text does not hold none is generated, nor unknown, special and spare ones."""
    suppressed = model.generation_config()["suppress_tokens"]

    assert sorted({*range(88)} - {*suppressed}) == [*range(1, 60)]


def test_card(model: Gpt2Model) -> None:
    """The hub can read its front matter; it says that the roll is left out and how far the model sees."""
    card = model.card()

    data: Any = ModelCard(card).data
    assert data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["character-level", "picogpt"],
    }
    assert "at most 8 characters" in card
    assert "without its context roll" in card


def test_no_biases() -> None:
    """GPT-2 has biases; a model without them is rejected by name."""
    shape = replace(TINY, bias=False)
    with pytest.raises(RunError, match="tiny: GPT-2 has biases, and this model has none; it cannot be exported as GPT-2"):
        Gpt2Model("tiny", shape, GPT(shape).arrays(), None)


def test_files(model: Gpt2Model, tmp_path: Path) -> None:
    """The folder holds what the two Auto classes read, and no code."""
    write_gpt2(model, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    tokenizer = (tmp_path / "out" / "tokenizer.json").read_text()

    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len(tokenizer) < 6000
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_positions"] == 9
    inputs = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_input_names"]
    assert inputs == ["input_ids", "attention_mask"]


def loaded(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model as transformers has them, without code of ours."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return tokenizer, model


@pytest.mark.filterwarnings("ignore")
def test_tokenizer_is_ours(model: Gpt2Model, tmp_path: Path) -> None:
    """3,000 strings of any characters have our ids behind the first token, and text comes back."""
    write_gpt2(model, tmp_path / "out")
    tokenizer, _ = loaded(tmp_path / "out")
    ours, generator = CharTokenizer(), random.Random(1)
    for _ in range(3000):
        points = (generator.choice(((0, 128), (32, 0xD800), (0xE000, 0x110000))) for _ in range(generator.randrange(30)))
        text = "".join(chr(generator.randrange(*span)) for span in points)

        assert tokenizer(text)["input_ids"] == [model.bos_id, *ours.encode(text).tolist()], repr(text)
    assert list(tokenizer("a")) == ["input_ids", "attention_mask"]  # what GPT-2 takes: it would add token types' embeddings
    assert tokenizer.decode(tokenizer("a <Q> b\n c")["input_ids"], skip_special_tokens=True) == "a <q> b\n c"


@pytest.mark.filterwarnings("ignore")
def test_logits_are_ours(run: RunFolder, model: Gpt2Model, tmp_path: Path) -> None:
    """Within one window, from a zero context vector, logits are the engine's; it generates characters of the text alone."""
    write_gpt2(model, tmp_path / "out")
    tokenizer, gpt2 = loaded(tmp_path / "out")
    with torch.no_grad():
        found = gpt2(**tokenizer("a window", return_tensors="pt")).logits[0, 1:].numpy()  # (8, 88)
    expected = picogpt.load(run.path, dtype="float32").logits("a window")
    others = [i for i in range(88) if i != model.bos_id]

    np.testing.assert_allclose(found[:, others], expected[:, others], atol=1e-5)
    ids = gpt2.generate(**tokenizer("a", return_tensors="pt"), max_length=9)[0].tolist()
    assert set(ids[2:]) <= set(TEXT.ids)
    assert re.fullmatch(r".{8}", tokenizer.decode(ids, skip_special_tokens=True), re.DOTALL)


@needs_wikipedia
@pytest.mark.filterwarnings("ignore")
def test_logits_of_a_full_window(tmp_path: Path) -> None:
    """Over all 128 characters of a window the bundled model's logits are within 1e-4 of the engine's."""
    text = ("The history of the city begins with a bridge of wood over the river. " * 2)[:128]
    assert export.main(["-m", str(WIKIPEDIA), "--format", "gpt2", str(tmp_path / "out")]) == 0
    tokenizer, gpt2 = loaded(tmp_path / "out")
    with torch.no_grad():
        found = gpt2(**tokenizer(text, return_tensors="pt")).logits[0, 1:].numpy()  # (128, 88)
    expected = picogpt.load(WIKIPEDIA, dtype="float32").logits(text)
    others = [i for i in range(88) if i != PICOGPT.spare_ids[0]]

    np.testing.assert_allclose(found[:, others], expected[:, others], atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_onnx(model: Gpt2Model, tmp_path: Path) -> None:
    """The lines of docs/export.md write an ONNX model, which has the same logits for a text of any length in the window."""
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library)
    onnxruntime = pytest.importorskip("onnxruntime")
    write_gpt2(model, tmp_path / "out")
    tokenizer, gpt2 = loaded(tmp_path / "out")
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (lines,) = (block for block in re.findall("```python\n(.*?)```", page, re.DOTALL) if "torch.onnx" in block)
    program = lines.replace('"wikipedia', f'"{tmp_path}/wikipedia').replace("129", "9")
    (tmp_path / "out").rename(tmp_path / "wikipedia-gpt2")
    exec(compile(program, "docs/export.md", "exec"), {})
    session = onnxruntime.InferenceSession(tmp_path / "wikipedia.onnx")

    for text in ("a", "a window"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        (found,) = session.run(["logits"], {"input_ids": ids.numpy()})
        np.testing.assert_allclose(found, gpt2(ids).logits.detach().numpy(), atol=1e-4)


def test_full_model(tmp_path: Path) -> None:
    """The full shape has GPT-2's names for 100 tensors."""
    shape = GPTConfig()
    tensors = Gpt2Model("full", shape, GPT(shape).arrays(), None).tensors()

    assert len(tensors) == 100
    assert tensors["transformer.h.7.mlp.c_fc.weight"].shape == (256, 1024)


class TestCommand:
    def test_writes_a_folder(self, run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The path goes to stdout; stderr names the files, the limit and the line to upload them with."""
        folder = tmp_path / "to share"
        assert export.main(["-m", str(run.path), "--format", "gpt2", str(folder)]) == 0

        out, err = capsys.readouterr()
        assert out == f"{folder}\n"
        first, second, third = err.splitlines()
        assert first.startswith(f"model {run.path}/model.safetensors: README.md, config.json, ")
        assert second.startswith("this is the model without its context roll, within one window of 8 characters; ")
        assert third.endswith(f": hf upload NAME '{folder}'")
        written = {path.name: path.read_bytes() for path in folder.iterdir()}
        torch.manual_seed(2)
        write_gpt2(Gpt2Model("tiny", TINY, GPT(TINY).arrays(), TEXT), tmp_path / "library")
        assert written == {path.name: path.read_bytes() for path in (tmp_path / "library").iterdir()}

    @pytest.mark.parametrize(
        ("folder", "message"),
        [
            ("full", "FOLDER: full exists and is not an empty folder; choose another name"),
            ("full/x", "FOLDER: full/x exists and is not an empty folder; choose another name"),
            ("nowhere/x", "FOLDER: there is no folder nowhere; create it first"),
            ("/", "FOLDER: / exists and is not an empty folder; choose another name"),
        ],
    )
    def test_wrong_folder(
        self, folder: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A folder that cannot be written is one line, before the work."""
        monkeypatch.chdir(tmp_path)
        Path("full").mkdir()
        Path("full/x").touch()

        assert export.main(["--format", "gpt2", folder]) == 2
        assert capsys.readouterr().err == f"picogpt-export: {message}\n"

    def test_read_only_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """A place that cannot be written to is one line, before the work."""
        monkeypatch.setattr("os.access", lambda *_: False)

        assert export.main(["--format", "gpt2", str(tmp_path / "x")]) == 2
        assert capsys.readouterr().err == f"picogpt-export: FOLDER: {tmp_path} cannot be written; choose another folder\n"

    def test_full_disk(
        self, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Where the last file fails, nothing is left of the folder."""
        before = sorted(tmp_path.iterdir())

        def fail(_: Gpt2Model) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Gpt2Model, "card", fail)
        assert export.main(["-m", str(run.path), "--format", "gpt2", str(tmp_path / "x")]) == 1
        assert "No space left on device; free some space" in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before
