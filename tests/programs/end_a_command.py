"""A command that prints a line and then ends in a way that is named: done, interrupted or broken."""

import argparse
import sys

from picogpt.cli.common import run_command
from picogpt.cli.parser import Parser

ERRORS = {"interrupted": KeyboardInterrupt(), "broken": BrokenPipeError(32, "Broken pipe")}


def body(_: argparse.Namespace) -> int:
    """What the command does."""
    print("a text")
    if sys.argv[1] in ERRORS:
        raise ERRORS[sys.argv[1]]
    return 0


sys.exit(run_command(body, Parser("prog", ""), []))
