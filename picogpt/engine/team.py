"""Several processes that compute one model together, in step, through memory that they share.

Each holds a share of the heads and of the MLPs, with its part of the keys and values; twice a layer all add up what they
have (tensor parallelism: Shoeybi et al., 2019, Megatron-LM). One core reads 25 MB of weights for each character, which takes
most of the time; two read half of it each, and half fits a core's caches better.

A sum takes microseconds, so processes wait for each other by looking, not by sleeping; threads would have to take turns at
Python's one lock. Who waits for long yields the processor; a helper without work for `_AWAKE` seconds sleeps until its bell,
a pipe, is rung. Whoever waits for somebody who has died notices.

What is written before a flag is seen before it only where the processor keeps the order of stores: x86. Elsewhere, and
where processes cannot fork, there is no team.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import signal
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
from threadpoolctl import threadpool_limits

from picogpt.engine.blocks import Blocks
from picogpt.engine.weights import Floats, Weights
from picogpt.errors import EngineError

__all__ = ["Team", "TeamBlocks", "can_have_team", "physical_cores"]

_LOOKS = 1000
"""Looks at a flag, some 40 ns each, before a process begins to yield."""
_AWAKE = 0.002
"""Seconds that a helper looks for work before it sleeps, and after half of which its bell is rung."""
_CHECK = 0.05
"""Seconds between two looks at whether those who are waited for still live."""

_OPEN, _FORK, _ADVANCE, _STEP, _CLOSE = range(5)
_ORDER_WORDS = 6
_LINE = 8
"""Words of a cache line: flags that different processes write stand in lines of their own."""


def can_have_team() -> bool:
    """Whether processes of this machine can work as a team."""
    return hasattr(os, "fork") and sys.platform == "linux" and platform.machine() in {"x86_64", "AMD64"}


def physical_cores() -> int:
    """Cores that this process may use, those of a pair of hyperthreads counted once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    try:
        return len({Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_bytes() for cpu in usable})
    except OSError:
        return len(usable)


class _Shared:
    """The memory of a team: an order for the helpers, its input, and each process's flags and parts."""

    def __init__(self, size: int, numbers: int) -> None:
        self.size = size
        words = _LINE * (2 * size + 1) + 2 * _LINE
        self._words_bytes = words * 8
        memory = mmap.mmap(-1, self._words_bytes + (1 + 2 * size) * numbers * 4)
        view = memoryview(memory)
        self.flags = view[: self._words_bytes].cast("q")
        self.order = self.flags[words - 2 * _LINE :]
        floats = np.frombuffer(memory, np.float32, offset=self._words_bytes).reshape(1 + 2 * size, numbers)
        self.input = floats[0]
        self.parts = floats[1:].reshape(size, 2, numbers)

    def added(self, rank: int) -> int:
        """Flag: number of sums that process `rank` has written its part of."""
        return _LINE * rank

    def taken(self, rank: int) -> int:
        """Flag: number of orders that helper `rank` has read."""
        return _LINE * (self.size + rank)

    @property
    def given(self) -> int:
        """Flag: number of orders given."""
        return _LINE * 2 * self.size


class _TeamSums:
    """The sums of one process of a team (`picogpt.engine.blocks.Sums`)."""

    def __init__(self, shared: _Shared, rank: int, wait: Callable[[int, int], None]) -> None:
        self._flags, self._wait, self._count = shared.flags, wait, 0
        self._own, self._all = shared.parts[rank], shared.parts.swapaxes(0, 1)
        self._flag = shared.added(rank)
        self._others = [shared.added(other) for other in range(shared.size) if other != rank]

    def part(self, which: int, size: int) -> Floats:
        """See `Sums`."""
        part: Floats = self._own[which, :size]
        return part

    def add(self, which: int, x: Floats) -> None:
        """See `Sums`. All processes add the parts in one order, so that they stay equal to the last bit."""
        self._count = count = self._count + 1
        self._flags[self._flag] = count
        for flag in self._others:
            if self._flags[flag] < count:
                self._wait(flag, count)
        flat = x.reshape(-1)
        for part in self._all[which, :, : x.size]:
            flat += part


class Team:
    """This process and its helpers.

    Args:
        weights: the model; `n_head` and `n_embd` are multiples of `size`.
        size: processes, this one included, at least 2.
        rows: slots of all texts that are advanced at once, at most.
    """

    def __init__(self, weights: Weights, size: int, rows: int) -> None:
        assert weights.config.n_head % size == 0, (weights.config.n_head, size)
        self._weights = weights
        self._shared = _Shared(size, rows * weights.config.n_embd)
        self._layers = [layer.share(0, size) for layer in weights.layers]
        self._sums = _TeamSums(self._shared, 0, self._wait)
        self._orders = self._windows = 0
        self._closed_windows: list[int] = []
        self._last = 0.0
        # A helper's products are too small to be divided once more.
        threadpool_limits(1, user_api="blas")
        self._helpers: dict[int, int] = {}
        self._bells: list[int] = []
        for rank in range(1, size):
            self._hire(rank)
        self._end = weakref.finalize(self, _dismiss, self._helpers, self._bells)

    def _hire(self, rank: int) -> None:
        heard, bell = os.pipe()
        os.set_blocking(bell, False)
        self._bells.append(bell)
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 warns that threads do not come along; a helper needs none.
            warnings.simplefilter("ignore", DeprecationWarning)
            helper = os.fork()
        if helper == 0:
            _Helper(self._weights, self._shared, rank, heard, parent).run()
        os.close(heard)
        self._helpers[helper] = rank

    def close(self) -> None:
        """Let the helpers go."""
        self._end()

    def open(self, batch: int) -> TeamBlocks:
        """An empty window of `batch` texts."""
        return self._keep(Blocks(self._weights, self._layers, batch, self._sums), _OPEN, batch, 0)

    def fork(self, source: int, blocks: Blocks, batch: int) -> TeamBlocks:
        """`batch` windows that all go on from window `source`."""
        return self._keep(blocks.fork(batch), _FORK, batch, source)

    def _keep(self, blocks: Blocks, kind: int, batch: int, source: int) -> TeamBlocks:
        self._windows += 1
        self._order(kind, self._windows, batch, source)
        return TeamBlocks(self, self._windows, blocks)

    def advance(self, window: int, x: Floats, first: int) -> None:
        """Have the helpers do `Blocks.advance` with window `window`."""
        self._shared_input(x)
        self._order(_ADVANCE, window, x.shape[0], x.shape[1], first)

    def step(self, window: int, x: Floats, slot: int) -> None:
        """Have the helpers do `Blocks.step` with window `window`."""
        self._shared_input(x)
        self._order(_STEP, window, 1, 1, slot)

    def forget(self, window: int) -> None:
        """Drop window `window`, with the next order; this may be called at any time."""
        self._closed_windows.append(window)

    def _shared_input(self, x: Floats) -> None:
        self._await_taken()
        self._shared.input[: x.size] = x.reshape(-1)

    def _await_taken(self) -> None:
        for rank in range(1, self._shared.size):
            if self._shared.flags[self._shared.taken(rank)] < self._orders:
                self._wait(self._shared.taken(rank), self._orders)

    def _order(self, *words: int) -> None:
        while self._closed_windows:
            self._give(_CLOSE, self._closed_windows.pop())
        self._give(*words)

    def _give(self, *words: int) -> None:
        self._await_taken()
        for i, word in enumerate(words):
            self._shared.order[i] = word
        self._orders += 1
        self._shared.flags[self._shared.given] = self._orders
        now = time.monotonic()
        if now - self._last > _AWAKE / 2:
            self._ring()
        self._last = now

    def _ring(self) -> None:
        """Wake helpers that sleep."""
        for bell in self._bells:
            # A pipe that is full has been rung; one without a reader is noticed by whoever waits for it.
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(bell, b"!")

    def _wait(self, flag: int, count: int) -> None:
        """Wait until `flag` has come to `count`.

        Raises:
            EngineError: a helper has ended.
        """

        def look_after_helpers() -> None:
            # A helper may have gone to sleep between two looks at the clock.
            self._ring()
            for helper in self._helpers:
                ended, status = os.waitpid(helper, os.WNOHANG)
                if ended:
                    del self._helpers[helper]
                    self.close()
                    code = os.waitstatus_to_exitcode(status)
                    how = f"signal {-code}" if code < 0 else f"exit code {code}"
                    raise EngineError(
                        f"a helper process ended unasked ({how}); start again, with --threads 1 if it does so again"
                    )

        _wait_for(self._shared.flags, flag, count, look_after_helpers)


def _wait_for(flags: memoryview, flag: int, count: int, check: Callable[[], None]) -> None:
    """Look at `flag` until it has come to `count`, yielding after a while, and call `check` now and then."""
    for _ in range(_LOOKS):
        if flags[flag] >= count:
            return
    next_check = time.monotonic() + _AWAKE
    while flags[flag] < count:
        os.sched_yield()
        if time.monotonic() > next_check:
            check()
            next_check = time.monotonic() + _CHECK


def _dismiss(helpers: dict[int, int], bells: list[int]) -> None:
    """Kill the helpers and reap them.

    A helper owns nothing that must be finished. One that was interrupted in the middle of a sum would wait for a part
    that never comes, and this process would wait for the helper.
    """
    while bells:
        os.close(bells.pop())
    while helpers:
        helper, _ = helpers.popitem()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(helper, signal.SIGKILL)
            os.waitpid(helper, 0)


class TeamBlocks:
    """A window whose blocks the team computes: `picogpt.engine.blocks.Blocks` for all heads."""

    def __init__(self, team: Team, window: int, blocks: Blocks) -> None:
        self._team, self._window, self._blocks = team, window, blocks
        weakref.finalize(self, team.forget, window)

    def fork(self, batch: int) -> TeamBlocks:
        """See `Blocks`."""
        return self._team.fork(self._window, self._blocks, batch)

    def advance(self, x: Floats, first: int) -> None:
        """See `Blocks`."""
        self._team.advance(self._window, x, first)
        self._blocks.advance(x, first)

    def step(self, x: Floats, slot: int) -> None:
        """See `Blocks`."""
        self._team.step(self._window, x, slot)
        self._blocks.step(x, slot)


class _Helper:
    """What a helper process does: follow orders until its bell is gone."""

    def __init__(self, weights: Weights, shared: _Shared, rank: int, heard: int, parent: int) -> None:
        self._weights, self._shared, self._heard, self._parent = weights, shared, heard, parent
        self._layers = [layer.share(rank, shared.size) for layer in weights.layers]
        self._sums = _TeamSums(shared, rank, self._wait)
        self._taken_flag, self._taken = shared.taken(rank), 0
        self._windows: dict[int, Blocks] = {}

    def run(self) -> NoReturn:
        """Work, and end the process; what the parent had in hand is none of its business."""
        code = 1
        try:
            # Ctrl-C reaches the whole group; when to end is the parent's to say.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            # Bells above all: a helper sleeps until the last copy of its own is closed. Locks and pipes too.
            os.closerange(3, self._heard)
            os.closerange(self._heard + 1, os.sysconf("SC_OPEN_MAX"))
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1):
                os.dup2(nothing, stream)
            while self._next_order():
                self._follow()
            code = 0
        except _ParentIsGone:
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def _next_order(self) -> bool:
        """Wait for an order; False when there will be none."""
        flags, given = self._shared.flags, self._shared.given
        while True:
            deadline = time.monotonic() + _AWAKE
            looks = 0
            while flags[given] <= self._taken:
                looks += 1
                if looks > _LOOKS:
                    os.sched_yield()
                    if time.monotonic() > deadline:
                        break
            else:
                return True
            if not os.read(self._heard, 4096):
                return False

    def _follow(self) -> None:
        kind, window, batch, count, first = self._shared.order[: _ORDER_WORDS - 1]
        C = self._weights.config.n_embd
        x = self._shared.input[: batch * count * C].copy() if kind in {_ADVANCE, _STEP} else None
        self._taken += 1
        self._shared.flags[self._taken_flag] = self._taken
        if x is not None and kind == _STEP:
            self._windows[window].step(x, first)
        elif x is not None:
            self._windows[window].advance(x.reshape(batch, count, C), first)
        elif kind == _OPEN:
            self._windows[window] = Blocks(self._weights, self._layers, batch, self._sums)
        elif kind == _FORK:
            self._windows[window] = self._windows[count].fork(batch)
        else:
            del self._windows[window]

    def _wait(self, flag: int, count: int) -> None:
        def look_after_parent() -> None:
            if os.getppid() != self._parent:
                raise _ParentIsGone

        _wait_for(self._shared.flags, flag, count, look_after_parent)


class _ParentIsGone(Exception):
    """The process that gave the orders has ended."""
