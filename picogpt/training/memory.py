"""Peak memory of this process, on each operating system."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["peak_memory"]

if sys.platform == "win32":
    import ctypes
    from ctypes import wintypes

    class _Counters(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS of psapi.h; only PeakWorkingSetSize is read."""

        _fields_ = (
            ("cb", wintypes.DWORD),
            ("PageFaultCount", wintypes.DWORD),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("rest", ctypes.c_size_t * 7),
        )

    def peak_memory() -> int:
        """Return the peak resident set size of this process in bytes."""
        counters = _Counters(cb=ctypes.sizeof(_Counters))
        # The handle is a pointer: without declared types ctypes would truncate it to 32 bits.
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.GetCurrentProcess.restype = wintypes.HANDLE
        kernel.K32GetProcessMemoryInfo.argtypes = (wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD)
        kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb)
        return int(counters.PeakWorkingSetSize)

elif sys.platform == "linux":
    import resource

    def peak_memory() -> int:
        """Return the peak resident set size of this process in bytes."""
        # VmHWM and not ru_maxrss, which a child process inherits from its parent; some sandboxes lack the one or all of /proc.
        try:
            lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            lines = []
        inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), inherited)

else:  # macOS and other Unix systems
    import resource

    def peak_memory() -> int:
        """Return the peak resident set size of this process in bytes."""
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # ru_maxrss is in bytes on macOS, in kB elsewhere.
        return most if sys.platform == "darwin" else most * 1024
