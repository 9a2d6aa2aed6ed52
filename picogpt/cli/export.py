"""`picogpt-export`: write one HTML file that runs a trained model in a browser."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from picogpt.cli.common import check_writable, notice, run_command
from picogpt.cli.parser import Parser, add_model
from picogpt.errors import ConfigError

__all__ = ["build_parser", "main"]


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "picogpt-export",
        "Export a trained model as one HTML file that runs it in a browser, offline.\n"
        "The page continues a prompt and shows probabilities, attention and the context\n"
        "roll. Prints the path of the file.",
        "Example: picogpt-export -m wikipedia wikipedia.html",
    )
    parser.add_argument("page", metavar="PAGE", type=Path, help="file to write, .html")
    add_model(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command on `argv` (None: the process's own arguments) and return its exit code."""
    return run_command(_export, build_parser(), argv)


def _export(arguments: argparse.Namespace) -> int:
    page: Path = arguments.page
    if page.suffix.lower() != ".html":
        raise ConfigError(f"PAGE must end in .html, got {str(page)!r}")
    check_writable(page, "PAGE")
    # Imported after the checks, so that a wrong argument answers at once.
    from picogpt.export.model_page import ModelView, render_model_page
    from picogpt.files import atomic_write
    from picogpt.runs.find import find_model
    from picogpt.runs.folder import LOG_FILE, load_text_config, open_model, read_log

    path, chosen = find_model(arguments.model, arguments.logs_dir)
    log = path.with_name(LOG_FILE)
    with open_model(path) as (config, arrays):
        view = ModelView(
            name=path.resolve().parent.name,  # the run's name, also for a path like ./model.safetensors
            config=config,
            arrays=arrays,
            text=load_text_config(path),
            log=read_log(log) if log.exists() else None,  # a model file alone has no log
        )
        # A folder's name may contain bytes that are not UTF-8, which Python represents by surrogates.
        content = render_model_page(view).encode("utf-8", "replace")
    atomic_write(page, content)
    notice(f"{chosen}: {len(content) / 1e6:.2f} MB written; open it in a browser")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
