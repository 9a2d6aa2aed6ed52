"""The shape of the package: imports go one way, heavy ones stay where they belong, and nothing can run code from a file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import picogpt

PACKAGE = Path(picogpt.__file__).parent
LAYERS = [
    {"errors", "signals", "threads", "wording"},
    {"roll", "config", "files", "uptime", "dropout", "scores", "device", "folding", "encodings", "rng"},
    {"attention", "kernels"},
    {"model", "tokenizer", "backend"},
    {"run", "data", "optim", "memory", "baselines"},
    {"engine", "original", "find", "ranks", "concurrent", "plot"},
    {"replica", "pacing"},
    {"train", "follow", "generate", "evaluate", "reference"},
    {"training", "evaluation"},
    {"cli"},
]
"""From the bottom to the top: a module may import those of lower layers, and its own package."""
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The module or sub-package of `picogpt` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported, anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    """No module imports one of its own layer or above."""
    if path == PACKAGE / "__init__.py":
        return
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "picogpt" and len(parts) > 1 and parts[1] != unit(path):
            assert RANK[parts[1]] < RANK[unit(path)], f"{unit(path)} imports {name}"


@pytest.mark.parametrize(
    ("library", "users"),
    [
        ("matplotlib", {"plot"}),
        (
            "torch",
            {
                "attention",
                "backend",
                "concurrent",
                "dropout",
                "kernels",
                "model",
                "optim",
                "device",
                "ranks",
                "replica",
                "train",
                "reference",
            },
        ),
        ("safetensors", {"run"}),
    ],
)
def test_libraries_stay_where_they_belong(library: str, users: set[str]) -> None:
    """Each heavy library is imported by the modules whose job it is, and no others."""
    found = {unit(path) for path in FILES for name in imports(ast.parse(path.read_text())) if name.split(".")[0] == library}

    assert found == users


def calls(tree: ast.AST) -> Iterator[str]:
    """What is called in a file, as `module.name` or `name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
            yield from (f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in node.keywords)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_runs_code_from_a_file(path: Path) -> None:
    """No unpickling without a guard, no evaluation, no shell."""
    forbidden = {"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "eval", "exec", "os.system", "shell=True"}

    tree = ast.parse(path.read_text())
    assert not forbidden & set(calls(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("Unpickler" in ast.unparse(base) for base in node.bases):
            assert unit(path) in {"run", "original"}
            assert "find_class" in {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            assert "super" not in set(calls(node)), "what find_class inherits imports"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_written_in_one_place(path: Path) -> None:
    """Outside `picogpt.files` nothing is opened for writing, but the lock, and nothing renamed."""
    if unit(path) == "files":
        return
    tree = ast.parse(path.read_text())
    modes = {
        argument.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("open")
        for argument in node.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }

    assert modes <= ({"rb", "r+b"} if unit(path) == "run" else {"rb"})
    names = set(calls(tree))
    assert not {name for name in names if name.rsplit(".", 1)[-1] in {"write_text", "write_bytes", "savez", "save_file"}}
    assert not names & {"os.rename", "os.replace"}
    assert "os.write" not in names
