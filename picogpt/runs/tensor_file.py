"""Files of tensors: safetensors with a format version in the metadata.

Tensors are numpy arrays here, so reading a model does not import torch.

Equal content gives equal bytes, and loading runs no code. Weights in bfloat16, which numpy lacks, are read as float32.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from picogpt.errors import RunError

__all__ = ["FORMAT_VERSION", "StoredTensors", "Tensors", "check_version", "digest", "open_tensors", "serialize_tensors"]

FORMAT_VERSION = 1
"""Version of the format, stored in every file; readers reject a newer one."""

Tensors = dict[str, npt.NDArray[Any]]

_BFLOAT16 = "BF16"  # name of the dtype in a safetensors header


def serialize_tensors(tensors: Tensors, metadata: Mapping[str, str], *, bfloat16: bool = False) -> bytes:
    """Serialize tensors and metadata as safetensors, deterministically: equal content gives equal bytes.

    With `bfloat16`, uint16 tensors hold bfloat16 weights, and are marked as such. The library writes metadata in an order that
    differs between processes. Layout: length of the header (8 bytes), header in JSON padded with spaces to a multiple of 8,
    tensors.
    """
    content = serialize(tensors, dict(metadata))
    # Rewrite the header with sorted metadata; offsets of tensors count from its end, so they stay valid.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    if bfloat16:  # numpy lacks the type
        for entry in header.values():
            entry["dtype"] = _BFLOAT16 if entry["dtype"] == "U16" else entry["dtype"]
    text = json.dumps(ordered, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # The memoryview avoids a copy of the tensors.
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[start:]))


class StoredTensors(Mapping[str, npt.NDArray[Any]]):
    """Tensors of a safetensors file by name. Each is read on access, so one tensor of a large file costs little memory.

    Args:
        path: the file.
        stream: the file, opened and validated by the safetensors library.
    """

    def __init__(self, path: Path, stream: safe_open) -> None:
        self.metadata: dict[str, str] = stream.metadata() or {}  # type: ignore[no-untyped-call]
        self.path, self._stream, self._names = path, stream, list(stream.keys())  # type: ignore[no-untyped-call]
        # Offset of the first tensor, and the header; read only for a file with bfloat16 tensors.
        self._layout: tuple[int, dict[str, Any]] | None = None

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        with _reading(self.path):
            if self._stream.get_slice(name).get_dtype() == _BFLOAT16:  # type: ignore[no-untyped-call]
                return self._widened(name)
            tensor: npt.NDArray[Any] = self._stream.get_tensor(name)  # type: ignore[no-untyped-call]
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _widened(self, name: str) -> npt.NDArray[np.float32]:
        """Return a bfloat16 tensor as float32. numpy has no bfloat16, so its bytes are read from the file directly."""
        with self.path.open("rb") as stream:
            if self._layout is None:
                # Layout of the file: length of the header (8 bytes), header in JSON, tensors.
                (length,) = struct.unpack("<Q", stream.read(8))
                self._layout = 8 + length, json.loads(stream.read(length))
            tensors_at, entry = self._layout[0], self._layout[1][name]
            first, end = entry["data_offsets"]
            stream.seek(tensors_at + first)
            halves = np.frombuffer(stream.read(end - first), "<u2").astype(np.uint32)
        # A bfloat16 is the upper half of a float32.
        halves <<= 16
        floats: npt.NDArray[np.float32] = halves.view(np.float32).reshape(entry["shape"])
        return floats


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[StoredTensors]:
    """Open a safetensors file and check its format version; yield its tensors.

    Raises:
        RunError: the file cannot be read, is damaged or has a newer format.
    """
    with contextlib.ExitStack() as stack:
        with _reading(path):
            tensors = StoredTensors(path, stack.enter_context(safe_open(path, framework="numpy")))
        version = tensors.metadata.get("format", "0")  # 0 fails the check: the file is not ours
        check_version(path, int(version) if version.isdigit() else None)
        yield tensors


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into `RunError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such file; train a model with picogpt-train, or name one with --model") from error
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise RunError(f"{path}: cannot be read as safetensors ({error})") from error


def check_version(path: Path, found: object) -> None:
    """Check the format version that was found in a file.

    Raises:
        RunError: it is newer than this version of picogpt, or none.
    """
    # Older formats would be converted here; so far there is one.
    if not isinstance(found, int) or not 0 < found <= FORMAT_VERSION:
        raise RunError(
            f"{path}: format {found} is not supported (at most {FORMAT_VERSION}); use the version of picogpt that wrote it"
        )


def digest(tensors: Mapping[str, npt.NDArray[Any]], state: str) -> str:
    """Return the SHA-256 of the state and of each tensor's name, dtype, shape and bytes, sorted by name."""
    sha256 = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        sha256.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        sha256.update(array.reshape(-1).view(np.uint8).data)  # a view as bytes, without a copy
    return sha256.hexdigest()
