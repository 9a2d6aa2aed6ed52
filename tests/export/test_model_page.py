"""The page that runs a model in a browser: its size, its safety, and that it computes what the engine computes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picogpt.cli import export
from picogpt.config import Fold, GPTConfig, TextConfig
from picogpt.export.model_page import ModelView, quantize_rows, render_model_page
from picogpt.inference import Engine
from picogpt.inference.decoder import RollingDecoder
from picogpt.runs.loss_log import LossLog
from picogpt.runs.model_file import open_model
from tests.browser import Browser
from tests.conftest import TINY
from tests.export.page_model import arrays_of, content_of, dequantized, view

ROOT = Path(__file__).parents[2]
WIKIPEDIA = ROOT / "logs" / "wikipedia" / "model.safetensors"
ENGINE = ROOT / "picogpt" / "export" / "engine.js"
HOSTILE = "</script><script>document.title = 'run'</script> \"quotes\" & <b>\u202e\U0001f600"
PROMPTS = ["the history of ", "in 1984, the river\n", "she said that "]
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
needs_wikipedia = pytest.mark.skipif(not WIKIPEDIA.exists(), reason="needs the bundled model")


@pytest.fixture(scope="module")
def wikipedia() -> str:
    """The page of the bundled model."""
    with open_model(WIKIPEDIA) as model:
        return render_model_page(ModelView(name="wikipedia", config=model.config, arrays=model.weights, text=model.text))


def test_quantize_rows() -> None:
    """The largest of a row becomes 127, halves go to the even neighbour, and a row of zeros stays one."""
    values, scales = quantize_rows(np.array([[1.27, -0.635, 0.01], [0, 0, 0]], np.float32))

    assert values.tolist() == [[127, -64, 1], [0, 0, 0]]
    assert scales.tolist() == pytest.approx([0.01, 0])


def test_weights_come_back() -> None:
    """Each weight is within half a step of int8, or within the rounding of bfloat16."""
    arrays, found = arrays_of(), dequantized(render_model_page(view()))

    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        kept = array.ndim == 1
        bound = 0 if kept else np.abs(array).max() * (0.5 / 127 + 1e-6)
        assert np.abs(found[name] - array).max() <= bound, name


def test_weights_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser holds each part's text in one piece, and the parts together are the weights."""
    whole = content_of(render_model_page(view()))
    monkeypatch.setattr("picogpt.export.model_page._PART", 300)
    page = render_model_page(view())

    assert content_of(page) == whole
    assert len(whole[1]) == whole[0]["size"]
    assert page.count('class="weights">') == math.ceil(len(whole[1]) / 300)
    assert {len(part) for part in re.findall(r'class="weights">(.*?)<', page)[:-1]} == {400}


def test_size_of_a_tiny_model() -> None:
    """What surrounds the weights is below 120 kB."""
    assert len(render_model_page(view()).encode()) < 120_000


@needs_wikipedia
def test_size_of_the_full_model(wikipedia: str) -> None:
    """It is below 9 MB."""
    assert len(wikipedia.encode()) < 9_000_000


@pytest.mark.parametrize(
    ("fold", "spelled"),
    [(False, {}), (True, {"é": "e", "—": "-"}), ("latin", {"é": "e", "—": "-", "Щ": "Shch", "中": "Zhong", "ا": ""})],
    ids=["not folded", "folded", "transliterated"],
)
def test_folding(fold: Fold, spelled: dict[str, str]) -> None:
    """The page reads a prompt as the model's texts were read; of a transliterating model the table is below 1 MB."""
    page = render_model_page(view(text=TextConfig(fold=fold, ids=(1,))))
    table = content_of(page)[0]["folding"]

    assert {character: table[character] for character in "é—Щ中ا" if character in table} == spelled
    assert len(page.encode()) < (120_000 if fold != "latin" else 1_000_000)


def test_safety() -> None:
    """A hostile name is text; a policy forbids the network, and no address stands in the page."""
    page = render_model_page(view(name=HOSTILE))

    assert page.count("<script") == 5
    assert "<b>" not in page
    assert "default-src 'none'; script-src 'unsafe-inline' 'wasm-unsafe-eval'; worker-src blob:" in page
    assert not re.search(r"https?://|\bsrc=|@import|url\(|fetch\(|localStorage|sessionStorage|indexedDB", page)


def test_introduction() -> None:
    """The page says how large the model is; a model without biases has fewer parameters."""
    arrays = arrays_of()
    without = {name: array for name, array in arrays.items() if not name.endswith("bias")}
    for kept, bias in ((arrays, True), (without, False)):
        page = render_model_page(view(arrays=kept, config=dataclasses.replace(TINY, bias=bias)))
        count = sum(array.size for array in kept.values())

        assert "<h1>A small writing model: tiny</h1>" in page
        assert "It knows no facts; it makes up text that looks" in page
        assert f"{count:,} parameters, 2 layers, 2 heads, width 16, windows of 8 characters" in page


def test_curve() -> None:
    """The loss curve is there where the run has a log."""
    log = LossLog(train=[3.0, 2.0], val=[2.9, 2.1], chars=[10, 20], seconds=[1.0, 2.0])

    page = render_model_page(view(log=log))
    assert 'class="curve val"' in page
    assert "the loss: average surprise per character, in nats" in page
    assert "There is no loss log" in render_model_page(view())


WRITE_GREEDILY = """
function writeGreedily(engine, header, buffer, prompts, count) {
  const model = engine.readModel(header, buffer);
  return prompts.map(prompt => {
    const reader = new engine.Reader(model), ids = [], logits = [];
    reader.read(Array.from(prompt, character => header.characters.indexOf(character)));
    for (let i = 0; i < count; i++) {
      logits.push(Array.from(reader.logits, logit => Number(logit.toFixed(5))));
      ids.push(engine.draw(reader.logits, { temperature: 0, topK: 0, never: header.never }, 0));
      reader.read(ids.slice(-1));
    }
    return { ids, logits };
  });
}
"""


def check_against_numpy(page: str, config: GPTConfig, results: list[dict[str, Any]], prompts: list[str]) -> None:
    """Greedy text is that of the numpy engine with the page's own weights, and logits differ by at most 1e-3."""
    header, _ = content_of(page)
    engine = Engine(config, dequantized(page))
    for prompt, result in zip(prompts, results, strict=True):
        decoder = RollingDecoder(engine, header["hop"])
        logits = decoder.prefill(np.array([[header["characters"].index(c) for c in prompt]], np.uint8))
        for token, found in zip(result["ids"], result["logits"], strict=True):
            assert np.abs(logits[0] - found).max() <= 1e-3
            allowed = logits[0].copy()
            allowed[header["never"]] = -np.inf
            assert token == allowed.argmax()
            logits = decoder.prefill(np.array([[token]], np.uint8))


def run_node(program: str) -> Any:
    """What a program that has `engine` prints as JSON."""
    done = subprocess.run(
        ["node", "-"],
        input=f"const engine = require({str(ENGINE)!r});\n{program}",
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return json.loads(done.stdout)


PLAIN = "globalThis.WebAssembly = undefined;"
"""A browser without WebAssembly."""


@needs_node
@pytest.mark.parametrize("first", ["", PLAIN], ids=["WebAssembly", "JavaScript"])
@pytest.mark.parametrize(("width", "heads"), [(16, 2), (12, 2), (10, 2), (9, 3)])
def test_tiny_model_in_node(first: str, width: int, heads: int, tmp_path: Path) -> None:
    """Across many windows of 8 the text is that of the numpy engine, also for widths that are no multiple of 8, 4 or 2."""
    config = dataclasses.replace(TINY, n_embd=width, n_head=heads)
    page = render_model_page(view(config=config, arrays=arrays_of(config)))
    header, weights = content_of(page)
    (tmp_path / "weights").write_bytes(weights)
    results = run_node(
        f"{first}\n{WRITE_GREEDILY}\nconst bytes = require('fs').readFileSync({str(tmp_path / 'weights')!r});\n"
        "const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);\n"
        f"console.log(JSON.stringify(writeGreedily(engine, {json.dumps(header)}, buffer, {json.dumps(PROMPTS)}, 100)));"
    )

    check_against_numpy(page, config, results, PROMPTS)


@needs_node
def test_gelu_in_node() -> None:
    """GELU is exact to 1e-6."""
    from math import erf, sqrt

    points = np.linspace(-15, 15, 3001).tolist()
    found = run_node(f"console.log(JSON.stringify({json.dumps(points)}.map(engine.gelu)));")

    assert found == pytest.approx([x * (1 + erf(x / sqrt(2))) / 2 for x in points], abs=1e-6)


@needs_node
def test_draw_in_node() -> None:
    """Greedy takes the first of equals; top-k keeps the likeliest; ids that are never drawn are not; a seed's series is fixed."""
    program = """
    const logits = [1, 3, 3, 2], draw = (settings, number) => engine.draw(logits, { temperature: 1, topK: 0, never: [], ...settings }, number);
    console.log(JSON.stringify([draw({ temperature: 0 }, 0.9), draw({ topK: 1 }, 0.99), draw({ topK: 2 }, 0.99), draw({ never: [1, 2], topK: 1 }, 0),
      draw({}, 0), draw({}, 0.999), engine.windowSpans(10, 4), engine.numberAt(7, 3) === engine.numberAt(7, 3)]));
    """

    assert run_node(program) == [1, 1, 2, 3, 0, 3, [[0, 2], [2, 6], [6, 10]], True]


@needs_wikipedia
@pytest.mark.slow
@pytest.mark.parametrize("first", ["", PLAIN], ids=["WebAssembly", "JavaScript"])
def test_greedy_text_in_a_browser(first: str, wikipedia: str, tmp_path: Path, browser: Browser) -> None:
    """500 characters from three prompts are those of the numpy engine with the same int8 weights."""
    path = tmp_path / "page.html"
    # The page drops the text of its weights once they are read.
    keep = (
        "<script>const kept = [...document.querySelectorAll('.weights')].map(part => atob(part.textContent)).join('');</script>"
    )
    path.write_text(wikipedia.replace('<script id="engine">', f'{keep}\n<script id="engine">'))
    with browser.tab(script=first) as tab:
        tab.open(path)
        tab.evaluate(WRITE_GREEDILY)
        buffer = "Uint8Array.from(kept, character => character.charCodeAt(0)).buffer"
        results = tab.evaluate(f"writeGreedily(PicoEngine, header, {buffer}, {json.dumps(PROMPTS)}, 500)")
        assert tab.complaints() == []

    with open_model(WIKIPEDIA) as stored:
        check_against_numpy(wikipedia, stored.config, results, PROMPTS)


class TestCommand:
    def test_writes_a_page(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The path goes to stdout; the model and the size go to stderr."""
        page = tmp_path / "x.html"
        if not WIKIPEDIA.exists():
            pytest.skip("needs the bundled model")
        assert export.main(["-m", str(WIKIPEDIA), str(page)]) == 0

        out, err = capsys.readouterr()
        assert out == f"{page}\n"
        assert re.search(r"model .*: 8\.\d\d MB written; open it in a browser", err)
        assert page.read_text().startswith("<!DOCTYPE html>")

    @pytest.mark.parametrize(
        ("page", "message"),
        [
            ("x.txt", "PAGE must end in .html, got 'x.txt'"),
            ("nowhere/x.html", "PAGE: there is no folder nowhere; create it first"),
            ("folder.html", "PAGE: folder.html cannot be written; choose another file"),
        ],
    )
    def test_wrong_page(
        self, page: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A page that cannot be written is one line, before the work."""
        monkeypatch.chdir(tmp_path)
        Path("folder.html").mkdir()

        assert export.main([page]) == 2
        assert capsys.readouterr().err == f"picogpt-export: {message}\n"

    def test_no_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A run that is not there is one line."""
        assert export.main(["-m", "nowhere", str(tmp_path / "x.html"), "--logs-dir", str(tmp_path)]) == 1
        assert "picogpt-export: nowhere: no such file, and no run of that name" in capsys.readouterr().err
