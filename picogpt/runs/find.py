"""Names of runs and models resolved to files, and the most likely model if none is named."""

from __future__ import annotations

from pathlib import Path

from picogpt.errors import RunError
from picogpt.runs.names import LOG_FILE, MODEL_FILE, has_checkpoint
from picogpt.wording import did_you_mean

__all__ = ["find_log", "find_model", "picture_path"]

# A wheel has the Wikipedia model inside the package; a clone has all bundled models in its `logs` folder.
_PACKAGED = Path(__file__).resolve().parents[1] / "pretrained"
PRETRAINED = _PACKAGED if _PACKAGED.is_dir() else _PACKAGED.parents[1] / "logs"
"""Folder of the bundled models."""

_FIRST_CHOICE = "wikipedia"  # the default among the bundled models


def find_model(name: str | None, logs_dir: Path) -> tuple[Path, str]:
    """Return the path of a model, and a phrase for the user that says which model was chosen.

    Args:
        name: a run's name, its folder or a `.safetensors` file; None takes the user's most recently saved run,
            or else a model without a checkpoint to resume, such as the bundled ones.
        logs_dir: folder of all runs.

    Raises:
        RunError: there is no such model, or no model at all.
    """
    if name is not None:
        path = _find(name, logs_dir, MODEL_FILE)
        return path, f"model {path}"
    runs = _runs(logs_dir, MODEL_FILE)
    # Runs with a checkpoint were trained here; others are imported, copied or bundled.
    own = [run / MODEL_FILE for run in runs if has_checkpoint(run)]
    if own:
        path = max(own, key=lambda path: path.stat().st_mtime_ns)
        return path, f"model {path}" + (f", saved last of {len(own)}" if len(own) > 1 else "")
    # A clone's own logs folder is PRETRAINED, so without a run of the user `runs` may hold the bundled models already.
    finished = runs or _bundled(MODEL_FILE)
    if not finished:
        raise RunError(f"{logs_dir}: no trained model there; train one with picogpt-train, or name one with --model")
    # max takes the first of equals: the default model if it is there, else the first by name.
    path = max(finished, key=lambda run: run.name == _FIRST_CHOICE) / MODEL_FILE
    return path, f"model {path}, as there is no run of your own" + (f" under {logs_dir}" if runs else "")


def find_log(name: str, logs_dir: Path) -> Path:
    """Return the path of a loss log, given a run's name, its folder or the file itself.

    Raises:
        RunError: there is no such log.
    """
    return _find(name, logs_dir, LOG_FILE)


def picture_path(found: Path, filename: str) -> Path:
    """Return the default path of a run's picture: next to the file `found`, in the working directory for a bundled model."""
    # Files of a package belong to pip, and those of a clone to git.
    is_bundled = found.resolve().parent in _bundled(found.name)
    return Path(f"{found.parent.name}-{filename}") if is_bundled else found.with_name(filename)


def _find(name: str, logs_dir: Path, filename: str) -> Path:
    if not name or "\0" in name:  # system calls raise ValueError for a null byte
        raise RunError(f"{name!r}: not the name of a run")
    # A path goes before a name, and the user's runs before the bundled ones.
    bundled = {run.name: run / filename for run in _bundled(filename)}
    for path in (Path(name), Path(name) / filename, logs_dir / name / filename, bundled.get(name)):
        if path is not None and path.is_file():
            return path
    for run in (Path(name), logs_dir / name):
        if has_checkpoint(run):
            raise RunError(f"{run}: no {filename} before the end of the first epoch; picogpt-train --run {run.name} trains on")
    runs = sorted({run.name for run in _runs(logs_dir, filename)} | bundled.keys())
    hint = did_you_mean(name, runs) or f"runs there: {', '.join(runs) or 'none'}"
    raise RunError(f"{name}: no such file, and no run of that name with a {filename} under {logs_dir}; {hint}")


def _bundled(filename: str) -> list[Path]:
    """Return the folders of the bundled models that contain `filename`, sorted by name."""
    # In a clone runs of its user are beside them, which `--logs-dir` must not find by name.
    return [run for run in _runs(PRETRAINED, filename) if not has_checkpoint(run)]


def _runs(folder: Path, filename: str) -> list[Path]:
    """Return the folders of the runs under `folder` that contain `filename`, sorted by name."""
    # A hidden folder is a forecast's, which tries out the end of an epoch.
    return [path.parent for path in sorted(folder.glob(f"*/{filename}")) if path.is_file() and path.parent.name[0] != "."]
