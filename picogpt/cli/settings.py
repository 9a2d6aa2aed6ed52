"""Flags of `picogpt-train` that map to config fields, and the conversion of parsed flags to a request."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from picogpt.alphabet import parse_alphabet
from picogpt.checks import DEVICES, DTYPES, KERNELS, check_choice, check_run_name, check_threads
from picogpt.config import TextRequest
from picogpt.training.request import LENGTHS, TrainRequest

__all__ = ["LENGTH_FLAGS", "MODEL_FLAGS", "TRAIN_FLAGS", "request_of"]

# Each field has its type and its help text; the flag's name is the field's, with dashes. Defaults come from the configs.
MODEL_FLAGS: Mapping[str, tuple[type, str]] = {
    "n_layer": (int, "blocks"),
    "n_head": (int, "attention heads per block"),
    "n_embd": (int, "width of the embeddings"),
    "context_len": (int, "characters in a window"),
    "dropout": (float, "dropout probability; above 0 torch computes the blocks, which takes longer"),
}
"""Fields of `GPTConfig` that are flags."""
TRAIN_FLAGS: Mapping[str, tuple[type, str]] = {
    "batch_size": (int, "sequences in a step"),
    "windows": (int, "windows in a sequence"),
    "optimizer": (str, "muon (for the matrices of the blocks, AdamW for the rest) or adamw"),
    "lr": (float, "peak learning rate of AdamW"),
    "muon_lr": (float, "peak learning rate of Muon"),
    "muon_interval": (int, "update each block with Muon every N steps, with an N times larger step"),
    "weight_decay": (float, "weight decay of matrices"),
    "grad_clip": (float, "clip the gradient to this norm, 0 for no clipping"),
    "warmup_steps": (int, "steps to the peak learning rate; at most a tenth of a run of recipe fast"),
    "sync_every": (
        int,
        "local steps of each rank between outer steps (DiLoCo), for slow networks; 0 averages gradients every step",
    ),
    "seed": (int, "seed of the weights, the order of the text and dropout"),
}
"""Fields of `TrainConfig` that are flags; the others, such as the betas, are for Python only."""
# Added to the parser by `picogpt.cli.train`, as three of them exclude each other.
LENGTH_FLAGS = (*LENGTHS, "patience", "steps_per_epoch", "val_steps")
"""Fields of `Budget` that are flags."""


def request_of(arguments: argparse.Namespace) -> TrainRequest:
    """Convert parsed flags to a request; invalid values raise before a text is read or anything written.

    Raises:
        ConfigError: a value is out of its range, or the file of an alphabet cannot be read.
    """
    # One expression: a flag that has no field, or a field of a wrong name, fails in any test that starts a run.
    return TrainRequest(
        run=None if arguments.run is None else check_run_name(arguments.run),
        logs_dir=arguments.logs_dir,
        fresh=arguments.fresh,
        recipe=arguments.recipe,
        # Only what was given: the rest comes from a resumed run, else from the recipe.
        model=_given(arguments, MODEL_FLAGS),
        train=_given(arguments, TRAIN_FLAGS),
        length=_given(arguments, LENGTH_FLAGS),
        text=TextRequest(
            # Absolute: the paths are stored with the run, which may be resumed from another folder.
            paths=tuple(path if path in {"-", ""} else str(Path(path).absolute()) for path in arguments.text or ()),
            dataset=arguments.dataset,
            column=arguments.text_column,
            fold=arguments.fold,
            alphabet=None if arguments.alphabet is None else parse_alphabet(arguments.alphabet),
        ),
        threads=check_threads(arguments.threads),
        # Validated here and not by argparse, so that the message has the same form as for all other settings.
        device=check_choice("device", arguments.device, DEVICES),
        dtype=check_choice("dtype", arguments.dtype, DTYPES),
        kernels=check_choice("kernels", arguments.kernels, KERNELS),
        compile=arguments.compile,
        gradient_checkpointing=arguments.gradient_checkpointing,
        init_from=arguments.init_from,
        import_original=arguments.import_original,
    )


def _given(arguments: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    """Return the flags among `names` that were given; the others keep the run's value or the default."""
    # None is a flag that was not given; 0 and an empty text are values.
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}
