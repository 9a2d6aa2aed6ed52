"""Arrays of token ids: a byte for each where a vocabulary fits in it, else two."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Ids", "id_dtype"]

Ids = npt.NDArray[np.unsignedinteger[Any]]
"""Token ids, uint8 or uint16."""


def id_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the type of an array of ids below `vocab_size`."""
    return np.dtype(np.uint8 if vocab_size <= 1 << 8 else np.uint16)
