"""Export of a model as GPT-2, which `transformers` loads without our code: one window, without the context roll.

GPT-2 has the same blocks, so three changes are enough. A token with a zero embedding takes the context slot, like the zero vector
of the first window. Linear layers are transposed, as GPT-2 stores them. The activation is the exact GELU.
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

from picogpt.alphabet import PICOGPT, UNKNOWN_ID, Alphabet
from picogpt.config import GPTConfig, SampleConfig, TextConfig, alphabet_of
from picogpt.errors import RunError
from picogpt.files import atomic_write
from picogpt.inference.sampling import suppressed_ids
from picogpt.inference.weights import check_weights
from picogpt.runs.model_file import load_model
from picogpt.runs.tensor_file import serialize_tensors
from picogpt.tokenizer import CharTokenizer

__all__ = ["Gpt2Model", "write_gpt2"]

Array = npt.NDArray[np.float32]

# Private-use characters, so that no text contains the token.
_BOS_TOKEN = "\ue000bos\ue000"  # noqa: S105 (no password)
# GPT-2's Conv1D stores (in, out), torch's Linear (out, in).
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@dataclass(frozen=True)
class Gpt2Model:
    """A model to export.

    Raises:
        RunError: the model has no biases, which GPT-2 requires.
    """

    name: str
    config: GPTConfig
    weights: Mapping[str, npt.NDArray[Any]]
    """State dict with nanoGPT's names."""
    text: TextConfig | None
    """Properties of the training text: characters that do not occur in it are never generated."""

    def __post_init__(self) -> None:
        if not self.config.bias:
            raise RunError(f"{self.name}: GPT-2 has biases, and this model has none; it cannot be exported as GPT-2")

    @classmethod
    def read(cls, path: Path) -> Gpt2Model:
        """Return the model at `path`, with the name of its run.

        Raises:
            RunError: the model is missing or damaged, or it has no biases.
        """
        model = load_model(path)
        check_weights(model.config, model.weights)
        return cls(path.resolve().parent.name, model.config, model.weights, model.text)

    @property
    def alphabet(self) -> Alphabet:
        """Characters of the model."""
        return alphabet_of(self.text)

    @property
    def bos_id(self) -> int:
        """The first spare id. Its embedding is set to zero, in place of the zero context vector."""
        return self.alphabet.spare_ids[0]

    def tensors(self) -> dict[str, Array]:
        """Return the state dict with GPT-2's layout; the names are GPT-2's already, through nanoGPT."""
        tensors: dict[str, Array] = {}
        for name, array in self.weights.items():
            if name == "lm_head.weight":
                continue  # tied to the embedding: transformers makes it from there
            values = np.asarray(array, np.float32)
            tensors[name] = np.ascontiguousarray(values.T if name.endswith(_TRANSPOSED) else values)
        # A copy, as `weights` belongs to the caller. The head is tied, so the logit of this id is 0; generation suppresses it.
        embeddings = tensors["transformer.wte.weight"].copy()
        embeddings[self.bos_id] = 0.0
        return {**tensors, "transformer.wte.weight": embeddings}

    def model_config(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        shape = self.config
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu",  # exact; GPT-2's default, gelu_new, is the tanh approximation
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "n_embd": shape.n_embd,
            "n_positions": shape.context_len + 1,  # the context slot is position 0
            "vocab_size": shape.vocab_size,
            "layer_norm_epsilon": 1e-5,
            "bos_token_id": self.bos_id,
            "eos_token_id": None,  # texts have no end token: generation ends by length
            "tie_word_embeddings": True,
            # GPT-2's defaults are 0.1, which would apply if the model were trained further.
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "dtype": "float32",  # bfloat16 weights are exact in it
        }

    def generation_config(self) -> dict[str, Any]:
        """Return the content of `generation_config.json`; ids that the training text lacks are suppressed."""
        return {
            "bos_token_id": self.bos_id,
            "do_sample": True,
            "temperature": SampleConfig().temperature,
            "top_k": 0,  # no limit; the default of transformers is 50
            "max_length": self.config.context_len + 1,
            "suppress_tokens": suppressed_ids(self.text).tolist(),
        }

    def card(self) -> str:
        """Return the content of `README.md`, the model card; the hub reads its front matter."""
        window = self.config.context_len
        known = (
            "It knows small letters, digits and ASCII punctuation. Capitals are\nlower-cased, all other characters are unknown."
            if self.alphabet == PICOGPT
            else f"It knows {len(self.alphabet.characters):,} characters; all others are unknown."
        )
        return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- character-level
- picogpt
---

# {self.name}

A character-level GPT trained with picogpt, in GPT-2's layout. {known} Unlike picogpt, this tokenizer does not fold accents or
transliterate.

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


def tokenizer_json(alphabet: Alphabet) -> dict[str, Any]:
    """Return the content of `tokenizer.json`: one token per character, with the BOS token in front."""
    vocabulary, bos_id = CharTokenizer(alphabet).vocabulary, alphabet.spare_ids[0]
    # Special tokens are left out, as they are never made from text: their ids become spare ones.
    characters = {text: i for text, i in vocabulary.items() if i not in alphabet.special_ids.values()}
    # WordLevel needs a distinct word for every id.
    unused = [*alphabet.special_ids.values(), *alphabet.spare_ids[1:]]
    spare = {f"\ue000{i}\ue000": i for i in unused}
    # A-Z only, like our table: the Lowercase normalizer also changes other scripts, which have to become unknown.
    capitals = string.ascii_uppercase if alphabet.lowercase else ""
    lower = [{"type": "Replace", "pattern": {"String": c}, "content": c.lower()} for c in capitals]
    added = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": bos_id, "content": _BOS_TOKEN, **added}],
        "normalizer": {"type": "Sequence", "normalizers": lower},
        # Splits into single characters; a dot would not match newlines.
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        # The BOS token takes the context slot in front of every text.
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": _BOS_TOKEN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {_BOS_TOKEN: {"id": _BOS_TOKEN, "ids": [bos_id], "tokens": [_BOS_TOKEN]}},
        },
        "decoder": {"type": "Fuse"},  # joins characters without spaces
        "model": {
            "type": "WordLevel",
            "vocab": {**characters, **spare, _BOS_TOKEN: bos_id},
            "unk_token": next(text for text, i in characters.items() if i == UNKNOWN_ID),
        },
    }


def write_gpt2(model: Gpt2Model, folder: Path) -> None:
    """Write the folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The generic class reads everything from tokenizer.json. By default its version 4 also returns token types, whose embeddings
    # GPT-2 would add to those of the characters.
    inputs = ["input_ids", "attention_mask"]
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS_TOKEN,
        "unk_token": "<?>",
        "model_input_names": inputs,
    }
    for name, content in (
        ("config.json", model.model_config()),
        ("generation_config.json", model.generation_config()),
        ("tokenizer.json", tokenizer_json(model.alphabet)),
        ("tokenizer_config.json", {**tokenizer, "model_max_length": model.config.context_len + 1}),
    ):
        atomic_write(folder / name, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    # transformers rejects a file without this metadata.
    atomic_write(folder / "model.safetensors", serialize_tensors(model.tensors(), {"format": "pt"}))
    atomic_write(folder / "README.md", model.card().encode("utf-8", "replace"))
