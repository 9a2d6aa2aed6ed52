"""Validation of values from users: names, ranges, numbers written as text, and files to write. The messages quote the value."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

from picogpt.errors import ConfigError

__all__ = [
    "ATTENTIONS",
    "DEVICES",
    "DTYPES",
    "ENGINE_DTYPES",
    "KERNELS",
    "MAX_THREADS",
    "X_AXES",
    "check_choice",
    "check_new_folder",
    "check_page",
    "check_picture",
    "check_run_name",
    "check_text_column",
    "check_threads",
    "parse_count",
    "parse_new_tokens",
    "require",
    "require_between",
    "require_whole",
]

DTYPES = ("auto", "float32", "bfloat16")
"""Types of the GEMMs in training; auto is the faster one on this machine."""
# int8 is for inference only: groups of inputs share a quantization scale.
ENGINE_DTYPES = ("auto", "float32", "bfloat16", "int8")
"""Types of the weights in the inference engine; auto is bfloat16, the bundled models' type, or float32 without a C compiler."""
# mps is Apple's GPU.
DEVICES = ("auto", "cpu", "cuda", "mps")
"""Devices for training; auto is a CUDA GPU if there is one, else the CPU."""
KERNELS = ("auto", "c", "torch")
"""Kernels of the blocks on a CPU: native ones in C, compiled for the model, or torch's; auto is C if it is supported."""
X_AXES: Mapping[str, str] = MappingProxyType(
    {"epochs": "epoch", "characters": "characters trained on (millions)", "seconds": "seconds of training"}
)
"""Units of the x axis of a loss curve, and their labels."""
ATTENTIONS = ("fused", "products")
"""Implementations of attention in torch: scaled_dot_product_attention, or batched GEMMs with a softmax between them."""
MAX_THREADS = 1024  # far more than cores; a larger number is a mistake that could exhaust the system

# Excludes path separators and a dash in front, which would be a flag.
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def require(ok: bool, name: str, allowed: str, value: object) -> None:
    """Raise `ConfigError` for a setting unless `ok`.

    Args:
        ok: whether the value is valid.
        name: name of the setting.
        allowed: valid range, in words.
        value: the value.

    Raises:
        ConfigError: `ok` is false.
    """
    if not ok:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}", name)


def require_whole(name: str, value: object, minimum: int) -> None:
    """Check that a setting is an integer of at least `minimum`.

    Raises:
        ConfigError: the value is something else.
    """
    # bool is a subclass of int, but True layers are a mistake.
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    require(ok, name, f"a whole number of at least {minimum}", value)


def require_between(name: str, value: float, low: float, high: float, allowed: str) -> None:
    """Check that a setting is a finite number from `low` to `high`; `allowed` is the range in words.

    Raises:
        ConfigError: the value is out of range, infinite or NaN.
    """
    require(math.isfinite(value) and low <= value <= high, name, allowed, value)


def check_run_name(name: str) -> str:
    """Return `name` if it is valid as the name of a run.

    Raises:
        ConfigError: the name could be mistaken for a path or a flag.
    """
    require(bool(_RUN_NAME.fullmatch(name)), "run", "1 to 64 letters, digits, '.', '_' or '-', a letter or digit first", name)
    return name


def check_choice(field: str, name: str | None, choices: Collection[str]) -> str | None:
    """Return `name` if it is one of `choices` or None.

    Raises:
        ConfigError: it is another name; the message names `field`.
    """
    # None is a flag that was not given.
    require(name is None or name in choices, field, f"one of {', '.join(choices)}", name)
    return name


def check_text_column(name: str | None, *, streamed: bool) -> str | None:
    """Return `name`, the text column of a data set, or None.

    Raises:
        ConfigError: a column is given for a text that is not `streamed` and so has no columns.
    """
    if name is not None and not streamed:
        raise ConfigError("text_column is for a streamed data set; name one with --dataset, or leave it out", "text_column")
    return name


def check_threads(count: int | None) -> int | None:
    """Return `count` if it is a valid number of threads or None.

    Raises:
        ConfigError: the number is out of range.
    """
    require(count is None or 1 <= count <= MAX_THREADS, "threads", f"from 1 to {MAX_THREADS}", count)
    return count


# Sign, digits with separators, decimals, exponent, letter. ASCII only: \d would match digits of all scripts.
_COUNT = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)(\.\d+)?(?:e\+?(\d{1,2}))?([kmg]?)", re.ASCII | re.IGNORECASE)
_SCALES: Mapping[str, int] = MappingProxyType({"": 0, "k": 3, "m": 6, "g": 9})  # exponents of ten, by letter


def parse_count(text: str) -> int:
    """Parse an integer written as `2000000`, `2,000,000`, `2_000_000`, `2e6`, `2M` or `0.002G`.

    Raises:
        ConfigError: the text has another form, or the number is not an integer.
    """
    match = _COUNT.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a whole number; write it like 2000000, 2M or 2e6")
    # Exact arithmetic on digits: through a float, large numbers would be rounded.
    sign, whole, fraction, exponent, letter = match.groups()
    # 1.50M: the digits 1 and 5, then zeros for what the exponent and the letter add.
    decimals = (fraction or ".")[1:].rstrip("0")
    zeros = int(exponent or 0) + _SCALES[letter.lower()] - len(decimals)
    if zeros < 0:  # decimals are left, as in 1.5
        raise ConfigError(f"{text!r} is not a whole number; write it like 2000000, 2M or 2e6")
    return int(sign + re.sub("[,_]", "", whole) + decimals + "0" * zeros)


def parse_new_tokens(text: str) -> int | None:
    """Parse a number of characters to generate; `inf` is None, no end.

    Raises:
        ConfigError: the text is neither.
    """
    if text == "inf":
        return None
    try:
        count = parse_count(text)
    except ConfigError:
        count = -1  # for the message below, which also mentions inf
    require(count >= 0, "max_new_tokens", "a whole number of at least 0, or inf", text)
    return count


# Outputs are checked before the work starts, which may take minutes.


def check_picture(path: Path | None) -> None:
    """Check that a plot can be written to `path`; None, the default path, is not checked.

    Raises:
        ConfigError: the name does not end in .jpg or .png, or its folder is missing or not writable.
    """
    if path is not None:
        _check_suffix(path, "output", (".jpg", ".jpeg", ".png"), ".jpg or .png")
        _check_writable(path, "output")


def check_page(path: Path, name: str) -> None:
    """Check that an HTML page can be written to `path`, the value of the argument `name`.

    Raises:
        ConfigError: the name does not end in .html, or its folder is missing or not writable.
    """
    _check_suffix(path, name, (".html",), ".html")
    _check_writable(path, name)


def check_new_folder(folder: Path) -> None:
    """Check that a folder can be written.

    Raises:
        ConfigError: the folder exists and is not empty, or its parent is missing or not writable.
    """
    if not folder.name or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise ConfigError(f"FOLDER: {folder} exists and is not an empty folder; choose another name")
    if not folder.parent.is_dir():
        raise ConfigError(f"FOLDER: there is no folder {folder.parent}; create it first")
    if not os.access(folder.parent, os.W_OK):
        raise ConfigError(f"FOLDER: {folder.parent} cannot be written; choose another folder")


def _check_suffix(path: Path, name: str, suffixes: Collection[str], allowed: str) -> None:
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{name} must end in {allowed}, got {str(path)!r}", name)


def _check_writable(path: Path, name: str) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"{name}: there is no folder {path.parent}; create it first", name)
    # The folder, as files are written under a temporary name and renamed.
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{name}: {path} cannot be written; choose another file", name)
