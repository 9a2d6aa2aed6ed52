"""The command line's parser: it answers in one line, names the nearest flag, and reads counts such as 2M."""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from picogpt import __version__
from picogpt.checks import parse_count
from picogpt.config import LOGS_DIR
from picogpt.errors import ConfigError

__all__ = ["Parser", "add_model", "count"]

_WRONG_USAGE = 2

_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "--lr": ("learning-rate", "max-lr"),
    "--grad-clip": ("max-grad-norm", "clip-grad", "gradient-clip"),
    "--weight-decay": ("wd",),
    "--warmup-steps": ("warmup-iters", "warmup"),
    "--batch-size": ("bs", "per-device-train-batch-size", "micro-batch-size"),
    "--context-len": ("block-size", "ctx-size", "n-ctx", "context-length", "seq-len", "max-seq-len", "window"),
    "--n-layer": ("num-layers", "num-hidden-layers", "depth", "layers"),
    "--n-head": ("num-heads", "num-attention-heads", "heads"),
    "--n-embd": ("d-model", "hidden-size", "width", "dim"),
    "--epochs": ("num-train-epochs", "num-epochs", "max-iters", "max-steps"),
    "--steps-per-epoch": ("eval-interval", "eval-steps"),
    "--val-steps": ("eval-iters",),
    "--run": ("resume", "resume-from-checkpoint", "run-name", "out-dir", "output-dir"),
    "--init-from": ("finetune", "pretrained", "model-name-or-path"),
    "--text": ("data", "data-dir", "input", "train-file", "corpus"),
    "--dataset": ("dataset-name",),
    "--dtype": ("precision", "bf16", "fp16"),
    "--device": ("cuda", "cpu", "gpu", "no-cuda"),
    "--threads": ("num-threads", "n-threads", "threads-batch"),
    "--seed": ("random-seed", "rng-seed"),
    "--max-new-tokens": ("n-predict", "max-tokens", "max-length", "length", "num-tokens"),
    "--temperature": ("temp",),
    "--num-samples": ("num-return-sequences", "n-samples", "samples"),
    "--prompt": ("start",),
    "--prompt-file": ("file",),
    "--stop": ("reverse-prompt", "stop-sequence", "eos"),
    "--model": ("model-path", "checkpoint", "ckpt", "load"),
    "--output": ("out", "save"),
    "--chat": ("conversation", "interactive", "cnv"),
}
"""Our flags, and what nanoGPT, transformers, llama.cpp and others call the same."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations, whose errors are one line and name the nearest flag.

    Args:
        prog: name of the command.
        description: what it does.
        epilog: what stands below the flags.
        stray: what to do with an argument that belongs to no flag.
    """

    def __init__(self, prog: str, description: str, epilog: str | None = None, stray: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._stray = stray
        self.add_argument("--version", action="version", version=f"picogpt {__version__}")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse, rejecting an unknown flag with the name of the one that was probably meant."""
        arguments = sys.argv[1:] if argv is None else list(argv)
        # Ahead of argparse, which would take the value behind such a flag for an argument of its own, and complain of that.
        for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
            flag = argument.partition("=")[0]
            if flag.startswith("--") and " " not in argument and not self.has_flag(flag):
                self._reject(argument)
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            self._reject(unknown[0])
        return parsed

    def has_flag(self, flag: str) -> bool:
        """Whether there is such a flag."""
        return flag in self._option_string_actions

    def _reject(self, argument: str) -> NoReturn:
        if not argument.startswith("-"):
            self.error(f"{argument!r} belongs to no flag" + (f"; {self._stray}" if self._stray else ""))
        flag = argument.partition("=")[0]
        meant = self._meant(flag)
        self.error(f"there is no flag {flag}" + (f"; did you mean {meant}?" if meant else ""))

    def _meant(self, flag: str) -> str | None:
        """The flag that other programs give this name, or the one whose name is nearest."""
        name = flag.lstrip("-").replace("_", "-").lower()
        for ours, others in _SYNONYMS.items():
            if name in others and self.has_flag(ours):
                return ours
        nearest = difflib.get_close_matches(f"--{name}", self._option_string_actions, n=1)
        return nearest[0] if nearest else None

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line."""
        self.exit(_WRONG_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def count(text: str) -> int:
    """Type of a flag that takes a whole number.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        return parse_count(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_model(flags: argparse._ActionsContainer) -> None:
    """Add the flags that name a trained model."""
    flags.add_argument(
        "-m",
        "--model",
        metavar="RUN",
        help="a run's name, its folder, or a .safetensors file (default: the run under the logs folder that was saved last, "
        "else a model that comes with picogpt)",
    )
    flags.add_argument("--logs-dir", metavar="DIR", type=Path, default=LOGS_DIR, help="where runs are kept (default: logs)")
