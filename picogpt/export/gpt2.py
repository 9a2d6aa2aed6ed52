"""A folder that `transformers` loads as GPT-2, without code of ours: the model within one window, without its context roll.

GPT-2 has the same blocks. Three things make ours one of them: a token whose embedding is zero stands in the context slot, as the
zero vector does in the first window; linear layers are transposed, as GPT-2 stores them; the activation is the exact GELU.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.config import GPTConfig, TextConfig
from picogpt.errors import RunError
from picogpt.files import atomic_write
from picogpt.inference.generate import suppressed_ids
from picogpt.runs.folder import serialize_tensors
from picogpt.tokenizer import SPECIAL_IDS, UNKNOWN_ID, VOCAB_SIZE, CharTokenizer

__all__ = ["BOS_ID", "Gpt2Model", "write_gpt2"]

Array = npt.NDArray[np.float32]

BOS_ID = max(SPECIAL_IDS.values()) + 1
"""The first spare id: its embedding is set to zero and stands for the zero context vector."""
_BOS_TOKEN = "\ue000bos\ue000"  # noqa: S105 (no password)
"""Private-use characters, so that no text is taken for the token."""
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""GPT-2's Conv1D stores (in, out), torch's Linear (out, in)."""


@dataclass(frozen=True)
class Gpt2Model:
    """A model to export.

    Raises:
        RunError: it has no biases, which GPT-2 has.
    """

    name: str
    config: GPTConfig
    weights: Mapping[str, npt.NDArray[Any]]
    """State dict with nanoGPT's names."""
    text: TextConfig | None
    """The training text, whose characters alone are generated."""

    def __post_init__(self) -> None:
        if not self.config.bias:
            raise RunError(f"{self.name}: GPT-2 has biases, and this model has none; it cannot be exported as GPT-2")

    def tensors(self) -> dict[str, Array]:
        """GPT-2's state dict."""
        tensors: dict[str, Array] = {}
        for name, array in self.weights.items():
            if name == "lm_head.weight":
                continue  # tied
            values = np.asarray(array, np.float32)
            tensors[name] = np.ascontiguousarray(values.T if name.endswith(_TRANSPOSED) else values)
        embeddings = tensors["transformer.wte.weight"].copy()
        embeddings[BOS_ID] = 0.0
        return {**tensors, "transformer.wte.weight": embeddings}

    def model_config(self) -> dict[str, Any]:
        """`config.json`."""
        shape = self.config
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu",
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "n_embd": shape.n_embd,
            "n_positions": shape.context_len + 1,
            "vocab_size": shape.vocab_size,
            "layer_norm_epsilon": 1e-5,
            "bos_token_id": BOS_ID,
            "eos_token_id": None,
            "tie_word_embeddings": True,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "dtype": "float32",
        }

    def generation_config(self) -> dict[str, Any]:
        """`generation_config.json`: ids that the training text did not hold are never generated."""
        return {
            "bos_token_id": BOS_ID,
            "do_sample": True,
            "temperature": 0.5,
            "top_k": 0,
            "max_length": self.config.context_len + 1,
            "suppress_tokens": suppressed_ids(self.text).tolist(),
        }

    def card(self) -> str:
        """`README.md`, whose front matter the hub reads."""
        window = self.config.context_len
        return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- character-level
- picogpt
---

# {self.name}

A character-level GPT trained with picogpt, in GPT-2's layout. It knows small letters, digits and ASCII punctuation. Capitals are
lower-cased, all other characters are unknown.

**This is the model without its context roll.** picogpt hands the mean output of each window of {window} characters to the next
one. GPT-2 has no place for that, so this folder predicts within one window: at most {window} characters, which start from a
zero context vector. `picogpt-eval` measures what that costs, as the context vector zeroed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # or the name of this model on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("the history of", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))
```
"""


def tokenizer_json() -> dict[str, Any]:
    """`tokenizer.json`: a token for each character, capitals lower-cased, all others unknown, and the first token in front."""
    vocabulary = CharTokenizer().vocabulary
    characters = {text: i for text, i in vocabulary.items() if i not in SPECIAL_IDS.values()}
    spare = {f"\ue000{i}\ue000": i for i in range(VOCAB_SIZE) if i not in characters.values() and i != BOS_ID}
    lower = [{"type": "Replace", "pattern": {"String": c}, "content": c.lower()} for c in string.ascii_uppercase]
    added = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": BOS_ID, "content": _BOS_TOKEN, **added}],
        "normalizer": {"type": "Sequence", "normalizers": lower},
        # A token for each character, newlines too.
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": _BOS_TOKEN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {_BOS_TOKEN: {"id": _BOS_TOKEN, "ids": [BOS_ID], "tokens": [_BOS_TOKEN]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {**characters, **spare, _BOS_TOKEN: BOS_ID},
            "unk_token": next(text for text, i in characters.items() if i == UNKNOWN_ID),
        },
    }


def write_gpt2(model: Gpt2Model, folder: Path) -> None:
    """Write the folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _BOS_TOKEN, "unk_token": "<?>"}
    for name, content in (
        ("config.json", model.model_config()),
        ("generation_config.json", model.generation_config()),
        ("tokenizer.json", tokenizer_json()),
        ("tokenizer_config.json", {**tokenizer, "model_max_length": model.config.context_len + 1}),
    ):
        atomic_write(folder / name, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    atomic_write(folder / "model.safetensors", serialize_tensors(model.tensors(), {"format": "pt"}))
    atomic_write(folder / "README.md", model.card().encode("utf-8", "replace"))
