"""Selection of the training files in a local folder, by the hub's rules for repositories.

Folder names are literal: `notes?` or `d::e` is never a pattern. Patterns occur only in the `configs` of a README.md, as in
repositories of the hub. The rules are reimplemented from the library `datasets`, because it expands patterns in folder names.
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

__all__ = ["COMPRESSIONS", "FORMATS", "format_of", "stem_of", "training_files"]

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
"""Format by file suffix, preferred formats first."""
COMPRESSIONS = (".gz", ".bz2", ".xz")
"""Compression suffixes, which may follow any format's suffix except those of parquet and arrow."""

# The hub's keywords per split, matched as whole words between separators or digits.
_KEYWORDS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}
_SPLITS = {split: re.compile(rf"(?:^|[-._ 0-9])(?:{words})(?:$|[-._ 0-9])") for split, words in _KEYWORDS.items()}
_NUMBERED = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
# Metadata files, which belong to no split.
_NOT_DATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---", re.DOTALL)


def training_files(folder: Path, config: str | None) -> tuple[str, list[Path]]:
    """Return the format and the files of the train split of the data set in `folder`, sorted by name.

    Args:
        folder: root of the data set.
        config: one of the configurations listed in its README.md, or None.

    Raises:
        DataError: there is no train split; the message names the splits found.
    """
    try:
        splits = _find_splits(folder, config)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read ({error.strerror}); check its permissions") from error
    files = splits.get("train", [])
    if not files:
        what = "no file matches the patterns of its train split" if "train" in splits else "it has no train split"
        others = ", ".join(split for split in splits if split != "train")
        raise DataError(f"{folder}: {what}" + (f"; it has {others}" if others else ""))
    # As on the hub, one data set has one format: the most frequent one, ties broken by the order of FORMATS.
    count = Counter(format_of(file) for file in files)
    chosen = max(dict.fromkeys(FORMATS.values()), key=lambda name: count[name])
    return chosen, [file for file in files if format_of(file) == chosen]


def format_of(file: Path) -> str | None:
    """Return the format of a file by its name, or None."""
    return FORMATS.get(_without_compression(file).suffix.lower())


def stem_of(file: Path) -> str:
    """Return the name of a data file without its suffixes."""
    return _without_compression(file).stem


def _without_compression(file: Path) -> Path:
    """Return the path without a compression suffix: x.jsonl.gz is a compressed x.jsonl."""
    return file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file


def _find_splits(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """Return the files of each split: as README.md lists them, else by file names."""
    configs = _listed_configs(folder)
    if config is None and len(configs) == 1:
        # A single configuration needs no name.
        chosen = next(iter(configs.values()))
    elif (config or "default") in configs:
        chosen = configs[config or "default"]
    elif configs or config is not None:
        raise DataError(
            f"{folder}: its README.md lists {'no configuration ' + config if config else 'several configurations'}; "
            f"name one as {folder}:CONFIG, of {', '.join(configs) or 'which it lists none'}"
        )
    else:
        return _split_by_names(folder)
    # data_dir moves the root; without data_files, splits below it are found by name.
    base = folder / _inside(folder, str(chosen.get("data_dir") or ""))
    if chosen.get("data_files") is None:
        return _split_by_names(base)
    # Patterns are relative to data_dir.
    return {split: _matching(base, patterns) for split, patterns in _patterns(folder, chosen["data_files"]).items()}


def _listed_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the configurations from the YAML front matter of README.md, by name."""
    import yaml

    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    # utf-8-sig drops a byte order mark; other bytes of the README do not matter here.
    front = _FRONT_MATTER.match(readme.read_text(encoding="utf-8-sig", errors="replace"))
    try:
        content = yaml.safe_load(front[1]) if front else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as February 30 is a bare ValueError
        raise DataError(f"{readme}: invalid YAML at its beginning ({_one_line(error)}); fix it, or move the file away") from error
    listed = content.get("configs") if isinstance(content, dict) else None
    if listed is None:
        return {}
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise DataError(f"{readme}: its configs are not a list of configurations; fix it, or move the file away")
    # An entry without a name is the default configuration.
    named = {str(entry.get("config_name", "default")): entry for entry in listed}
    # An entry marked `default: true` is chosen when the user names none.
    marked = [entry for entry in listed if entry.get("default")]
    return {**named, "default": marked[0]} if marked else named


def _patterns(folder: Path, data_files: Any) -> dict[str, list[str]]:
    """Return the patterns of each split.

    `data_files` may be a pattern, a list of patterns, a mapping of splits, or a list of {split, path} entries.
    """
    entries = data_files if isinstance(data_files, list) else [data_files]
    found: dict[str, list[str]] = {}
    for entry in entries:
        # Normalize every form to {split: patterns}.
        pairs = entry if isinstance(entry, dict) else {"train": entry}
        if "path" in pairs:
            pairs = {str(pairs.get("split", "train")): pairs["path"]}
        for split, paths in pairs.items():
            patterns = paths if isinstance(paths, list) else [paths]
            found.setdefault(str(split), []).extend(_inside(folder, str(pattern)) for pattern in patterns)
    return found


def _inside(folder: Path, path: str) -> str:
    """Return a path or pattern of the README unless it leads out of `folder`."""
    # A README must not make the reader open files elsewhere on the disk.
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise DataError(f"{folder / 'README.md'}: {path} is outside the folder; fix it, or move the file away")
    return path


def _matching(base: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files below `base` that match a pattern; `base` itself is taken literally."""
    # A pattern that names an existing file is that file, even if it contains glob characters.
    names = {
        name
        for pattern in patterns
        for name in ([pattern] if (base / pattern).is_file() else glob.glob(pattern, root_dir=base, recursive=True))  # noqa: PTH207 - root_dir keeps the folder's name literal
    }
    return sorted((base / name for name in names if _is_data(base, Path(name))), key=str)


def _split_by_names(base: Path) -> dict[str, list[Path]]:
    """Assign files to splits by the first of the hub's four rules that matches any file.

    In order: numbered shards (`data/train-00000-of-00003.parquet`), folder names, file names; else all files are train.
    """
    names = [path for path in _walk(base) if _is_data(base, path)]
    if not names:
        what = "no data files in it" if any(base.iterdir()) else "the folder is empty"
        raise DataError(f"{base}: {what}; a data set has files of {', '.join(FORMATS)} (for plain texts use --text)")
    # As soon as a rule finds one file, the others do not apply.
    for rule in (_by_number, _by_folder, _by_name, lambda _: "train"):
        # A file for which the rule returns None belongs to no split.
        splits: dict[str, list[Path]] = {}
        for path in names:
            if (split := rule(path)) is not None:
                splits.setdefault(split, []).append(base / path)
        if splits:
            break
    return splits


def _by_number(path: Path) -> str | None:
    """Match numbered shards: `data/train-00000-of-00003.parquet` gives train."""
    match = _NUMBERED.fullmatch(path.as_posix())
    return match[1] if match else None


def _by_folder(path: Path) -> str | None:
    """Match folder names: `x/train/y.csv` gives train."""
    return next((split for split in _SPLITS if any(map(_SPLITS[split].search, path.parts[:-1]))), None)


def _by_name(path: Path) -> str | None:
    """Match file names: `my-train-1.csv` gives train."""
    return next((split for split in _SPLITS if _SPLITS[split].search(path.name)), None)


def _walk(base: Path) -> Iterator[Path]:
    """Return all files below `base`, as sorted relative paths, without hidden folders and `__pycache__` and the like."""
    found = []
    for folder, folders, files in os.walk(base, onerror=_fail):
        # Assigning to the slice prunes os.walk.
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [(Path(folder) / name).relative_to(base) for name in files]
    return iter(sorted(found, key=lambda path: path.as_posix()))


def _fail(error: OSError) -> None:
    """Raise errors of os.walk, which ignores them by default."""
    raise error


def _is_data(base: Path, path: Path) -> bool:
    """Whether the file at `path`, relative to `base`, can be a data file."""
    # A leading dot hides files and folders; a leading __ hides only folders.
    hidden = any(part.startswith(".") for part in path.parts) or any(part.startswith("__") for part in path.parts[:-1])
    return not hidden and path.name not in _NOT_DATA and format_of(path) is not None and (base / path).is_file()


def _one_line(error: BaseException) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split())
