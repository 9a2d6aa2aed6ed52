"""The number of threads follows what the machine allows, and what is reported is what computes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from picogpt.threads import Threads, choose_threads, cpu_quota, physical_cores, spin_briefly
from picogpt.wording import plural
from tests.programs import program

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
VERSION_2 = "30 1 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate"
VERSION_1 = "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
OTHERS = "21 1 0:20 / /proc rw - proc proc rw\n34 31 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine without any limit."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    return tmp_path


def limit(root: Path, mounts: str, groups: str, files: dict[str, str]) -> None:
    """Write what the kernel tells of cgroups."""
    (root / "proc/self/mountinfo").write_text(f"{OTHERS}\n{mounts}\n")
    (root / "proc/self/cgroup").write_text(f"8:memory:/elsewhere\n{groups}\n")
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def v1(folder: str, quota: int, period: int) -> dict[str, str]:
    """The files of a group of version 1."""
    return {f"cpu,cpuacct/{folder}cpu.cfs_quota_us": f"{quota}\n", f"cpu,cpuacct/{folder}cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "cpus"),
    [
        (VERSION_2, "0::/", {"cpu.max": "50000 100000\n"}, 0.5),
        (VERSION_2, "0::/", {"cpu.max": "max 100000\n"}, math.inf),
        (VERSION_2, "0::/", {}, math.inf),
        (VERSION_2, "0::/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 1.5),
        (VERSION_2, "0::/a/b", {"a/b/cpu.max": "20000 10000\n", "a/cpu.max": "300000 100000\n"}, 2.0),
        (VERSION_2.replace(" / ", " /docker/x ", 1), "0::/docker/x/y", {"y/cpu.max": "70000 100000\n"}, 0.7),
        (VERSION_2, "0::/../../elsewhere", {"cpu.max": "70000 100000\n"}, 0.7),
        (VERSION_2, "0::/", {"cpu.max": "nonsense\n"}, math.inf),
        (VERSION_1, "4:cpu,cpuacct:/a", v1("a/", 25_000, 100_000), 0.25),
        (VERSION_1, "4:cpu,cpuacct:/a", v1("a/", -1, 100_000) | v1("", 300_000, 100_000), 3.0),
        (VERSION_1, "4:cpu,cpuacct:/a", v1("a/", 100_000, 0), math.inf),
        (f"{VERSION_1}\n{VERSION_2}", "4:cpu,cpuacct:/a\n0::/", v1("a/", 40_000, 100_000), 0.4),
        ("", "", {}, math.inf),
    ],
)
def test_cpu_quota(root: Path, mounts: str, groups: str, files: dict[str, str], cpus: float) -> None:
    """Both versions of cgroups, nested, in containers and damaged: the lowest limit on the way up counts."""
    (root / "proc/self/mountinfo").touch()
    if groups:
        limit(root, mounts, groups, files)

    assert cpu_quota(root) == cpus


@pytest.mark.parametrize(
    ("asked", "environment", "quota", "expected"),
    [
        (None, {}, None, Threads(6, "one a core")),
        (None, {}, 0.5, Threads(1, "CPU quota of 0.5")),
        (None, {}, 1.4, Threads(1, "CPU quota of 1.4")),
        (None, {}, 1.5, Threads(2, "CPU quota of 1.5")),
        (None, {}, 7.0, Threads(6, "one a core")),
        (None, {"OMP_NUM_THREADS": "4,2"}, 1.0, Threads(4, "OMP_NUM_THREADS")),
        (None, {"OMP_NUM_THREADS": "many"}, None, Threads(6, "one a core")),
        (None, {"OMP_NUM_THREADS": "0"}, None, Threads(6, "one a core")),
        (None, {"OMP_THREAD_LIMIT": "2"}, None, Threads(2, "OMP_THREAD_LIMIT")),
        (5, {}, 1.0, Threads(5, "as requested")),
        (5, {"OMP_NUM_THREADS": "2"}, None, Threads(5, "as requested")),
        (5, {"OMP_THREAD_LIMIT": "3"}, None, Threads(3, "OMP_THREAD_LIMIT")),
    ],
)
def test_choice(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    environment: dict[str, str],
    quota: float | None,
    expected: Threads,
) -> None:
    """Flags, variables and quotas, on a machine of six cores."""
    monkeypatch.setattr("picogpt.threads.os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    if quota is not None:
        limit(root, VERSION_2, "0::/", {"cpu.max": f"{round(quota * 100_000)} 100000\n"})

    assert choose_threads(asked, environment=environment, root=root) == expected


def test_hyperthreads_count_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads of one core are one, and a core that the affinity leaves out is none."""
    monkeypatch.setattr("picogpt.threads.os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    for cpu, siblings in enumerate(("0-1", "0-1", "2-3", "2-3")):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings)

    assert physical_cores(root) == 2


def test_this_machine() -> None:
    """The real files of this machine can be read."""
    assert 1 <= choose_threads(environment={}).count <= (CORES or 1)


@pytest.mark.parametrize(
    ("variables", "flag", "said"),
    [
        ({"OMP_THREAD_LIMIT": "1"}, ["2"], "1 'OMP_THREAD_LIMIT'"),
        ({"OMP_NUM_THREADS": "1"}, [], "1 'OMP_NUM_THREADS'"),
        ({"OMP_DYNAMIC": "TRUE"}, ["2"], "2 'as requested; OMP_DYNAMIC is switched off'"),
    ],
)
def test_what_is_said_is_what_computes(variables: dict[str, str], flag: list[str], said: str) -> None:
    """In a process with OpenMP's variables set, torch starts as many threads as are reported."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = program("report_threads", *flag)
    done = subprocess.run(command, env={**plain, **variables}, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == said


def test_plural() -> None:
    """One of a thing, and several."""
    assert plural(1, "character") == "1 character"
    assert plural(2000, "character") == "2,000 characters"
    assert plural(0, "copy", "copies") == "0 copies"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_spin_briefly(before: dict[str, str], after: dict[str, str]) -> None:
    """OpenMP's threads soon sleep at a barrier, unless the user has said how they wait."""
    spin_briefly(before)

    assert before == after


@pytest.mark.skipif(sys.platform != "linux", reason="torch comes with another OpenMP runtime elsewhere")
def test_training_spins_briefly(tmp_path: Path) -> None:
    """The runtime that computes has read it: it shows its settings when it is loaded."""
    (tmp_path / "a.txt").write_text("one and two\n" * 500)
    flags = "--text a.txt --windows 2 --context-len 8 --n-embd 16 --n-head 2 --n-layer 1 --kernels torch --epochs 1 --dry-run"
    command = [sys.executable, "-m", "picogpt.cli.train", *flags.split()]
    plain = {name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    environment = {**plain, "OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)

    assert "GOMP_SPINCOUNT = '10000'" in done.stderr
