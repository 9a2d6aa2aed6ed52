"""Values that users give, checked where they enter: names, ranges and numbers written as text."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
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
"""Types of the matrix products; auto is the faster one on this machine."""
ENGINE_DTYPES = ("auto", "float32", "bfloat16", "int8")
"""Types of the weights that text is generated with; auto is bfloat16, in which the bundled models are stored."""
DEVICES = ("auto", "cpu", "cuda", "mps")
"""Where training computes; auto is a CUDA GPU if there is one, else the CPU."""
KERNELS = ("auto", "c", "torch")
"""What computes the blocks on a CPU: functions in C that are compiled for the model, or torch's; auto is C where that works."""
X_AXES: Mapping[str, str] = MappingProxyType(
    {"epochs": "epoch", "characters": "characters trained on (millions)", "seconds": "seconds of training"}
)
"""What the x axis of a loss curve can count, and its label."""
ATTENTIONS = ("fused", "products")
"""Forms of attention where torch computes the blocks: its fused function, or batched products of matrices."""
MAX_THREADS = 1024

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def require(ok: bool, name: str, allowed: str, value: object) -> None:
    """Check that a setting is `ok`.

    Args:
        ok: whether it is.
        name: of the setting.
        allowed: its range, in words.
        value: that it has.

    Raises:
        ConfigError: it is not.
    """
    if not ok:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}", name)


def require_whole(name: str, value: object, minimum: int) -> None:
    """Check that a setting is a whole number of at least `minimum`.

    Raises:
        ConfigError: it is not.
    """
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    require(ok, name, f"a whole number of at least {minimum}", value)


def require_between(name: str, value: float, low: float, high: float, allowed: str) -> None:
    """Check that a setting is a finite number from `low` to `high`; `allowed` is the range in words.

    Raises:
        ConfigError: it is not.
    """
    require(math.isfinite(value) and low <= value <= high, name, allowed, value)


def check_run_name(name: str) -> str:
    """Return `name` if it can be a run's name.

    Raises:
        ConfigError: it could be mistaken for a path or a flag.
    """
    require(bool(_RUN_NAME.fullmatch(name)), "run", "1 to 64 letters, digits, '.', '_' or '-', a letter or digit first", name)
    return name


def check_choice(field: str, name: str | None, choices: Collection[str]) -> str | None:
    """Return `name` if it is one of `choices` or None.

    Raises:
        ConfigError: it is none of them; the message names `field`.
    """
    require(name is None or name in choices, field, f"one of {', '.join(choices)}", name)
    return name


def check_text_column(name: str | None, *, streamed: bool) -> str | None:
    """Return `name`, the column of a data set that holds its text, or None.

    Raises:
        ConfigError: there is a name and the text, not `streamed`, has no columns.
    """
    if name is not None and not streamed:
        raise ConfigError("text_column is for a streamed data set; name one with --dataset, or leave it out", "text_column")
    return name


def check_threads(count: int | None) -> int | None:
    """Return `count` if it is a number of threads or None.

    Raises:
        ConfigError: it is out of range.
    """
    require(count is None or 1 <= count <= MAX_THREADS, "threads", f"from 1 to {MAX_THREADS}", count)
    return count


_COUNT = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)(\.\d+)?(?:e\+?(\d{1,2}))?([kmg]?)", re.ASCII | re.IGNORECASE)
_SCALES: Mapping[str, int] = MappingProxyType({"": 0, "k": 3, "m": 6, "g": 9})
"""Letters after a number, and the powers of ten that they stand for."""


def parse_count(text: str) -> int:
    """A whole number, written as `2000000`, `2,000,000`, `2_000_000`, `2e6`, `2M` or `0.002G`.

    Raises:
        ConfigError: it is no number of this form, or not a whole one.
    """
    match = _COUNT.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a whole number; write it like 2000000, 2M or 2e6")
    sign, whole, fraction, exponent, letter = match.groups()
    decimals = (fraction or ".")[1:].rstrip("0")
    zeros = int(exponent or 0) + _SCALES[letter.lower()] - len(decimals)
    if zeros < 0:
        raise ConfigError(f"{text!r} is not a whole number; write it like 2000000, 2M or 2e6")
    return int(sign + re.sub("[,_]", "", whole) + decimals + "0" * zeros)


def parse_new_tokens(text: str) -> int | None:
    """A number of characters to write, or None for `inf`: no end.

    Raises:
        ConfigError: it is neither.
    """
    if text == "inf":
        return None
    try:
        count = parse_count(text)
    except ConfigError:
        count = -1
    require(count >= 0, "max_new_tokens", "a whole number of at least 0, or inf", text)
    return count
