"""Transfer of a model's embeddings to another alphabet: characters that both have keep what was learned of them."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt.alphabet import UNKNOWN_ID, Alphabet
from picogpt.tokenizer import CharTokenizer

__all__ = ["transfer_embeddings"]

_EMBEDDING = "transformer.wte.weight"  # tied to the output head, which changes with it

Weights = Mapping[str, npt.NDArray[Any]]


def transfer_embeddings(weights: Weights, source: Alphabet, target: Alphabet, fresh: Weights) -> tuple[Weights, str]:
    """Return weights for the alphabet `target`, and a phrase about the characters that were found in `source`.

    The unknown id and the special tokens are copied too. A capital whose small letter stands for it in `source`, as in the
    original project's alphabet, starts as that letter.

    Args:
        weights: state dict of the model to start from.
        source: its alphabet.
        target: the alphabet of the new model.
        fresh: initial state dict of the new model, which the other rows are taken from.
    """
    found = CharTokenizer(source).encode(target.characters)  # (n,) id of each character in `source`
    copied = np.flatnonzero(found != UNKNOWN_ID)
    new = [UNKNOWN_ID, *(1 + copied), *target.special_ids.values()]
    old = [UNKNOWN_ID, *found[copied], *source.special_ids.values()]
    embedding = fresh[_EMBEDDING].copy()  # (V, C)
    embedding[new] = weights[_EMBEDDING][old]
    capitals = set(string.ascii_uppercase) & set(target.characters) if source.lowercase else ()
    how = f", {len(capitals)} capitals as their small letters" if capitals else ""
    phrase = f"{len(copied):,} of its {len(target.characters):,} characters start from embeddings of that model{how}"
    return {**weights, _EMBEDDING: embedding}, phrase
