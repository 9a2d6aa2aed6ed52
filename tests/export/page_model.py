"""A tiny model's page for tests, and the weights that stand in a page."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.config import GPTConfig
from picogpt.export.model_page import ModelView
from tests.conftest import TINY


def arrays_of(config: GPTConfig = TINY) -> dict[str, npt.NDArray[np.float32]]:
    """Random weights."""
    rng, C = np.random.default_rng(0), config.n_embd
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.context_len + 1, C)}
    for i in range(config.n_layer):
        matrices = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        for name, shape in matrices.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[:1]}
        shapes |= {f"h.{i}.{name}.{what}": (C,) for name in ("ln_1", "ln_2") for what in ("weight", "bias")}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    return {f"transformer.{name}": rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def view(**changes: Any) -> ModelView:
    """A tiny model."""
    return dataclasses.replace(ModelView(name="tiny", config=TINY, arrays=arrays_of()), **changes)


def content_of(page: str) -> tuple[dict[str, Any], bytes]:
    """What the page knows of the model, and its weights."""
    (header,) = re.findall(r'id="header">(.*?)</script>', page, re.DOTALL)
    weights = re.findall(r'class="weights">(.*?)</script>', page)
    return json.loads(header), b"".join(map(base64.b64decode, weights))


def dequantized(page: str) -> dict[str, npt.NDArray[np.float32]]:
    """The page's own weights in float32."""
    header, weights = content_of(page)
    arrays = {}
    for name, tensor in header["tensors"].items():
        shape, at = tensor["shape"], tensor["at"]
        count = int(np.prod(shape))
        if tensor["kind"] == "float32":
            array = np.frombuffer(weights, "<f4", count, at)
        elif tensor["kind"] == "bfloat16":
            array = (np.frombuffer(weights, "<u2", count, at).astype(np.uint32) << 16).view(np.float32)
        else:
            scales = np.frombuffer(weights, "<f4", shape[0], at)
            array = np.frombuffer(weights, np.int8, count, at + 4 * shape[0]).reshape(shape) * scales[:, None]
        arrays[f"transformer.{name}"] = array.reshape(shape)
    return arrays
