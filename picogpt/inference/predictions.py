"""Probabilities of generated characters: what the model expected in their places, before the filters of sampling.

Sampling runs in C and returns ids only. A second decoder reads the ids after they are drawn, so a text is the same with and
without its probabilities, and generation without them costs nothing more.

Dimensions: n new characters, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from picogpt.ids import id_dtype
from picogpt.inference import Engine, Ids
from picogpt.inference.decoder import RollingDecoder
from picogpt.inference.sampling import Scores, softmax
from picogpt.inference.tensors import Floats

__all__ = ["Predictor"]


class Predictor:
    """Predicts the characters of texts that continue one prompt.

    Args:
        engine: the model.
        prompt: the prompt's ids (k,), k >= 1.
        hop: stride of the windows; see `RollingDecoder`.
        texts: number of texts.
    """

    def __init__(self, engine: Engine, prompt: Ids, hop: int, texts: int) -> None:
        self._dtype = id_dtype(engine.config.vocab_size)
        decoder = RollingDecoder(engine, hop)
        logits = decoder.prefill(np.asarray(prompt, self._dtype)[None])  # (1, V)
        # A decoder for each text, as a stop sequence can hold back ids of one text and not of another.
        self._decoders = [decoder.fork(1) for _ in range(texts)]
        self._logits: list[Floats] = [logits] * texts  # after the ids that were read

    def read(self, text: int, ids: Sequence[int]) -> Scores:
        """Append `ids` to a text, counted from 0; return the probabilities (n, V) that the model gave all ids in their places."""
        if not ids:
            return np.empty((0, self._logits[text].shape[-1]))
        after = self._decoders[text].prefill_all_logits(np.array(ids, self._dtype)[None])[0]  # (n, V)
        logits: npt.NDArray[np.float32] = np.concatenate((self._logits[text], after))  # (1 + n, V)
        self._logits[text] = logits[-1:]
        return softmax(logits[:-1].astype(np.float64))
