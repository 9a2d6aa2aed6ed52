"""Which run a user means: by its name, its folder or a file, or the likeliest where none is named."""

from __future__ import annotations

import difflib
from pathlib import Path

from picogpt.errors import RunError
from picogpt.runs.folder import LOG_FILE, MODEL_FILE, RunFolder

__all__ = ["find_log", "find_model", "resumable_runs"]

PRETRAINED = Path(__file__).resolve().parents[2] / "logs"
"""Where the trained models lie that come with picogpt; only a clone has them."""

_FIRST_CHOICE = "wikipedia"
"""The one of them that is taken where none is named."""


def find_model(name: str | None, logs_dir: Path) -> tuple[Path, str]:
    """The model that a user means, and a few words that say which one it is.

    Args:
        name: a run's name, its folder or a `.safetensors` file; None means the run of the user's own that was saved last,
            or else a model that came without a run to go on with, such as those that come with picogpt.
        logs_dir: where runs are kept.

    Raises:
        RunError: there is no such model, or none at all.
    """
    if name is not None:
        path = _find(name, logs_dir, MODEL_FILE)
        return path, f"model {path}"
    runs = _runs(logs_dir, MODEL_FILE)
    own = [run.path / MODEL_FILE for run in runs if not run.is_weights_only()]
    if own:
        path = max(own, key=lambda path: path.stat().st_mtime_ns)
        return path, f"model {path}" + (f", saved last of {len(own)}" if len(own) > 1 else "")
    finished = runs or _runs(PRETRAINED, MODEL_FILE)
    if not finished:
        raise RunError(f"{logs_dir}: no trained model there; train one with picogpt-train, or name one with --model")
    path = max(finished, key=lambda run: run.name == _FIRST_CHOICE).path / MODEL_FILE
    return path, f"model {path}, as there is no run of your own" + (f" under {logs_dir}" if runs else "")


def find_log(name: str, logs_dir: Path) -> Path:
    """The loss log that a user means by a run's name, its folder or the file itself.

    Raises:
        RunError: there is none.
    """
    return _find(name, logs_dir, LOG_FILE)


def resumable_runs(logs_dir: Path) -> list[str]:
    """Names of the runs under `logs_dir` that training can go on with, in order."""
    runs = [RunFolder(path) for path in sorted(logs_dir.glob("*")) if path.is_dir()]
    return [run.name for run in runs if run.has_checkpoint() or (run.has_config() and not run.has_model())]


def _find(name: str, logs_dir: Path, filename: str) -> Path:
    if not name or "\0" in name:
        raise RunError(f"{name!r}: not the name of a run")
    for path in (Path(name), Path(name) / filename, logs_dir / name / filename, PRETRAINED / name / filename):
        if path.is_file():
            return path
    runs = sorted({run.name for folder in (logs_dir, PRETRAINED) for run in _runs(folder, filename)})
    nearest = difflib.get_close_matches(name, runs, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"runs there: {', '.join(runs) or 'none'}"
    raise RunError(f"{name}: no such file, and no run of that name with a {filename} under {logs_dir}; {hint}")


def _runs(folder: Path, filename: str) -> list[RunFolder]:
    """The runs under `folder` that have such a file, by name."""
    return [RunFolder(path.parent) for path in sorted(folder.glob(f"*/{filename}")) if path.is_file()]
