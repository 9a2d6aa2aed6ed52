"""`picogpt-export`: a trained model as a page for a browser, as a folder for transformers, or packed to be given away."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from picogpt.checks import check_new_folder, check_page
from picogpt.cli.common import notice, run_command
from picogpt.cli.parser import Parser, add_model

__all__ = ["build_parser", "main"]


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "picogpt-export",
        "Export a trained model. Prints the path of what was written.\n\n"
        "  html   one HTML file that runs the model in a browser, offline: it generates,\n"
        "         and shows probabilities, attention and the context roll\n"
        "  gpt2   a folder that transformers loads: the model without its context roll,\n"
        "         within one window\n"
        "  pack   a run folder to give away: weights in bfloat16, settings, log and\n"
        "         plot, no checkpoint",
        "Examples: picogpt-export -m wikipedia wikipedia.html\n"
        "          picogpt-export -m wikipedia --format gpt2 wikipedia-gpt2",
    )
    parser.add_argument("target", metavar="PAGE|FOLDER", type=Path, help="file to write, .html; for gpt2 and pack a new folder")
    parser.add_argument("--format", choices=_FORMATS, default="html", help="html, gpt2 or pack (default: html)")
    add_model(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command on `argv` (None: the process's own arguments) and return its exit code."""
    return run_command(_export, build_parser(), argv)


def _export(arguments: argparse.Namespace) -> int:
    target: Path = arguments.target
    if arguments.format == "html":
        check_page(target, "PAGE")
    else:
        check_new_folder(target)
    # Imported after the checks, so that a wrong argument answers at once.
    from picogpt.runs.find import find_model

    path, chosen = find_model(arguments.model, arguments.logs_dir)
    _FORMATS[arguments.format](path, chosen, target)
    print(target)
    return 0


def _write_page(path: Path, chosen: str, page: Path) -> None:
    from picogpt.export.model_page import ModelView, render_model_page
    from picogpt.files import atomic_write

    # A folder's name may contain bytes that are not UTF-8, which Python represents by surrogates.
    content = render_model_page(ModelView.read(path)).encode("utf-8", "replace")
    atomic_write(page, content)
    notice(f"{chosen}: {len(content) / 1e6:.2f} MB written; open it in a browser")


def _write_gpt2(path: Path, chosen: str, folder: Path) -> None:
    from picogpt.export.gpt2 import Gpt2Model, write_gpt2
    from picogpt.files import atomic_folder

    model = Gpt2Model.read(path)
    with atomic_folder(folder) as new:
        write_gpt2(model, new)
    notice(
        f"{chosen}: {_describe_files(folder)} written in GPT-2's layout\n"
        f"this is the model without its context roll, within one window of {model.config.context_len} characters; "
        "picogpt-eval measures what that costs\n"
        f"to upload it under a name of yours: hf upload NAME {shlex.quote(str(folder))}"
    )


def _write_pack(path: Path, chosen: str, folder: Path) -> None:
    from picogpt.export.pack import write_pack
    from picogpt.files import atomic_folder, atomic_write
    from picogpt.plot import draw_losses
    from picogpt.runs.folder import RunFolder

    with atomic_folder(folder) as new:
        log = write_pack(path, new)
        atomic_write(RunFolder(new).plot_path, draw_losses({folder.name: log}))
    notice(f"{chosen}: {_describe_files(folder)} written; picogpt-train --init-from trains on from it")


_FORMATS: Mapping[str, Callable[[Path, str, Path], None]] = {"html": _write_page, "gpt2": _write_gpt2, "pack": _write_pack}
"""Writers by format; each takes the model's file, its description, and the target."""


def _describe_files(folder: Path) -> str:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return f"{', '.join(sizes)} ({sum(sizes.values()) / 1e6:.2f} MB)"


if __name__ == "__main__":
    sys.exit(main())
