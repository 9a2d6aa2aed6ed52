"""Have freed memory kept, print whether that is so, and the page faults of each of five rounds that need 40 MB."""

import resource

import torch

from picogpt.device import disable_malloc_trim

print(disable_malloc_trim())
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(10)]
    del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
