"""One HTML file with a model in it, which runs it in a browser: no network, no server, no installation.

Weights are int8 rows with one float32 scale each, by the rule of `picogpt-generate --dtype int8`. Embeddings are bfloat16;
norms and biases are float32. All of them stand in the page as base64. `engine.js` computes, its matrix products in
WebAssembly (`products.wat`) where a browser can; `model_service.js` shares its time out, `model_page.js` is what a reader sees.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.config import GenerateConfig, GPTConfig, TextConfig
from picogpt.export.log_page import RunView, render_curve
from picogpt.export.wasm import assemble
from picogpt.folding import fold_character
from picogpt.inference.generate import MAX_PROMPT_WINDOWS, suppressed_ids
from picogpt.inference.tensors import Floats, Tensors
from picogpt.runs.folder import LossLog
from picogpt.tokenizer import VOCAB_SIZE, CharTokenizer

__all__ = ["ModelView", "quantize_rows", "render_model_page"]

_FOLDED = (range(0x80, 0x250), range(0x2000, 0x2200), range(0xFB00, 0xFB07))
"""Characters whose folding the page knows: Latin letters, punctuation, symbols and ligatures."""
_ALIGNMENT = 4
"""Bytes; a browser reads numbers in place only where they are aligned."""


@dataclass(frozen=True, kw_only=True)
class ModelView:
    """A model, as its page shows it."""

    name: str
    config: GPTConfig
    arrays: Mapping[str, npt.NDArray[Any]]
    """Its state dict as arrays."""
    text: TextConfig | None = None
    """What is known of the training text; None allows all characters."""
    log: LossLog | None = None
    """The loss log of its run, where there is one."""


def render_model_page(view: ModelView) -> str:
    """The page: one file of HTML that needs no network.

    Raises:
        RunError: a weight is missing, of another shape or not finite, or the vocabulary is another.
    """
    tensors, weights = _pack(Tensors(view.config, view.arrays))
    parts = {
        "title": html.escape(view.name),
        "parameters": f"{_parameters(view.config, tensors):,}",
        "shape": html.escape(view.config.describe()),
        "training": _training(view),
        "header": _json({**_header(view), "tensors": tensors}),
        "weights": base64.b64encode(weights).decode(),
        "style": _resource("model_page.css"),
        "engine": _resource("engine.js"),
        "service": _resource("model_service.js"),
        "script": _resource("model_page.js"),
    }
    return Template(_resource("model_page.html")).substitute(parts)


def quantize_rows(weight: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """int8 values (out, in) and one scale for each row (out,): the largest magnitude of a row becomes 127, as in `panels.h`."""
    largest = np.abs(weight).max(axis=1)
    with np.errstate(divide="ignore"):
        by = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    scales: Floats = largest / np.float32(127)
    return np.rint(weight * by[:, None]).astype(np.int8), scales


def _pack(tensors: Tensors) -> tuple[dict[str, dict[str, Any]], bytes]:
    """All weights, one after the other, and where each of them stands: its kind, its shape and its first byte."""
    layout: dict[str, dict[str, Any]] = {}
    content = bytearray()

    def add(name: str, kind: str, shape: tuple[int, ...], data: bytes) -> None:
        content.extend(b"\0" * (-len(content) % _ALIGNMENT))
        layout[name] = {"kind": kind, "shape": shape, "at": len(content)}
        content.extend(data)

    config = tensors.config
    for name, shape in _tables(config).items():
        add(name, "bfloat16", shape, _bfloat16(tensors.get(name, *shape)))
    for name, size in _vectors(config).items():
        vector = tensors.bias(name, size) if name.endswith("bias") else tensors.get(name, size)
        add(name, "float32", (size,), vector.astype("<f4").tobytes())
    for name, shape in _matrices(config).items():
        values, scales = quantize_rows(tensors.get(name, *shape))
        add(name, "int8", shape, scales.astype("<f4").tobytes() + values.tobytes())
    return layout, bytes(content)


def _tables(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """Names and shapes of the two embeddings."""
    return {"wte.weight": (config.vocab_size, config.n_embd), "wpe.weight": (config.context_len + 1, config.n_embd)}


def _vectors(config: GPTConfig) -> dict[str, int]:
    """Names and sizes of gains and biases."""
    C = config.n_embd
    sizes = {"attn.c_attn.bias": 3 * C, "attn.c_proj.bias": C, "mlp.c_fc.bias": 4 * C, "mlp.c_proj.bias": C}
    sizes |= {f"ln_{i}.{what}": C for i in (1, 2) for what in ("weight", "bias")}
    layers = {f"h.{i}.{name}": size for i in range(config.n_layer) for name, size in sizes.items()}
    return {"ln_f.weight": C, "ln_f.bias": C, **layers}


def _matrices(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """Names and shapes of the matrices of the blocks."""
    C = config.n_embd
    shapes = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    return {f"h.{i}.{name}.weight": shape for i in range(config.n_layer) for name, shape in shapes.items()}


def _bfloat16(table: Floats) -> bytes:
    """Rounded to nearest, ties to even: the upper halves of float32."""
    bits = np.ascontiguousarray(table, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


def _header(view: ModelView) -> dict[str, Any]:
    """All that the page has to know of the model beside its weights."""
    config, tokenizer = view.config, CharTokenizer()
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "context_len": config.context_len,
        "vocab_size": config.vocab_size,
        "hop": GenerateConfig().hop_for(config.context_len),
        "roll_windows": MAX_PROMPT_WINDOWS,
        "never": suppressed_ids(view.text).tolist(),
        "characters": [tokenizer.decode([i]) for i in range(VOCAB_SIZE)],
        "products": base64.b64encode(assemble(_resource("products.wat"))).decode(),
        "folding": _folding() if view.text is None or view.text.fold else {},
    }


@cache
def _folding() -> dict[str, str]:
    """Characters outside ASCII, and what they are read as."""
    characters = (chr(point) for points in _FOLDED for point in points)
    return {character: fold_character(character) for character in characters if fold_character(character) != character}


def _parameters(config: GPTConfig, tensors: Mapping[str, Mapping[str, Any]]) -> int:
    """Number of the model's parameters; biases that it does not have are zeros in the page."""
    return sum(math.prod(tensor["shape"]) for name, tensor in tensors.items() if config.bias or not name.endswith("bias"))


def _training(view: ModelView) -> str:
    """The loss curve and its figures."""
    if view.log is None or not view.log.val:
        return "<p>The loss log of this run was not at hand.</p>"
    return render_curve(RunView(name=view.name, log=view.log))


def _json(content: Any) -> str:
    """`content` as JSON in which no "<" can end the element early."""
    return json.dumps(content, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def _resource(name: str) -> str:
    return (files("picogpt.export") / name).read_text("utf-8")
