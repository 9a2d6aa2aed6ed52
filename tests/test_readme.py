"""What the README and the docs promise: the commands they name exist with these flags, and a wheel has what they need."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import picogpt
from picogpt.cli import eval as evaluation
from picogpt.cli import export, generate, plot, train
from picogpt.cli.parser import Parser
from tests.programs import program

ROOT = Path(__file__).parents[1]
PARSERS = {
    "picogpt-train": train.build_parser(),
    "picogpt-generate": generate.build_parser(),
    "picogpt-eval": evaluation.build_parser(),
    "picogpt-plot": plot.build_parser(),
    "picogpt-export": export.build_parser(),
}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MEASUREMENTS = sorted((ROOT / "docs" / "measurements").glob("*.md"))
LINKING = [*DOCUMENTS, *MEASUREMENTS, *sorted((ROOT / "logs").glob("*/README.md"))]


def commands() -> list[tuple[Parser, list[str]]]:
    """Every picogpt command in a code block of the documents."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", "\n".join(path.read_text() for path in DOCUMENTS), re.DOTALL):
        for line in block.splitlines():
            for part in re.split(r"&&|\||>", line):
                words = shlex.split(part, comments=True)
                if words and words[0] in PARSERS:
                    found.append((PARSERS[words[0]], words[1:]))
    return found


@pytest.mark.parametrize(("parser", "flags"), commands(), ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_documented_commands_parse(parser: Parser, flags: list[str]) -> None:
    """Each command of the documents is one that the parser takes."""
    if "--help" not in flags:
        parser.parse(flags)


def test_there_are_documented_commands() -> None:
    """The search above finds them."""
    assert len(commands()) >= 8


@pytest.mark.parametrize("document", LINKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link and picture of the documents exists."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())

    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_measurements_are_listed_newest_first() -> None:
    """The list of measurements names each page once, by date."""
    listed = re.findall(r"\]\((\d{4}-\d\d-\d\d-\S+\.md)\)", (ROOT / "docs" / "measurements" / "README.md").read_text())

    assert sorted(listed) == [path.name for path in MEASUREMENTS if path.name != "README.md"]
    assert [name[:10] for name in listed] == sorted((name[:10] for name in listed), reverse=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, it trains on its own copy of the sample play and goes on from a prompt."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    tiny = ["--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--context-len", "8", "--epochs", "1", "--steps-per-epoch", "2"]

    def call(module: str, *flags: str) -> str:
        command = program("run_from", str(site), module, *flags)
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    assert "epoch 1 of 1" in call("train", "--dataset", "sample", "--threads", "1", *tiny)
    assert call("generate", "-p", "Margery:", "-n", "5").startswith("margery:")
    assert (site / "picogpt" / "py.typed").exists()
    sources = [{path.name for path in (place / "picogpt" / "kernels" / "csrc").glob("*.[ch]")} for place in (site, ROOT)]
    pages = [{path.name for path in (place / "picogpt" / "export").glob("log_page.*")} for place in (site, ROOT)]
    assert sources[0] == sources[1] > {"block.c", "simd.h"}
    assert pages[0] == pages[1] > {"log_page.html", "log_page.css", "log_page.js"}


@pytest.mark.slow
def test_wheel_has_the_wikipedia_model(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, it writes in an empty folder, from the shell and from Python; no command writes into the package."""
    site, model = tmp_path / "site", ROOT / "logs" / "wikipedia" / "model.safetensors"
    zipfile.ZipFile(wheel).extractall(site)
    before = set(site.rglob("*"))
    here = tmp_path / "empty"
    here.mkdir()

    def run(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=here, env=environment)
        return done.stdout.rstrip("\n")

    prompt = "the history of"
    text = prompt + picogpt.load(model).generate(prompt, max_new_tokens=40, seed=1)
    code = f"import picogpt; print({prompt!r} + picogpt.load('wikipedia').generate({prompt!r}, max_new_tokens=40, seed=1))"
    play = str(ROOT / "dataset" / "sample.txt")
    assert run(*program("run_from", str(site), "generate", "-p", prompt, "-n", "40", "-s", "1")) == text
    assert run(sys.executable, "-c", code) == text
    scored = ["-m", "wikipedia", "--text", play, "--chars", "2560", "--json"]
    assert json.loads(run(*program("run_from", str(site), "eval", *scored)))["picture"] == "wikipedia-eval.jpg"
    assert run(*program("run_from", str(site), "plot", "wikipedia")) == "wikipedia-log.jpg"
    assert run(*program("run_from", str(site), "export", "-m", "wikipedia", "page.html")) == "page.html"
    assert {path.name for path in here.iterdir()} == {"wikipedia-eval.jpg", "wikipedia-log.jpg", "page.html"}
    assert set(site.rglob("*")) == before
    packaged = site / "picogpt" / "pretrained" / "wikipedia"
    assert (packaged / "model.safetensors").read_bytes() == model.read_bytes()
    assert {path.name for path in packaged.iterdir()} == {"README.md", "config.json", "log.jpg", "log.pkl", "model.safetensors"}


@pytest.mark.parametrize("script", ["train.py", "infer.py", "eval.py"])
def test_scripts_work_from_a_clone(script: str, tmp_path: Path) -> None:
    """The wrappers find the package beside them, wherever they are started."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "--version"], check=True, capture_output=True, cwd=tmp_path
    )

    assert done.stdout.startswith(b"picogpt ")


PROGRAMS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_of_the_python_page(code: str, tmp_path: Path) -> None:
    """Each block of docs/python.md is a whole program that runs and prints something."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, cwd=tmp_path, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_there_are_programs() -> None:
    """The search above finds them."""
    assert len(PROGRAMS) == 5
