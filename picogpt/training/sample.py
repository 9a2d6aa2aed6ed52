"""Generate a sample of text from a model in training, by the inference engine."""

from __future__ import annotations

import functools

from picogpt.config import EngineDType, GenerateConfig, SampleConfig, TextConfig
from picogpt.errors import PicoGPTError
from picogpt.inference import Engine, EngineBackend, load_engine_backend
from picogpt.inference.generate import continue_prompt
from picogpt.inference.sampling import Sampler, suppressed_ids
from picogpt.model.gpt import GPT
from picogpt.rng import sample_generator
from picogpt.tokenizer import CharTokenizer
from picogpt.wording import Notify

__all__ = ["engine_backend", "sample_text"]

SAMPLE_CHARS = 128
"""Length of the sample after each epoch: a window of the default model, for about a tenth of a second."""


def sample_text(model: GPT, text: TextConfig, notify: Notify) -> str:
    """Generate text after a newline, with the same random numbers every time.

    Args:
        model: the model after the epoch.
        text: properties of the training text; characters that do not occur in it are suppressed.
        notify: receives a line before the engine is compiled, and if that fails; only at the first sample of a process.
    """
    tokenizer = CharTokenizer(text.alphabet)
    # The inference engine and not the model: it has a KV cache, and is what the user will generate with.
    try:
        backend = engine_backend(notify)
        # int8 is the fastest type, and no worse to the eye. numpy has float32 alone.
        dtype: EngineDType = "auto" if backend.library is None else "int8"
        engine = Engine(model.config, model.arrays(), backend=backend, dtype=dtype)
    except PicoGPTError as error:
        return f"(no sample: {error})"  # a sample is no reason to end a run
    hop = GenerateConfig().hop_for(engine.config.context_len)
    sampler = Sampler(SampleConfig(), [sample_generator(0)], suppressed_ids(text), vocab_size=engine.config.vocab_size)
    # A newline starts a line of the training text, so the sample does too.
    made = continue_prompt(engine, tokenizer.encode("\n"), SAMPLE_CHARS, hop=hop, sampler=sampler)
    return "".join(tokenizer.decode(ids) for (ids,), _ in made)


# Cached: where nothing can be compiled or kept, each epoch would try again and print the same lines.
@functools.cache
def engine_backend(notify: Notify) -> EngineBackend:
    """Return the engine's kernels, compiled at the first call of a process if they are not cached."""
    backend = load_engine_backend(notify)
    if backend.library is None:
        notify(f"numpy generates the samples, several times more slowly than C: {backend.reason}")
    return backend
