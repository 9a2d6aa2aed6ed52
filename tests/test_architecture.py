"""The shape of the package: imports go one way, heavy ones stay where they belong, and nothing can run code from a file."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import picogpt

PACKAGE = Path(picogpt.__file__).parent
LAYERS = [
    {"errors", "signals", "stdio", "threads", "uptime", "wording"},
    {"checks", "device", "encodings", "files", "folding", "ids", "rng"},
    {"alphabet"},
    {"config"},
    {"schedule"},
    {"kernels", "tokenizer"},
    {"model"},
    {"backend", "data", "runs"},
    {"inference"},
    {"evaluation"},
    {"api", "export", "plot"},
    {"training"},
    {"cli"},
]
"""From the bottom to the top: a module may import those of lower layers, and its own package."""
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The module or sub-package of `picogpt` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    """A file's name within `picogpt`, with dots: `training.trainer`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def is_module(name: str) -> bool:
    """Whether `name`, which begins with `picogpt.`, is one of its modules or packages."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported, anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            # What is imported from a package may be a module of it.
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in names if name.startswith("picogpt.") and is_module(name))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    """No module imports one of its own layer or above."""
    if path == PACKAGE / "__init__.py":
        return
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "picogpt" and len(parts) > 1 and parts[1] != unit(path):
            assert RANK[parts[1]] < RANK[unit(path)], f"{unit(path)} imports {name}"


def test_no_cycles() -> None:
    """Within a package too, imports go one way."""
    names = {module(path).removesuffix(".__init__") for path in FILES}
    graph = {
        module(path).removesuffix(".__init__"): {
            name.removeprefix("picogpt.")
            for name in imports(ast.parse(path.read_text()))
            if name.removeprefix("picogpt.") in names
        }
        for path in FILES
    }

    assert tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("library", "users"),
    [
        ("matplotlib", {"plot"}),
        (
            "torch",
            {
                "backend",
                "device",
                "kernels.autograd",
                "kernels.compiled",
                "kernels.workspace",
                "model.accelerate",
                "model.attention",
                "model.dropout",
                "model.gpt",
                "training.averaging",
                "training.concurrent",
                "training.data_parallel",
                "training.distributed",
                "training.history",
                "training.optim",
                "training.rank_zero",
                "training.state",
                "training.trainer",
            },
        ),
        ("safetensors", {"runs.checkpoint", "runs.tensor_file"}),
    ],
)
def test_libraries_stay_where_they_belong(library: str, users: set[str]) -> None:
    """Each heavy library is imported by the modules whose job it is, and no others."""
    found = {module(path) for path in FILES for name in imports(ast.parse(path.read_text())) if name.split(".")[0] == library}

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
            assert module(path) in {"runs.import_original", "runs.loss_log"}
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
        for argument in [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }

    assert modes <= ({"rb", "r+b"} if module(path) == "runs.folder" else {"rb"})
    names = set(calls(tree))
    assert not {name for name in names if name.rsplit(".", 1)[-1] in {"write_text", "write_bytes", "savez", "save_file"}}
    assert not names & {"os.rename", "os.replace"}
    assert "os.write" not in names
