"""Choose threads by a flag, none or a number, check that OpenMP and torch follow, and print number and reason."""

import ctypes
import sys

import torch
from threadpoolctl import threadpool_info

from picogpt.device import set_threads

chosen = set_threads(int(sys.argv[1]) if sys.argv[1:] else None)
openmp = [ctypes.CDLL(library["filepath"]) for library in threadpool_info() if library["user_api"] == "openmp"]
assert not any(library.omp_get_dynamic() for library in openmp)
assert torch.get_num_threads() == chosen.count
print(chosen.count, repr(chosen.reason))
