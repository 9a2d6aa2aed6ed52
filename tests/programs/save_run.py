"""Save a model and a checkpoint, always the same ones, in a folder."""

import sys
from pathlib import Path

import numpy as np

from picogpt.config import GPTConfig
from picogpt.runs.checkpoint import Checkpoint
from picogpt.runs.folder import RunFolder

run = RunFolder(Path(sys.argv[1]))
shape = GPTConfig(n_layer=2, n_head=2, n_embd=16, context_len=8)
run.save_model({"b": np.ones(3, np.float32), "a": np.ones((2, 2))}, shape)
run.save_checkpoint(Checkpoint(tensors={"w": np.ones(2)}, state={"step": 1}))
