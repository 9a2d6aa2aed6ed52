"""How many threads to compute with: the one place that decides it, for training, evaluation and generation.

It imports neither torch nor numpy, so that the inference engine can use it too.
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
_SPINS = "10000"
"""Looks at a barrier, a fraction of a millisecond: longer than threads with a core each wait for one another."""


def spin_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have OpenMP's threads sleep at a barrier after a fraction of a millisecond, unless the environment says how they wait.

    gcc's runtime lets them spin for some ten milliseconds. Where another program needs a core, they then spin in turns with the
    thread that they wait for, and training takes half as long again. It reads the variable when torch loads it.

    Args:
        environment: the environment's variables, of which one is set.
    """
    if _WAIT_POLICY not in environment:
        environment.setdefault(_SPIN_COUNT, _SPINS)


@dataclass(frozen=True)
class Threads:
    """A number of threads, and where it comes from."""

    count: int
    reason: str
    """A few words, such as `one a core` or `CPU quota of 0.5`."""


def choose_threads(asked: int | None = None, *, environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Threads:
    """Choose the number of threads: as asked for, else `OMP_NUM_THREADS`, else one a core as far as the CPU quota allows.

    `OMP_THREAD_LIMIT` caps each of them, as OpenMP starts no more threads whatever it is told.

    Args:
        asked: the number that a flag or a resumed run names.
        environment: the environment's variables.
        root: where `proc` and `sys` are mounted.
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
    # To the nearest whole number: 1.5 CPUs feed two threads, but with 1.1 a second one mostly waits at barriers.
    allowed = max(1, math.floor(quota + 0.5)) if quota < cores else cores
    return Threads(cores, "one a core") if allowed >= cores else Threads(allowed, f"CPU quota of {quota:g}")


def _number(text: str) -> int | None:
    """The first number of an OpenMP variable such as `4` or `4,2`; None where it is not valid, as OpenMP passes it over too."""
    first = text.split(",", maxsplit=1)[0].strip()
    return int(first) if first.isascii() and first.isdigit() and 0 < int(first) < 1 << 31 else None


def physical_cores(root: Path = Path("/")) -> int:
    """Cores that the affinity of this process allows, hyperthreads of one core counted once where the system tells them."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    topology = root / "sys/devices/system/cpu"
    try:
        return len({(topology / f"cpu{cpu}/topology/thread_siblings_list").read_bytes() for cpu in usable})
    except OSError:
        return len(usable)


def cpu_quota(root: Path = Path("/")) -> float:
    """CPUs that the cgroups of this process may keep busy (Linux, versions 1 and 2); infinite where there is no limit.

    A limit of a group holds for all groups in it, so the lowest one on the way up counts.
    """
    try:
        mounts = (root / "proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
        groups = (root / "proc/self/cgroup").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return math.inf
    return min((_quota_of(folder) for folder in _group_folders(mounts, groups, root)), default=math.inf)


def _group_folders(mounts: list[str], groups: list[str], root: Path) -> Iterator[Path]:
    """The folders of the process's cgroups that can limit its CPU time, from its own up to the mount point."""
    paths: dict[str, str] = {}
    for line in groups:
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):  # the one of version 2 has no name
            paths[name] = path
    for line in mounts:
        fields, _, kind = line.partition(" - ")
        mounted, place = fields.split()[3:5]
        system, _, options = kind.split(" ", 2)
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(system)
        if controller is None or controller not in paths or (controller and controller not in options.split(",")):
            continue
        top = root / place.lstrip("/")
        # In a container the mount can begin at the process's own group, or its path can lead out of what is mounted.
        group, inside = PurePosixPath(paths[controller]), PurePosixPath(mounted)
        below = group.relative_to(inside) if group.is_relative_to(inside) and ".." not in group.parts else PurePosixPath()
        yield from (top / part for part in (below, *below.parents))


def _quota_of(folder: Path) -> float:
    """CPUs that one cgroup may keep busy."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # it has no such limit, or is gone
        return math.inf
