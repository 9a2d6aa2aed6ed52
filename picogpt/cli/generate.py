"""`picogpt-generate`: continue a prompt with a trained model, or chat with it."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from picogpt.checks import ENGINE_DTYPES, check_threads, parse_new_tokens
from picogpt.cli.common import notice, run_command
from picogpt.cli.parser import Parser, add_model, add_setting
from picogpt.cli.shades import LEGEND, can_shade, shade
from picogpt.config import GenerateConfig, SampleConfig
from picogpt.encodings import decode_text, normalize_newlines
from picogpt.errors import ConfigError, DataError
from picogpt.signals import StopRequest, deferred_interrupt

if TYPE_CHECKING:
    from picogpt.inference.prompts import TextGenerator

__all__ = ["build_parser", "main"]

_STDIN = "-"
_SEPARATOR = "---\n"  # between the texts of --num-samples
_DECIMALS = 6  # of a probability in JSON


def build_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "picogpt-generate",
        "Generate text from a prompt with a trained model, character by character.\n"
        "Without a prompt, a pipe is read; on a terminal, each line you type is a prompt\n"
        "(Ctrl-C stops the text, Ctrl-D quits).",
        'Example: picogpt-generate "the lamp was out, and"',
        stray="put a prompt of several words in quotes",
    )
    _add_prompt(parser)
    _add_model(parser)
    _add_sampling(parser)
    _add_output(parser)
    return parser


def _add_prompt(parser: Parser) -> None:
    prompt = parser.add_argument_group("prompt")
    source = prompt.add_mutually_exclusive_group()
    source.add_argument("text", metavar="TEXT", nargs="?", help="text to continue (default: read a pipe or the terminal)")
    source.add_argument(
        "-p", "--prompt", metavar="TEXT", help="the same; --prompt=-TEXT for text with a dash in front (default: none)"
    )
    source.add_argument("-f", "--prompt-file", metavar="FILE", help="file to continue, - for stdin (default: none)")
    prompt.add_argument("--chat", action="store_true", help="ask questions, <Q>...</Q>, and generate answers, <A>...</A>")


def _add_model(parser: Parser) -> None:
    model = parser.add_argument_group("model")
    add_model(model)
    add_setting(
        model, "--hop", meaning="stride between windows in characters; a smaller one is slower (default: 15/16 of a window)"
    )
    add_setting(model, "--threads", meaning="threads; the text does not depend on their number (default: one per core)")
    model.add_argument(
        "--dtype",
        metavar="TYPE",
        choices=ENGINE_DTYPES,
        default="auto",
        help=f"type of the weights: {', '.join(ENGINE_DTYPES)}; auto is bfloat16, or float32 without a compiler (default: auto)",
    )


def _add_sampling(parser: Parser) -> None:
    draw = SampleConfig()
    sampling = parser.add_argument_group("sampling")
    meaning = "divides the logits: lower is more predictable, 0 always takes the likeliest character (default: %(default)g)"
    add_setting(sampling, "-t", "--temperature", kind=float, default=draw.temperature, meaning=meaning)
    meaning = "sample from the N likeliest characters, 0 from all (default: %(default)s)"
    add_setting(sampling, "-k", "--top-k", default=draw.top_k, meaning=meaning)
    meaning = "sample from the likeliest characters that together reach this probability (default: %(default)g)"
    add_setting(sampling, "--top-p", kind=float, default=draw.top_p, meaning=meaning)
    meaning = "sample from characters with at least X times the top probability (default: %(default)g)"
    add_setting(sampling, "--min-p", kind=float, default=draw.min_p, meaning=meaning)
    add_setting(sampling, "-s", "--seed", meaning="random seed; the same seed gives the same text (default: a new one)")


def _add_output(parser: Parser) -> None:
    make = GenerateConfig()
    output = parser.add_argument_group("output")
    output.add_argument(
        "-n", "--max-new-tokens", metavar="N", default=str(make.max_new_tokens), help="characters, or inf (default: %(default)s)"
    )
    meaning = "texts generated in parallel, printed one after the other (default: %(default)s)"
    add_setting(output, "--num-samples", default=make.num_samples, meaning=meaning)
    output.add_argument("--stop", metavar="TEXT", nargs="+", default=[], help="end before any of these texts (default: none)")
    output.add_argument("--no-echo", action="store_true", help="print the new text only, without the prompt")
    output.add_argument("--json", action="store_true", help="print one line of JSON per sample")
    output.add_argument(
        "--show-probs",
        action="store_true",
        help="shade each character by its probability, on a terminal and without NO_COLOR; with --json add the probabilities and "
        "the ten likeliest characters",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command on `argv` (None: the process's own arguments) and return its exit code."""
    return run_command(_generate, build_parser(), argv)


def _generate(arguments: argparse.Namespace) -> int:
    sampling, generation = _settings(arguments)  # validated before the model is loaded
    if arguments.prompt is None:
        arguments.prompt = arguments.text
    # No prompt and no pipe: prompts are typed, one after the other.
    at_terminal = arguments.prompt is None and arguments.prompt_file is None and sys.stdin is not None and sys.stdin.isatty()
    for name, given in (("json", arguments.json), ("num_samples", generation.num_samples > 1)):
        if at_terminal and given:
            raise ConfigError(f"{name} needs a prompt: give one with -p, -f or through a pipe", name)
    # Imported after the checks, so that a wrong flag answers at once.
    with deferred_interrupt():
        from picogpt.inference import Engine
        from picogpt.inference.prompts import TextGenerator
        from picogpt.runs.find import find_model
        from picogpt.runs.model_file import load_text_config

    if sys.stdout is None:
        raise DataError("standard output is closed; there is nowhere to write to")
    path, chosen = find_model(arguments.model, arguments.logs_dir)
    engine = Engine.load(path, threads=check_threads(arguments.threads), dtype=arguments.dtype, notify=notice)
    # Everything that is needed to repeat the text.
    notice(f"{chosen}, seed {sampling.seed}, {engine.dtype}, threads {engine.threads}")
    generator = TextGenerator(engine, load_text_config(path), sampling, generation, chat=arguments.chat, notify=notice)
    shades = arguments.show_probs and not arguments.json and can_shade(sys.stdout)
    if shades:
        notice(LEGEND)
    if at_terminal:
        return _loop(generator, shades=shades)
    prompt = _read_prompt(arguments)
    if arguments.json:
        for i, sample in enumerate(_json_samples(generator, prompt, show_probs=arguments.show_probs)):
            print(json.dumps({"model": str(path), "seed": sampling.seed, "sample": i, "prompt": prompt, **sample}), flush=True)
        return 0
    echo = "" if arguments.no_echo or arguments.chat else generator.normalize(prompt)
    _print_texts(generator, prompt, echo, several=generation.num_samples > 1, shades=shades)
    return 0


def _settings(arguments: argparse.Namespace) -> tuple[SampleConfig, GenerateConfig]:
    # A new seed is drawn here, so that it can be printed.
    sampling = SampleConfig(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=secrets.randbits(32) if arguments.seed is None else arguments.seed,
    )
    generation = GenerateConfig(
        max_new_tokens=parse_new_tokens(arguments.max_new_tokens),
        hop=arguments.hop,
        num_samples=arguments.num_samples,
        stop=tuple(map(_decode_argument, arguments.stop)),
    )
    # JSON is printed once a text is complete.
    if arguments.json and generation.max_new_tokens is None:
        raise ConfigError("max_new_tokens must be a number with --json, got 'inf'", "max_new_tokens")
    return sampling, generation


def _print_texts(generator: TextGenerator, prompt: str, echo: str, *, several: bool, shades: bool) -> None:
    """Print the texts that continue `prompt`, each after `echo`."""
    # Several texts are generated as a batch and printed once all are complete; a single one is printed as it grows.
    if not several:
        pieces = _stream(generator, prompt, shades=shades)
        _write(itertools.chain([echo], pieces))
    else:
        print(_SEPARATOR.join(f"{echo}{text}\n" for text in _samples(generator, prompt, shades=shades)), end="", flush=True)


def _json_samples(generator: TextGenerator, prompt: str, *, show_probs: bool) -> Iterator[dict[str, object]]:
    """Yield the fields of each sample, with `show_probs` those of its characters too."""
    if not show_probs:
        for text, is_stopped in generator.samples(prompt):
            yield {"text": text, "finish_reason": _reason(is_stopped)}
        return
    for characters, is_stopped in generator.sample_characters(prompt):
        yield {
            "text": "".join(character.text for character in characters),
            "finish_reason": _reason(is_stopped),
            "probabilities": [round(character.probability, _DECIMALS) for character in characters],
            "top": [[(text, round(p, _DECIMALS)) for text, p in character.top] for character in characters],
        }


def _reason(is_stopped: bool) -> str:
    return "stop" if is_stopped else "length"


def _samples(generator: TextGenerator, prompt: str, *, shades: bool) -> list[str]:
    """Return several texts, shaded or plain."""
    if shades:
        return [shade(characters) for characters, _ in generator.sample_characters(prompt)]
    return [text for text, _ in generator.samples(prompt)]


def _stream(generator: TextGenerator, prompt: str, stop: Callable[[], bool] = lambda: False, *, shades: bool) -> Iterator[str]:
    """Return the pieces of one text, shaded or plain."""
    return map(shade, generator.stream_characters(prompt, stop)) if shades else generator.stream(prompt, stop)


def _write(pieces: Iterable[str]) -> None:
    """Print a text piece by piece, and a newline, also after Ctrl-C: the shell's prompt belongs on its own line."""
    for piece in itertools.chain(pieces, ["\n"]):
        sys.stdout.write(piece)
        sys.stdout.flush()


def _read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        return _decode_argument(arguments.prompt)
    source = "the prompt"
    if arguments.prompt_file not in {None, _STDIN}:
        source = arguments.prompt_file
        try:
            content = Path(arguments.prompt_file).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{arguments.prompt_file}: cannot be read ({reason}); check the path of --prompt-file") from error
    else:
        content = b"" if sys.stdin is None else sys.stdin.buffer.read()
    # Decoded as in training. Editors and echo end a file with a newline, which is not meant as part of the prompt.
    return decode_text(content, name=source, notify=notice).removesuffix("\n")


def _decode_argument(text: str) -> str:
    """Decode a prompt from the command line or the terminal like a file with the same bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:  # Python represents bytes that are not UTF-8 by surrogates
        return decode_text(os.fsencode(text), name="the prompt", notify=notice)
    return normalize_newlines(text)


def _read_line() -> str:
    """Read a line from the terminal."""
    # The `> ` is not a result: if stdout is a file, print it to stderr.
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _enable_line_editing() -> None:
    """Enable line editing in input(), and bracketed paste: pasted text of several lines is one prompt."""
    with contextlib.suppress(ImportError):  # Windows has no readline
        import readline  # importing it enables line editing

        # GNU readline supports bracketed paste and Python switches it off; libedit lacks it.
        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


def _loop(generator: TextGenerator, *, shades: bool) -> int:
    """Read prompts from the terminal until Ctrl-D, and answer each; a chat keeps the conversation."""
    _enable_line_editing()
    notice("type a prompt; Ctrl-C ends a text, Ctrl-D the command")
    while True:
        try:
            prompt = _decode_argument(_read_line())
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            # As in a shell, Ctrl-C drops the line that is being typed.
            print()
            continue
        # While text is generated, Ctrl-C ends the text and not the command.
        stop = StopRequest(["SIGINT"])
        with stop.listen():
            _write(_stream(generator, prompt, stop, shades=shades))


if __name__ == "__main__":
    sys.exit(main())
