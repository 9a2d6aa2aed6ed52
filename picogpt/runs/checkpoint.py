"""A checkpoint: everything needed to resume a run, as a file with a SHA-256 or as bytes for another process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load as tensors_of
from safetensors.numpy import save as serialize

from picogpt.errors import RunError
from picogpt.runs.tensor_file import FORMAT_VERSION, Tensors, digest, open_tensors, serialize_tensors

__all__ = ["Checkpoint", "checkpoint_file", "pack", "read_checkpoint", "unpack"]


@dataclass(kw_only=True)
class Checkpoint:
    """Everything needed to resume a run."""

    tensors: Tensors
    """Weights and optimizer tensors, by name."""
    state: dict[str, Any]
    """Plain values: step counts, running sums, the loss log."""


def checkpoint_file(checkpoint: Checkpoint) -> bytes:
    """Return the content of a checkpoint's file, for `read_checkpoint`."""
    # Metadata values are strings in safetensors. The digest covers tensors and state, so damage to either is detected.
    state = json.dumps(checkpoint.state)
    metadata = {"format": str(FORMAT_VERSION), "state": state, "sha256": digest(checkpoint.tensors, state)}
    return serialize_tensors(checkpoint.tensors, metadata)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        RunError: the file is missing or damaged.
    """
    with open_tensors(path) as stored:
        metadata, tensors = stored.metadata, dict(stored)
    state = metadata.get("state", "")
    if metadata.get("sha256") != digest(tensors, state):
        raise RunError(f"{path}: damaged (its SHA-256 does not match)")
    # The checksum matched, so this is the JSON that we wrote: no check of its form is needed.
    return Checkpoint(tensors=tensors, state=json.loads(state))


def pack(checkpoint: Checkpoint) -> bytes:
    """Serialize a checkpoint to send it to another process: length of the state (8 bytes), state as JSON, tensors."""
    state = json.dumps(checkpoint.state).encode()
    return len(state).to_bytes(8, "little") + state + serialize(checkpoint.tensors)


def unpack(content: bytes) -> Checkpoint:
    """Return the checkpoint that `pack` serialized."""
    start = 8 + int.from_bytes(content[:8], "little")
    return Checkpoint(tensors=tensors_of(content[start:]), state=json.loads(content[8:start]))
