"""`picogpt-generate`: have a trained model go on with a text."""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path

from picogpt.cli.common import Parser, notice, run_command
from picogpt.config import SampleConfig, parse_new_tokens

__all__ = ["build_parser", "main"]


def build_parser() -> Parser:
    """The parser."""
    defaults = SampleConfig()
    parser = Parser(
        "picogpt-generate",
        "Write on from a prompt with a trained model. The text goes to stdout as it is made.",
        'Example: picogpt-generate -p "the lamp was out, and"',
    )
    parser.add_argument(
        "-p", "--prompt", metavar="TEXT", help="text to go on from (default: what comes through a pipe, else nothing)"
    )
    parser.add_argument(
        "-m",
        "--model",
        metavar="RUN",
        help="a run's name, its folder, or a .safetensors file (default: the run under the logs folder that was saved last)",
    )
    parser.add_argument("--logs-dir", metavar="DIR", type=Path, default=Path("logs"), help="where runs are kept (default: logs)")
    parser.add_argument(
        "-n", "--max-new-tokens", metavar="N", default="256", help="characters to write, or inf for no end (default: %(default)s)"
    )
    parser.add_argument(
        "-t",
        "--temperature",
        metavar="X",
        type=float,
        default=defaults.temperature,
        help="below 1 surer, above 1 wilder, 0 always the likeliest character (default: %(default)s)",
    )
    parser.add_argument(
        "-k",
        "--top-k",
        metavar="N",
        type=int,
        default=defaults.top_k,
        help="draw from the N likeliest, 0 from all (default: %(default)s)",
    )
    parser.add_argument(
        "-s", "--seed", metavar="N", type=int, help="seed of the draws: the same one gives the same text (default: a new one)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command on `argv` (None: the process's own arguments) and return its exit code."""
    return run_command(_generate, build_parser(), argv)


def _generate(arguments: argparse.Namespace) -> int:
    n_new = parse_new_tokens(arguments.max_new_tokens)
    config = SampleConfig(temperature=arguments.temperature, top_k=arguments.top_k, seed=arguments.seed)
    from picogpt.generate import generate_ids, make_generator
    from picogpt.reference import ReferenceModel
    from picogpt.run import find_model
    from picogpt.tokenizer import CharTokenizer

    tokenizer = CharTokenizer()
    path, chosen = find_model(arguments.model, arguments.logs_dir)
    model = ReferenceModel.load(path)
    seed = secrets.randbits(32) if config.seed is None else config.seed
    notice(f"{chosen}, seed {seed}")
    prompt = _read_prompt(arguments.prompt)
    unknown = tokenizer.unknown_characters(prompt)
    if unknown:
        commonest = ", ".join(repr(c) for c, _ in unknown.most_common(5))
        notice(f"{unknown.total():,} characters of the prompt are unknown to the model and become <?>: {commonest}")
    # A text begins where a line does.
    ids = tokenizer.encode(prompt or "\n").tolist()
    sys.stdout.write(tokenizer.decode(ids) if prompt else "")
    for token in generate_ids(model, ids, n_new, config, make_generator(seed)):
        sys.stdout.write(tokenizer.decode([token]))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return 0


def _read_prompt(prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    return sys.stdin.buffer.read().decode("utf-8", errors="replace")


if __name__ == "__main__":
    sys.exit(main())
