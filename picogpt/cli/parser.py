"""The argument parser of all commands: one-line errors that suggest the nearest flag, and counts such as 2M.

Importing it loads neither torch nor numpy, so that --help and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from picogpt import __version__
from picogpt.checks import parse_count
from picogpt.config import LOGS_DIR
from picogpt.errors import ConfigError
from picogpt.wording import did_you_mean

__all__ = ["Parser", "add_model", "add_setting", "count", "number"]

_WRONG_USAGE = 2  # exit code, as in argparse

# Our flags, and the names that nanoGPT, transformers, llama.cpp and others use for the same setting.
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
_METAVARS: Mapping[Callable[[str], Any], str] = {int: "N", float: "X", str: "NAME"}


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations, whose errors are one line and suggest the nearest flag.

    Args:
        prog: name of the command.
        description: purpose of the command, in lines of at most 80 columns.
        epilog: text below the flags, likewise.
        stray: hint for the error about an unexpected positional argument.
    """

    def __init__(self, prog: str, description: str, epilog: str | None = None, stray: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            # An abbreviation becomes ambiguous with the next flag that is added, and breaks scripts.
            allow_abbrev=False,
            # Keeps the line breaks of description and epilog; help of flags is wrapped all the same.
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._stray = stray
        self.add_argument("--version", action="version", version=f"picogpt {__version__}")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse `argv` (None: the process's own arguments); reject an unknown flag and suggest a known one."""
        arguments = sys.argv[1:] if argv is None else list(argv)
        # Before argparse, which would take the value of an unknown flag for a positional argument and complain about that.
        # An argument with a space is a prompt, whatever it begins with.
        for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
            flag = argument.partition("=")[0]
            if flag.startswith("--") and " " not in argument and not self.has_flag(flag):
                self._reject(argument)
        parsed, unknown = self.parse_known_args(arguments)
        # Left over: short flags that do not exist, and positional arguments that no flag takes.
        if unknown:
            self._reject(unknown[0])
        return parsed

    def has_flag(self, flag: str) -> bool:
        """Whether the command has this flag."""
        return flag in self._option_string_actions  # argparse has no public way to ask

    def _reject(self, argument: str) -> NoReturn:
        if not argument.startswith("-"):
            self.error(f"unexpected argument {argument!r}" + (f"; {self._stray}" if self._stray else ""))
        flag = argument.partition("=")[0]
        suggestion = self._suggest(flag)
        self.error(f"unknown flag {flag}" + (f"; {suggestion}" if suggestion else ""))

    def _suggest(self, flag: str) -> str:
        """Return a question that names our flag for another program's name, else the flag with the most similar name, if any."""
        name = flag.lstrip("-").replace("_", "-").lower()  # --learning_rate and -lr count too
        for ours, others in _SYNONYMS.items():
            if name in others and self.has_flag(ours):
                return f"did you mean {ours}?"
        return did_you_mean(f"--{name}", self._option_string_actions)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line."""
        # argparse would print the whole usage, of 20 lines in picogpt-train, above the message.
        self.exit(_WRONG_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def count(text: str) -> int:
    """Parse the value of a flag that takes a whole number, such as 2000000 or 2M.

    Raises:
        argparse.ArgumentTypeError: the value is not a whole number.
    """
    try:
        return parse_count(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error  # argparse puts the flag in front


def number(text: str) -> float:
    """Parse the value of a flag that takes a number.

    Raises:
        argparse.ArgumentTypeError: the value is not a number.
    """
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error


def add_setting(
    group: argparse._ActionsContainer, *names: str, meaning: str, kind: Callable[[str], Any] = int, default: float | None = None
) -> None:
    """Add a flag that takes one value of type int, float or str; its metavar follows from the type."""
    parsers: Mapping[Callable[[str], Any], Callable[[str], Any]] = {int: count, float: number}
    group.add_argument(*names, metavar=_METAVARS[kind], type=parsers.get(kind, kind), default=default, help=meaning)


def add_model(flags: argparse._ActionsContainer) -> None:
    """Add the flags that name a trained model."""
    flags.add_argument(
        "-m",
        "--model",
        metavar="RUN",
        help="a run's name, its folder, or a .safetensors file (default: the most recently saved run in the logs folder, else a "
        "bundled model)",
    )
    flags.add_argument("--logs-dir", metavar="DIR", type=Path, default=LOGS_DIR, help="folder of all runs (default: logs)")
