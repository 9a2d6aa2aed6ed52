"""`picogpt-generate`: have a trained model go on with a text, or talk to it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from picogpt.checks import ENGINE_DTYPES, check_threads, parse_new_tokens
from picogpt.cli.common import notice, run_command
from picogpt.cli.parser import Parser, add_model, count
from picogpt.config import GenerateConfig, SampleConfig, TextConfig
from picogpt.encodings import decode_text, normalize_newlines
from picogpt.errors import ConfigError, DataError
from picogpt.signals import StopRequest

if TYPE_CHECKING:
    from picogpt.inference import Engine

__all__ = ["build_parser", "main"]

_STDIN = "-"
_BETWEEN_SAMPLES = "---\n"


def build_parser() -> Parser:
    """The parser."""
    draw, make = SampleConfig(), GenerateConfig()
    parser = Parser(
        "picogpt-generate",
        "Generate text from a prompt with a trained model, character by character. Without a prompt a pipe is read;\n"
        "on a terminal each line you type is a prompt (Ctrl-C stops the text, Ctrl-D leaves).",
        'Example: picogpt-generate "the lamp was out, and"',
        stray="put a prompt of several words in quotes",
    )
    prompt = parser.add_argument_group("prompt")
    source = prompt.add_mutually_exclusive_group()
    source.add_argument("text", metavar="TEXT", nargs="?", help="text to continue (default: a pipe, else a loop)")
    source.add_argument(
        "-p", "--prompt", metavar="TEXT", help="the same, also where it begins with a dash: --prompt=-TEXT (default: none)"
    )
    source.add_argument("-f", "--prompt-file", metavar="FILE", help="file to continue, - for stdin (default: none)")
    prompt.add_argument("--chat", action="store_true", help="prompts are questions, <Q>...</Q>, and texts answers, <A>...</A>")
    model = parser.add_argument_group("model")
    add_model(model)
    model.add_argument(
        "--hop",
        metavar="N",
        type=count,
        help="stride between windows in characters; a smaller one is slower (default: 15/16 of a window)",
    )
    model.add_argument(
        "--threads", metavar="N", type=count, help="threads, which change the speed and not the text (default: one a core)"
    )
    model.add_argument(
        "--dtype",
        metavar="TYPE",
        choices=ENGINE_DTYPES,
        default="auto",
        help=f"type of the weights: {', '.join(ENGINE_DTYPES)}; auto is bfloat16 (default: auto)",
    )
    sampling = parser.add_argument_group("sampling")
    number = _number_flags(sampling)
    number(
        "-t",
        "--temperature",
        float,
        draw.temperature,
        "divides the logits: lower is more predictable, 0 always takes the likeliest character",
    )
    number("-k", "--top-k", int, draw.top_k, "sample from the N likeliest characters, 0 from all")
    number("", "--top-p", float, draw.top_p, "sample from the likeliest characters that together reach this probability")
    number("", "--min-p", float, draw.min_p, "sample from characters with at least X times the top probability")
    sampling.add_argument(
        "-s", "--seed", metavar="N", type=count, help="random seed; the same seed gives the same text (default: a new one)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "-n", "--max-new-tokens", metavar="N", default=str(make.max_new_tokens), help="characters, or inf (default: %(default)s)"
    )
    _number_flags(output)("", "--num-samples", int, make.num_samples, "texts generated in parallel, printed one after the other")
    output.add_argument("--stop", metavar="TEXT", nargs="+", default=[], help="end before any of these (default: none)")
    output.add_argument("--no-echo", action="store_true", help="show the new text only, without the prompt")
    output.add_argument("--json", action="store_true", help="one JSON object a sample, on a line")
    return parser


def _number_flags(group: argparse._ArgumentGroup):  # type: ignore[no-untyped-def]
    """Adds a flag that takes a number and says its default."""

    def add(short: str, flag: str, kind: type, default: float, meaning: str) -> None:
        metavar = "N" if kind is int else "X"
        names = [short, flag] if short else [flag]
        group.add_argument(
            *names,
            metavar=metavar,
            type=count if kind is int else kind,
            default=default,
            help=f"{meaning} (default: {default:g})",
        )

    return add


def main(argv: list[str] | None = None) -> int:
    """Run the command on `argv` (None: the process's own arguments) and return its exit code."""
    return run_command(_generate, build_parser(), argv)


def _generate(arguments: argparse.Namespace) -> int:
    draw = SampleConfig(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=secrets.randbits(32) if arguments.seed is None else arguments.seed,
    )
    make = GenerateConfig(
        max_new_tokens=parse_new_tokens(arguments.max_new_tokens),
        hop=arguments.hop,
        num_samples=arguments.num_samples,
        stop=tuple(arguments.stop),
    )
    if arguments.json and make.max_new_tokens is None:
        raise ConfigError("max_new_tokens must be a number with --json, got 'inf'", "max_new_tokens")
    if arguments.prompt is None:
        arguments.prompt = arguments.text
    at_terminal = arguments.prompt is None and arguments.prompt_file is None and sys.stdin is not None and sys.stdin.isatty()
    for name, given in (("json", arguments.json), ("num_samples", make.num_samples > 1)):
        if at_terminal and given:
            raise ConfigError(f"{name} needs a prompt: give one with -p, -f or through a pipe", name)
    from picogpt.inference import Engine
    from picogpt.runs.find import find_model
    from picogpt.runs.folder import load_text_config

    if sys.stdout is None:
        raise DataError("standard output is closed; there is nowhere to write to")
    path, chosen = find_model(arguments.model, arguments.logs_dir)
    engine = Engine.load(path, threads=check_threads(arguments.threads), dtype=arguments.dtype, notify=notice)
    notice(f"{chosen}, seed {draw.seed}, {engine.dtype}, threads {engine.threads}")
    hop = make.hop_for(engine.config.context_len)
    writer = _Writer(engine, load_text_config(path), draw, make, hop, chat=arguments.chat)
    if at_terminal:
        return _loop(writer)
    prompt = _read_prompt(arguments)
    if arguments.json:
        for sample in writer.samples(prompt):
            print(json.dumps({"model": str(path), "seed": draw.seed, **sample}), flush=True)
    elif make.num_samples > 1:
        echo = "" if arguments.no_echo or arguments.chat else writer.shown(prompt)
        print(_BETWEEN_SAMPLES.join(f"{echo}{sample['text']}\n" for sample in writer.samples(prompt)), end="", flush=True)
    else:
        writer.write(prompt, echo=not arguments.no_echo and not arguments.chat)
    return 0


def _read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        return _decode_argument(arguments.prompt)
    source = "the prompt"
    if arguments.prompt_file not in {None, _STDIN}:
        source = arguments.prompt_file
        try:
            content = Path(arguments.prompt_file).read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(f"{arguments.prompt_file}: cannot be read ({error}); check the path of --prompt-file") from error
    else:
        content = b"" if sys.stdin is None else sys.stdin.buffer.read()
    # As in training, and without the newline that editors and echo put at the end.
    return decode_text(content, name=source, notify=notice).removesuffix("\n")


def _decode_argument(text: str) -> str:
    """A prompt from the command line or the terminal, read as a file with these bytes is."""
    try:
        text.encode()
    except UnicodeEncodeError:  # Python stands surrogates for bytes that are not UTF-8
        return decode_text(os.fsencode(text), name="the prompt", notify=notice)
    return normalize_newlines(text)


def _read_line() -> str:
    """A line from the terminal; the prompt's mark is no result and goes to stderr where stdout is none."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _enable_line_editing() -> None:
    """Give input() line editing, and have text that is pasted taken for one prompt, whatever number of lines it has.

    GNU readline asks the terminal to mark what is pasted (bracketed paste); Python switches that off. Other libraries lack it.
    """
    with contextlib.suppress(ImportError):
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


def _loop(writer: _Writer) -> int:
    """Take prompts from a terminal until Ctrl-D; in a chat the conversation is kept."""
    _enable_line_editing()
    while True:
        try:
            prompt = _decode_argument(_read_line())
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            continue
        stop = StopRequest(["SIGINT"])
        with stop.listen():
            writer.write(prompt, echo=False, stop=stop)


@dataclass
class _Writer:
    """Turns prompts into texts, as the flags say."""

    engine: Engine
    text: TextConfig | None
    """The text that the model was trained on, where its file names it."""
    draw: SampleConfig
    make: GenerateConfig
    hop: int
    chat: bool

    def __post_init__(self) -> None:
        from picogpt.inference.generate import suppressed_ids
        from picogpt.tokenizer import SPECIAL_IDS, CharTokenizer, TextEncoder, encode_stop

        self.tokenizer = CharTokenizer()
        # A model of an earlier version has read as <?> what is folded now. It knows the letters all the same.
        self._encoder = TextEncoder(fold=self.text is None or self.text.fold)
        self._never = suppressed_ids(self.text, chat=self.chat)
        if self.chat and (self.text is None or SPECIAL_IDS["<A>"] not in self.text.ids):
            notice("warning: --chat: this model is not known to be trained on questions and answers, so expect no answers of it")
        self._conversation: list[int] = []
        self._turns = 0
        self._stops = [encode_stop(self._encoder, _decode_argument(stop)) for stop in self.make.stop]
        if self.chat:
            self._stops.append([SPECIAL_IDS["</A>"]])

    def shown(self, prompt: str) -> str:
        """The prompt as the model sees it."""
        return self.tokenizer.decode(self._encoder.encode(prompt))

    def write(self, prompt: str, *, echo: bool, stop: StopRequest | None = None) -> None:
        """Write one text to stdout, character by character, until `stop` says so at the latest."""
        ids_to_read = self._prompt_ids(prompt)  # first, as it can have something to say
        if echo:
            sys.stdout.write(self.shown(prompt))
            sys.stdout.flush()
        made: list[int] = []
        for (ids,), _ in self._ids(ids_to_read, 1):
            made += ids
            sys.stdout.write(self.tokenizer.decode(ids))
            sys.stdout.flush()
            if stop is not None and stop():
                break
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._remember(made)

    def samples(self, prompt: str) -> list[dict[str, object]]:
        """All samples of one prompt, whole, with what ended each: a stop text or the length."""
        steps = list(self._ids(self._prompt_ids(prompt), self.make.num_samples))
        _, stopped = steps[-1]
        texts = [[token for parts, _ in steps for token in parts[i]] for i in range(self.make.num_samples)]
        return [
            {"sample": i, "prompt": prompt, "text": self.tokenizer.decode(text), "finish_reason": "stop" if done else "length"}
            for i, (text, done) in enumerate(zip(texts, stopped, strict=True))
        ]

    def _ids(self, ids: Sequence[int], count: int) -> Iterator[tuple[list[list[int]], list[bool]]]:
        """New ids of `count` texts after `ids` as they become certain, and which texts have come to a stop."""
        import numpy as np

        from picogpt.inference.generate import Sampler, continue_prompt
        from picogpt.rng import sample_generator

        assert self.draw.seed is not None
        # Each turn of a loop has draws of its own.
        generators = [sample_generator(self.draw.seed, self._turns * self.make.num_samples + i) for i in range(count)]
        self._turns += 1
        sampler = Sampler(self.draw, generators, self._never)
        prompt, n_new = np.array(ids, np.uint8), self.make.max_new_tokens
        return continue_prompt(self.engine, prompt, n_new, hop=self.hop, sampler=sampler, stops=self._stops)

    def _prompt_ids(self, prompt: str) -> Sequence[int]:
        """The ids to read before the first new one: the end of the prompt, or of the conversation with a new question."""
        from picogpt.tokenizer import Tally

        self._encoder.tally = Tally()
        ids: list[int] = self._encoder.encode(prompt).tolist()
        if losses := self._encoder.tally.losses():
            notice(f"prompt: {'; '.join(losses)}")
        newline = self.tokenizer.encode("\n").tolist()
        if self.chat:
            from picogpt.tokenizer import SPECIAL_IDS

            self._conversation += [SPECIAL_IDS["<Q>"], *ids, SPECIAL_IDS["</Q>"], *newline, SPECIAL_IDS["<A>"]]
            ids = self._conversation
        from picogpt.inference.generate import MAX_PROMPT_WINDOWS

        longest = MAX_PROMPT_WINDOWS * self.engine.config.context_len
        if len(ids) > longest:
            notice(f"of the prompt's {len(ids):,} characters the model reads the last {longest:,}")
        return ids[-longest:] or newline  # a text begins where a line does

    def _remember(self, answer: Sequence[int]) -> None:
        """Keep an answer as part of the conversation."""
        if self.chat:
            from picogpt.tokenizer import SPECIAL_IDS

            self._conversation += [*answer, SPECIAL_IDS["</A>"], *self.tokenizer.encode("\n").tolist()]


if __name__ == "__main__":
    sys.exit(main())
