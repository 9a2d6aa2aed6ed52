"""`picogpt-export`: write one HTML file that runs a trained model in a browser."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from picogpt.cli.common import notice, run_command
from picogpt.cli.parser import Parser, add_model
from picogpt.errors import ConfigError

__all__ = ["build_parser", "main"]


def build_parser() -> Parser:
    """The parser."""
    parser = Parser(
        "picogpt-export",
        "Write a trained model into one HTML file that runs it in a browser, offline. Prints the file's path.\n"
        "The page writes on from a prompt and shows probabilities, attention and the context roll.",
        "Example: picogpt-export -m wikipedia wikipedia.html",
    )
    parser.add_argument("page", metavar="PAGE", type=Path, help="the file to write; its name ends in .html")
    add_model(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command on `argv` (None: the process's own arguments) and return its exit code."""
    return run_command(_export, build_parser(), argv)


def _export(arguments: argparse.Namespace) -> int:
    page: Path = arguments.page
    _check_page(page)
    from picogpt.export.model_page import ModelView, render_model_page
    from picogpt.files import atomic_write
    from picogpt.runs.find import find_model
    from picogpt.runs.folder import LOG_FILE, load_text_config, open_model, read_log

    path, chosen = find_model(arguments.model, arguments.logs_dir)
    log = path.with_name(LOG_FILE)
    with open_model(path) as (config, arrays):
        view = ModelView(
            name=path.resolve().parent.name,
            config=config,
            arrays=arrays,
            text=load_text_config(path),
            log=read_log(log) if log.exists() else None,
        )
        # A folder's name may hold bytes that are no text.
        content = render_model_page(view).encode("utf-8", "replace")
    atomic_write(page, content)
    notice(f"{chosen}: {len(content) / 1e6:.2f} MB written; open it in a browser")
    print(page)
    return 0


def _check_page(page: Path) -> None:
    """Reject a page that could not be written, before the work.

    Raises:
        ConfigError: its name does not end in .html, or its folder is not there or cannot be written to.
    """
    if page.suffix.lower() != ".html":
        raise ConfigError(f"PAGE must end in .html, got {str(page)!r}")
    if not page.parent.is_dir():
        raise ConfigError(f"PAGE: there is no folder {page.parent}; make it first")
    if page.is_dir() or not os.access(page.parent, os.W_OK):
        raise ConfigError(f"PAGE: {page} cannot be written; name another file")


if __name__ == "__main__":
    sys.exit(main())
