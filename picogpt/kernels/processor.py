"""Identify the processor and its SIMD instructions, without torch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

__all__ = ["identity", "vector_instructions"]

_CPUINFO = Path("/proc/cpuinfo")
# Keys of /proc/cpuinfo that identify a processor model, on x86, ARM and RISC-V. Others, such as the clock, vary by the moment.
_IDENTIFYING = ("vendor_id", "model name", "flags", "CPU implementer", "CPU variant", "CPU part", "Features", "isa")
# Flags that the kernels' code for an instruction set requires.
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}
_AVX2 = {"avx2", "fma"}


@cache
def _description() -> dict[str, str]:
    """Return the identifying entries of /proc/cpuinfo's first processor; empty on systems without that file."""
    try:
        text = _CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}  # macOS and Windows
    # Entries of processors are separated by an empty line.
    pairs = (line.partition(":")[::2] for line in text.split("\n\n", 1)[0].splitlines())
    return {key.strip(): value.strip() for key, value in pairs if key.strip() in _IDENTIFYING}


@cache
def identity() -> str:
    """Return the processor's model and instructions: code compiled for one processor runs on any other with the same text."""
    found = [platform.machine(), *(f"{key}={value}" for key, value in sorted(_description().items()))]
    if sys.platform == "darwin":
        found.append(_sysctl("machdep.cpu.brand_string"))
    elif len(found) == 1:  # Windows, or a Linux that hides its processor: the best that Python knows
        found.append(platform.processor())
    return "\n".join(found)


def vector_instructions() -> str:
    """Return the widest SIMD set to compile for: AVX512, AVX2, NEON, or an empty string for the compiler's default.

    ATEN_CPU_CAPABILITY, which limits torch to fewer instructions (avx2 or default), limits this too.
    """
    # Every 64-bit ARM has NEON.
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return "NEON"
    flags = set(_description().get("flags", "").split())
    # No /proc/cpuinfo on macOS, so the flags are empty there.
    if sys.platform == "darwin" and _sysctl("hw.optional.avx2_0") == "1":
        flags = set(_AVX2)
    limit = os.environ.get("ATEN_CPU_CAPABILITY", "")
    if flags >= _AVX512 and limit not in {"avx2", "default"}:
        return "AVX512"
    return "AVX2" if flags >= _AVX2 and limit != "default" else ""


@cache
def _sysctl(name: str) -> str:
    """Return a value of macOS's sysctl; empty where there is none."""
    command = ["/usr/sbin/sysctl", "-n", name]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""  # the caller then takes the compiler's default
