"""Which processor this is, and which vector instructions it has, without torch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

__all__ = ["identity", "vector_instructions"]

_CPUINFO = Path("/proc/cpuinfo")
_IDENTIFYING = ("vendor_id", "model name", "flags", "CPU implementer", "CPU variant", "CPU part", "Features", "isa")
"""Keys of /proc/cpuinfo that tell one kind of processor from another, on x86, ARM and RISC-V."""
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}
_AVX2 = {"avx2", "fma"}


@cache
def _description() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor; empty on systems that have no such file."""
    try:
        text = _CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":")[::2] for line in text.split("\n\n", 1)[0].splitlines())
    return {key.strip(): value.strip() for key, value in pairs if key.strip() in _IDENTIFYING}


@cache
def identity() -> str:
    """The processor's model and instructions: code compiled for one of this name runs on every other one of it."""
    found = [platform.machine(), *(f"{key}={value}" for key, value in sorted(_description().items()))]
    if sys.platform == "darwin":
        found.append(_sysctl("machdep.cpu.brand_string"))
    elif len(found) == 1:
        found.append(platform.processor())
    return "\n".join(found)


def vector_instructions() -> str:
    """The longest vectors to compile for: AVX512, AVX2, NEON, or an empty string for the compiler's default.

    ATEN_CPU_CAPABILITY, with which torch is held to fewer instructions (avx2 or default), is honoured.
    """
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return "NEON"
    flags = set(_description().get("flags", "").split())
    if sys.platform == "darwin" and _sysctl("hw.optional.avx2_0") == "1":
        flags = set(_AVX2)
    held = os.environ.get("ATEN_CPU_CAPABILITY", "")
    if flags >= _AVX512 and held not in {"avx2", "default"}:
        return "AVX512"
    return "AVX2" if flags >= _AVX2 and held != "default" else ""


@cache
def _sysctl(name: str) -> str:
    """A value that macOS tells of its machine; empty where there is none."""
    command = ["/usr/sbin/sysctl", "-n", name]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
