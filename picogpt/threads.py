"""Choice of the number of threads, for training, evaluation and generation.

This module imports neither torch nor numpy, so that the inference engine starts quickly.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["Threads", "choose_threads", "cpu_quota", "physical_cores", "spin_briefly"]

_THREAD_LIMIT, _NUM_THREADS = "OMP_THREAD_LIMIT", "OMP_NUM_THREADS"
_SPIN_COUNT, _WAIT_POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
# Polls of a barrier, a fraction of a millisecond: longer than threads with a core each wait for one another.
_SPINS = "10000"


def spin_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP threads sleep at a barrier after a fraction of a millisecond, unless the environment configures their waiting.

    By default gcc's runtime spins for milliseconds. If another program needs a core, threads then spin in turns with the
    thread that they wait for, and training takes half as long again.

    Args:
        environment: the environment variables, one of which is set. The runtime reads it when torch is loaded: call this before.
    """
    # OMP_WAIT_POLICY is the user's own choice; an explicit GOMP_SPINCOUNT is kept by setdefault.
    if _WAIT_POLICY not in environment:
        environment.setdefault(_SPIN_COUNT, _SPINS)


@dataclass(frozen=True)
class Threads:
    """A number of threads and the reason for it."""

    count: int
    reason: str
    """A phrase such as `one a core` or `CPU quota of 0.5`."""


def choose_threads(asked: int | None = None, *, environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Threads:
    """Choose the number of threads: the requested one, else `OMP_NUM_THREADS`, else one per core within the CPU quota.

    `OMP_THREAD_LIMIT` caps all of them, as OpenMP never starts more threads.

    Args:
        asked: number requested by a flag or stored with a resumed run.
        environment: the environment variables.
        root: mount point of `proc` and `sys`.
    """
    wanted = _number(environment.get(_NUM_THREADS, ""))
    if asked is not None:
        chosen = Threads(asked, "as requested")
    elif wanted is not None:
        chosen = Threads(wanted, _NUM_THREADS)
    else:
        chosen = _of_machine(root)
    limit = _number(environment.get(_THREAD_LIMIT, ""))
    return chosen if limit is None or chosen.count <= limit else Threads(limit, _THREAD_LIMIT)


def _of_machine(root: Path) -> Threads:
    cores, quota = physical_cores(root), cpu_quota(root)
    # Rounded to nearest: 1.5 CPUs keep two threads busy, but with 1.1 a second one mostly waits at barriers.
    allowed = max(1, math.floor(quota + 0.5)) if quota < cores else cores
    return Threads(cores, "one a core") if allowed >= cores else Threads(allowed, f"CPU quota of {quota:g}")


def _number(text: str) -> int | None:
    """Return the first number of an OpenMP variable such as `4` or `4,2`; None if it is invalid, which OpenMP ignores too."""
    # A list has one number for each level of nested parallelism.
    first = text.split(",", maxsplit=1)[0].strip()
    return int(first) if first.isascii() and first.isdigit() and 0 < int(first) < 1 << 31 else None


def physical_cores(root: Path = Path("/")) -> int:
    """Return the number of cores in this process's affinity mask, with hyperthreads of one core counted once if known."""
    # Two threads on one core share its SIMD units, so a thread per hyperthread is no faster.
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    topology = root / "sys/devices/system/cpu"
    try:
        return len({(topology / f"cpu{cpu}/topology/thread_siblings_list").read_bytes() for cpu in usable})
    except OSError:  # no topology, as on macOS or in some containers
        return len(usable)


def cpu_quota(root: Path = Path("/")) -> float:
    """Return the CPU quota of this process's cgroups (Linux, versions 1 and 2), in CPUs; infinite if there is no limit."""
    # A container sees all cores of its host; only the cgroup shows how many it may keep busy.
    try:
        mounts = (root / "proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
        groups = (root / "proc/self/cgroup").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return math.inf
    # A group's limit also holds for the groups in it, so the lowest on the way up counts.
    return min((_quota_of(folder) for folder in _group_folders(mounts, groups, root)), default=math.inf)


def _group_folders(mounts: list[str], groups: list[str], root: Path) -> Iterator[Path]:
    """Yield the folders of the process's cgroups that can limit its CPU time, from its own up to the mount point."""
    # /proc/self/cgroup: `id:controllers:path` for each hierarchy.
    paths: dict[str, str] = {}
    for line in groups:
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):  # version 2 has a single hierarchy, whose controllers are empty
            paths[name] = path
    # /proc/self/mountinfo: `id parent device root mount_point options... - type source super_options`.
    for line in mounts:
        fields, _, kind = line.partition(" - ")
        mounted, place = fields.split()[3:5]
        system, _, options = kind.split(" ", 2)
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(system)
        if controller is None or controller not in paths or (controller and controller not in options.split(",")):
            continue
        top = root / place.lstrip("/")
        # In a container, the mount may start at the process's own group, or the group may be outside the mounted part.
        group, inside = PurePosixPath(paths[controller]), PurePosixPath(mounted)
        below = group.relative_to(inside) if group.is_relative_to(inside) and ".." not in group.parts else PurePosixPath()
        yield from (top / part for part in (below, *below.parents))


def _quota_of(folder: Path) -> float:
    """Return the CPU quota of one cgroup, in CPUs: microseconds of CPU time per period."""
    try:
        # Version 2 has both numbers in one file, version 1 a file for each.
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no limit, or the group no longer exists
        return math.inf
