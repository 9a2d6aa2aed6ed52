"""Which files of a local folder are for training, by the rules that the hub has for a repository.

Names are literal: a folder called `notes?` or `d::e` is itself, never a pattern. Patterns are read only in a README.md that lists
`configs`, as repositories of the hub have it. The rules are those of the library `datasets`, which takes the names of folders
for patterns and so cannot be asked.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from picogpt.errors import DataError

__all__ = ["COMPRESSIONS", "FORMATS", "format_of", "training_files"]

FORMATS: Mapping[str, str] = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
"""Formats by a file's last suffix, the preferred ones first."""
COMPRESSIONS = (".gz", ".bz2", ".xz")
"""Suffixes that may follow those of a format but parquet and arrow."""

_KEYWORDS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}
_SPLITS = {split: re.compile(rf"(?:^|[-._ 0-9])(?:{words})(?:$|[-._ 0-9])") for split, words in _KEYWORDS.items()}
_NUMBERED = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_NOT_DATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---", re.DOTALL)


def training_files(folder: Path, config: str | None) -> tuple[str, list[Path]]:
    """Format and files of the part `train` of the data set in `folder`, sorted by name.

    Args:
        folder: where it is.
        config: one of the configurations that its README.md lists, or None.

    Raises:
        DataError: there is nothing to train on; the message names what there is.
    """
    try:
        splits = _find_splits(folder, config)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read ({error.strerror}); check its permissions") from error
    files = splits.get("train", [])
    if not files:
        raise DataError(f"{folder}: it has no files of a part named train; there are {', '.join(splits)}")
    # As on the hub, files of one format make a data set: the commonest one, and of two the one that is listed first.
    count = Counter(format_of(file) for file in files)
    chosen = max(dict.fromkeys(FORMATS.values()), key=lambda name: count[name])
    return chosen, [file for file in files if format_of(file) == chosen]


def format_of(file: Path) -> str | None:
    """The format of a file by its name, or None."""
    name = file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file
    return FORMATS.get(name.suffix.lower())


def _find_splits(folder: Path, config: str | None) -> dict[str, list[Path]]:
    configs = _listed_configs(folder)
    if config is None and len(configs) == 1:
        chosen = next(iter(configs.values()))
    elif config in configs or "default" in configs:
        chosen = configs[config or "default"]
    elif configs or config is not None:
        raise DataError(
            f"{folder}: its README.md lists {'no part ' + config if config else 'several parts'}; name one as {folder}:PART, "
            f"of {', '.join(configs) or 'which it lists none'}"
        )
    else:
        return _split_by_names(folder)
    base = folder / str(chosen.get("data_dir") or "")
    if chosen.get("data_files") is None:
        return _split_by_names(base)
    return {split: _matching(base, patterns) for split, patterns in _patterns(folder, chosen["data_files"]).items()}


def _listed_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations that README.md lists in the YAML at its beginning, by name."""
    import yaml

    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    front = _FRONT_MATTER.match(readme.read_text(encoding="utf-8-sig", errors="replace"))
    try:
        content = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError as error:
        raise DataError(
            f"{readme}: the YAML at its beginning is damaged ({_one_line(error)}); mend it, or move it away"
        ) from error
    listed = content.get("configs") if isinstance(content, dict) else None
    if listed is None:
        return {}
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise DataError(f"{readme}: its configs are no list of parts; mend it, or move it away")
    named = {str(entry.get("config_name", "default")): entry for entry in listed}
    marked = [entry for entry in listed if entry.get("default")]
    return {**named, "default": marked[0]} if marked else named


def _patterns(folder: Path, data_files: Any) -> dict[str, list[str]]:
    """Patterns of each split, from any of the forms that a README.md may list them in."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    found: dict[str, list[str]] = {}
    for entry in entries:
        pairs = entry if isinstance(entry, dict) else {"train": entry}
        if "path" in pairs:
            pairs = {str(pairs.get("split", "train")): pairs["path"]}
        for split, paths in pairs.items():
            found.setdefault(str(split), []).extend(map(str, paths if isinstance(paths, list) else [paths]))
    for pattern in (pattern for patterns in found.values() for pattern in patterns):
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise DataError(f"{folder / 'README.md'}: {pattern} is outside of the folder; mend it, or move it away")
    return found


def _matching(base: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of `base` that a list of patterns means; the pattern alone is one, the folder's own name is not."""
    names = {
        name
        for pattern in patterns
        for name in ([pattern] if (base / pattern).is_file() else glob.glob(pattern, root_dir=base, recursive=True))  # noqa: PTH207 - root_dir keeps the folder's name literal
    }
    return sorted((base / name for name in names if _is_data(base, Path(name))), key=str)


def _split_by_names(base: Path) -> dict[str, list[Path]]:
    """The files of each split, by the first of the hub's four rules that finds one; the last one takes all files."""
    names = [path for path in _walk(base) if _is_data(base, path)]
    if not names:
        what = "no file of a data set in it" if any(base.iterdir()) else "the folder is empty"
        raise DataError(f"{base}: {what}; a data set is files of {', '.join(FORMATS)} (for plain texts there is --text)")
    for rule in (_by_number, _by_folder, _by_name, lambda _: "train"):
        splits: dict[str, list[Path]] = {}
        for path in names:
            if (split := rule(path)) is not None:
                splits.setdefault(split, []).append(base / path)
        if splits:
            break
    return splits


def _by_number(path: Path) -> str | None:
    """Of `data/train-00000-of-00003.parquet`, train."""
    match = _NUMBERED.fullmatch(path.as_posix())
    return match[1] if match else None


def _by_folder(path: Path) -> str | None:
    """Of `x/train/y.csv`, train."""
    return next((split for split in _SPLITS if any(map(_SPLITS[split].search, path.parts[:-1]))), None)


def _by_name(path: Path) -> str | None:
    """Of `my-train-1.csv`, train."""
    return next((split for split in _SPLITS if _SPLITS[split].search(path.name)), None)


def _walk(base: Path) -> Iterator[Path]:
    """All files below `base`, relative to it, sorted; hidden folders and those of `__` are left out."""
    found = []
    for folder, folders, files in os.walk(base, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [(Path(folder) / name).relative_to(base) for name in files]
    return iter(sorted(found, key=lambda path: path.as_posix()))


def _fail(error: OSError) -> None:
    raise error


def _is_data(base: Path, path: Path) -> bool:
    """Whether the file at `path`, relative to `base`, can be part of a data set."""
    hidden = any(part.startswith(".") for part in path.parts) or any(part.startswith("__") for part in path.parts[:-1])
    return not hidden and path.name not in _NOT_DATA and format_of(path) is not None and (base / path).is_file()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
