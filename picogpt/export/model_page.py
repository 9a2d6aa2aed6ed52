"""Render a model as one HTML file that runs it in a browser, without network, server or installation.

Matrices are int8 with a float32 scale per row, as in `picogpt-generate --dtype int8`. Embeddings are bfloat16; norms and biases
are float32. All weights are embedded as base64. `engine.js` computes the model, with GEMVs in WebAssembly (`products.wat`) if the
browser supports it; `model_service.js` schedules the engine's work, `model_page.js` is the user interface.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.config import Fold, GenerateConfig, GPTConfig, TextConfig, alphabet_of, fold_of
from picogpt.export.log_page import RunView, render_curve
from picogpt.export.page import resource, script_json
from picogpt.export.wasm import assemble
from picogpt.inference.generate import MAX_PROMPT_WINDOWS
from picogpt.inference.sampling import suppressed_ids
from picogpt.inference.tensors import Floats, WeightReader, to_bfloat16
from picogpt.runs.loss_log import LossLog, read_log
from picogpt.runs.model_file import load_model
from picogpt.runs.names import LOG_FILE
from picogpt.tokenizer import CharTokenizer, replacement

__all__ = ["ModelView", "quantize_rows", "render_model_page"]

# Code points whose folding is part of the page: Latin letters, punctuation, symbols and ligatures.
_FOLDED = (range(0x80, 0x250), range(0x2000, 0x2200), range(0xFB00, 0xFB07))
# Of a transliterating model: all that one UTF-16 unit can hold, which makes the page a tenth larger.
_TRANSLITERATED = (range(0x80, 0xD800), range(0xE000, 0x10000))
_PART = 48 * 1024  # bytes of weights in one element, a multiple of three: browsers hold 64 KiB of text in one piece
_ALIGNMENT = 4  # bytes: JavaScript's typed arrays need aligned offsets


@dataclass(frozen=True, kw_only=True)
class ModelView:
    """Content of a model's page."""

    name: str
    config: GPTConfig
    arrays: Mapping[str, npt.NDArray[Any]]
    """State dict with nanoGPT's names."""
    text: TextConfig | None = None
    """Properties of the training text; None allows all characters."""
    log: LossLog | None = None
    """Loss log of the model's run, if there is one."""

    @classmethod
    def read(cls, path: Path) -> ModelView:
        """Return the content of the page of the model at `path`.

        Raises:
            RunError: the model or the log beside it is damaged.
        """
        model, log = load_model(path), path.with_name(LOG_FILE)
        return cls(
            name=path.resolve().parent.name,  # the run's name, also for a path like ./model.safetensors
            config=model.config,
            arrays=model.weights,
            text=model.text,
            log=read_log(log) if log.exists() else None,  # a model file alone has no log
        )


def render_model_page(view: ModelView) -> str:
    """Return the page: a single HTML file that needs no network.

    Raises:
        RunError: a weight is missing, has another shape or is not finite.
    """
    # `WeightReader` validates each weight when it is read.
    tensors, weights = _pack(WeightReader(view.config, view.arrays))
    parts = {
        "title": html.escape(view.name),
        "parameters": f"{_parameters(view.config, tensors):,}",
        "shape": html.escape(view.config.describe()),
        "width": str(view.config.n_embd),
        "vocabulary": str(view.config.vocab_size),
        "training": _training(view),
        "header": script_json({**_header(view), "tensors": tensors, "size": len(weights)}),
        "weights": _weights(weights),
        "style": resource("model_page.css"),
        "engine": resource("engine.js"),
        "service": resource("model_service.js"),
        "script": resource("model_page.js"),
    }
    return Template(resource("model_page.html")).substitute(parts)


def quantize_rows(weight: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Quantize a matrix (out, in) to int8, with a scale for each row (out,): the largest magnitude of a row becomes 127."""
    # The same rule as in panels.h, so that the page has the weights of `--dtype int8`; but activations are not rounded here.
    largest = np.abs(weight).max(axis=1)  # (out,)
    with np.errstate(divide="ignore"):
        # A row of zeros stays zero.
        by = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    scales: Floats = largest / np.float32(127)
    return np.rint(weight * by[:, None]).astype(np.int8), scales


def _pack(tensors: WeightReader) -> tuple[dict[str, dict[str, Any]], bytes]:
    """Return the layout of the weights (type, shape and offset of each by name) and their bytes, concatenated."""
    layout: dict[str, dict[str, Any]] = {}
    content = bytearray()

    def add(name: str, kind: str, shape: tuple[int, ...], data: bytes) -> None:
        content.extend(b"\0" * (-len(content) % _ALIGNMENT))
        layout[name] = {"kind": kind, "shape": shape, "at": len(content)}
        content.extend(data)

    # Any order will do: the page looks up offsets by name.
    config = tensors.config
    for name, shape in _tables(config).items():
        add(name, "bfloat16", shape, to_bfloat16(tensors.get(name, *shape)).astype("<u2").tobytes())
    for name, size in _vectors(config).items():
        # A model without biases gets zeros, so that the page has one code path.
        vector = tensors.bias(name, size) if name.endswith("bias") else tensors.get(name, size)
        add(name, "float32", (size,), vector.astype("<f4").tobytes())
    for name, shape in _matrices(config).items():
        values, scales = quantize_rows(tensors.get(name, *shape))
        # Scales first: they need the alignment, the int8 values do not.
        add(name, "int8", shape, scales.astype("<f4").tobytes() + values.tobytes())
    return layout, bytes(content)


def _weights(content: bytes) -> str:
    """Return script elements with the weights in base64."""
    parts = (base64.b64encode(content[at : at + _PART]).decode() for at in range(0, len(content), _PART))
    return "\n".join(f'<script type="text/plain" class="weights">{part}</script>' for part in parts)


def _tables(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """Return names and shapes of the two embeddings; the head is tied to the first."""
    return {"wte.weight": (config.vocab_size, config.n_embd), "wpe.weight": (config.context_len + 1, config.n_embd)}


def _vectors(config: GPTConfig) -> dict[str, int]:
    """Return names and sizes of the norms' weights and of all biases."""
    C = config.n_embd
    sizes = {"attn.c_attn.bias": 3 * C, "attn.c_proj.bias": C, "mlp.c_fc.bias": 4 * C, "mlp.c_proj.bias": C}
    sizes |= {f"ln_{i}.{what}": C for i in (1, 2) for what in ("weight", "bias")}
    layers = {f"h.{i}.{name}": size for i in range(config.n_layer) for name, size in sizes.items()}
    return {"ln_f.weight": C, "ln_f.bias": C, **layers}


def _matrices(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """Return names and shapes of the matrices of the blocks."""
    C = config.n_embd
    shapes = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    return {f"h.{i}.{name}.weight": shape for i in range(config.n_layer) for name, shape in shapes.items()}


def _header(view: ModelView) -> dict[str, Any]:
    """Return everything that the page needs besides the weights."""
    config, alphabet = view.config, alphabet_of(view.text)
    tokenizer = CharTokenizer(alphabet)
    knows = f"the {len(alphabet.characters):,} of its alphabet"
    if alphabet == PICOGPT:
        knows = "small letters, digits and punctuation"
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "context_len": config.context_len,
        "vocab_size": config.vocab_size,
        "hop": GenerateConfig().hop_for(config.context_len),
        "roll_windows": MAX_PROMPT_WINDOWS,
        "never": suppressed_ids(view.text).tolist(),
        "characters": [tokenizer.decode([i]) for i in range(alphabet.vocab_size)],
        "lowercase": alphabet.lowercase,
        "knows": knows,
        # Assembled here, so that the repository contains source and no binary.
        "products": base64.b64encode(assemble(resource("products.wat"))).decode(),
        "folding": _folding(alphabet, fold_of(view.text)),
    }


@cache
def _folding(alphabet: Alphabet, fold: Fold) -> dict[str, str]:
    """Return the spelling of each character outside the alphabet that has one."""
    if not fold:
        return {}
    # A table instead of the rules: a browser has no `anyascii`.
    replace, ranges = replacement(alphabet, fold), _TRANSLITERATED if fold == "latin" else _FOLDED
    characters = (chr(point) for points in ranges for point in points)
    return {character: spelling for character in characters if (spelling := replace(character)) != character}


def _parameters(config: GPTConfig, tensors: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the number of the model's parameters."""
    # The page has zeros for the biases of a model without any: those do not count.
    return sum(math.prod(tensor["shape"]) for name, tensor in tensors.items() if config.bias or not name.endswith("bias"))


def _training(view: ModelView) -> str:
    """Return the section with the loss curve."""
    if view.log is None or not view.log.val:
        return "<p>There is no loss log of this run.</p>"
    axis = "<p>The axis shows the loss: average surprise per character, in nats. One nat is 1.44 bits.</p>"
    return axis + render_curve(RunView(name=view.name, log=view.log))
