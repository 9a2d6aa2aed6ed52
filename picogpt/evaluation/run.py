"""An evaluation from the model file to the report: find the text, score it under all conditions, compute the baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from picogpt.alphabet import Alphabet
from picogpt.config import EngineDType, EvalConfig, TextRequest
from picogpt.data.resolve import Console
from picogpt.evaluation.baselines import NGRAM_CHARS, NGram, compressed_bits, ngram_order
from picogpt.evaluation.evaluate import Advance, chars_to_read, evaluate, evaluate_as_is
from picogpt.evaluation.report import Report
from picogpt.evaluation.scores import EvalSequences, Losses, Scores, cut_sequences
from picogpt.evaluation.texts import EvalText, TrainedRun, find_eval_text, find_ngram_text
from picogpt.ids import Ids
from picogpt.inference import Engine
from picogpt.threads import choose_threads
from picogpt.wording import Notify, plural

__all__ = ["Evaluation"]

_FEW_SAMPLES = 10
"""Articles or stretches below which the standard errors are reported as uncertain."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation of one model.

    Args:
        path: the model file.
        text: the requested text; an empty request takes the run's validation text.
        ngram_paths: files to count the n-gram on; empty for the run's training text.
        config: amount of text, and length of the sequences.
        dtype: type of the weights.
        threads: number of threads; None takes one per core.
        console: receives a line about each stage, and the progress of downloads.
        progress: opens a display of the characters read, given their number.
    """

    path: Path
    text: TextRequest
    ngram_paths: Sequence[str]
    config: EvalConfig
    dtype: EngineDType
    threads: int | None
    console: Console
    progress: Callable[[int], AbstractContextManager[Advance]]

    def report(self) -> Report:
        """Find the text, score it, and compute the baselines on the same characters.

        Raises:
            PicoGPTError: the model or a text is missing, damaged or too short.
        """
        engine = self._load_engine(self.dtype)
        trained = TrainedRun.of_model(self.path)
        chars, sequence_len = self.config.chars, self.config.windows * engine.config.context_len  # T
        text = find_eval_text(trained, self.text, sequence_len=sequence_len, chars=chars, console=self.console)
        sequences = cut_sequences(text.articles, sequence_len, chars)
        self.console.notify(_describe(text, sequences))
        # Found before the long part of the work, so that a wrong path is reported at once.
        ngram_text = find_ngram_text(trained, text, self.ngram_paths, self.console)
        losses = self._score(engine, sequences)
        ngram, ngram_losses = _count_ngram(ngram_text, sequences, trained.alphabet)
        self.console.notify(ngram)
        # Baselines see the same characters, so that their differences to the model are paired.
        if ngram_losses is not None:
            losses["ngram"] = ngram_losses.reshape(losses["as_is"].shape)  # (R, T) -> (R, W, n)
        return Report(
            model=str(self.path),
            text=text.name,
            part=text.description,
            unit=text.unit,
            dtype=engine.dtype,
            scores=Scores(losses, sequences.article_of),
            compressors=compressed_bits(sequences.ids[:, 1:].reshape(-1), trained.alphabet),  # (R x T,), the scored characters
            ngram=ngram,
            ngram_order=ngram_order(trained.alphabet.vocab_size),
        )

    def _load_engine(self, dtype: EngineDType) -> Engine:
        notify: Notify = self.console.notify
        chosen = choose_threads(self.threads)
        engine = Engine.load(self.path, threads=chosen.count, dtype=dtype, notify=notify)
        notify(f"computing in {engine.dtype} with {plural(chosen.count, 'thread')} ({chosen.reason})")
        return engine

    def _score(self, engine: Engine, sequences: EvalSequences) -> dict[str, Losses]:
        """Return the losses (R, W, n) by condition; with a type other than float32 also those in float32."""
        with self.progress(chars_to_read(sequences, engine.config.context_len)) as advance:
            losses = evaluate(engine, sequences, advance=advance)
        if engine.dtype != "float32":
            # Measured on the same characters, so the difference is the cost of rounding the weights.
            self.console.notify("scoring with the context vector as it is again, in float32")
            reference = self._load_engine("float32")
            with self.progress(sequences.n_chars) as advance:
                losses["float32"] = evaluate_as_is(reference, sequences, advance=advance)
        return losses


def _count_ngram(text: tuple[str, Ids] | str, sequences: EvalSequences, alphabet: Alphabet) -> tuple[str, Losses | None]:
    """Return a line about the n-gram and its losses (R, T), given a text's name and ids; or, given a reason, None for losses."""
    if isinstance(text, str):  # the reason why there is no text
        return f"no n-gram: {text}", None
    name, ids = text
    counted = NGram(ids, alphabet.vocab_size)
    # A long text is counted in part only, which has to be said next to the score.
    cap = f", the first {NGRAM_CHARS:,} of {len(ids):,}" if len(ids) > NGRAM_CHARS else ""
    return f"n-gram counted on {name}: {counted.n_chars:,} characters{cap}", counted.losses(sequences.ids)


def _describe(text: EvalText, sequences: EvalSequences) -> str:
    """Return a line about the source and the amount of text that is scored."""
    R, T = len(sequences.ids), sequences.ids.shape[1] - 1  # the last character is only a target
    # Standard errors are over articles; a text without articles is cut into stretches of the same role.
    why = "" if text.unit == "articles" else "; the text has no articles, so it is cut into stretches"
    few = f"; {sequences.n_articles} {text.unit} are few for a standard error" if sequences.n_articles < _FEW_SAMPLES else ""
    return (
        f"{text.name}, {text.description}: {R:,} sequences of {T:,} characters from {sequences.n_articles:,} of "
        f"{len(text.articles):,} {text.unit}, {sequences.n_chars:,} characters{why}{few}"
    )
