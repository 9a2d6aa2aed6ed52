"""The report of `picogpt-eval`: a table, a sentence and a JSON object."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picogpt.evaluation.baselines import NGRAM_ORDER
from picogpt.evaluation.scores import CONDITIONS, Estimate, Scores, position_bins

__all__ = ["Report"]

# Names of the losses that are not conditions.
_NGRAM, _FLOAT32 = "ngram", "float32"
_COMPRESSOR_LABELS: Mapping[str, str] = {
    "bz2": "bz2 -9, starting from nothing",
    "lzma": "lzma -9e, starting from nothing",
}
# Tables fit a terminal of 80 columns: the conditions have their full names as rows, and a word as columns.
_LINE = 80
_WIDTH = 34  # of the labels, which are the first column
_HEADINGS: Mapping[str, str] = {"as_is": "as it is", "zeroed": "zeroed", "other": "another", "sliding": "no roll"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The scores of a model on a text."""

    model: str
    """Path of the model."""
    text: str
    """Name of the text."""
    part: str
    """The part of the text that was scored."""
    unit: str
    """Samples of the standard errors: articles, or stretches."""
    dtype: str
    """Type of the weights."""
    scores: Scores
    """Losses by condition; also of the n-gram as `ngram` if there is one, and of `as_is` in float32 as `float32` if `dtype` is
    another type."""
    compressors: Mapping[str, float]
    """Bits per character, by name."""
    ngram: str
    """The text that the n-gram was counted on, or why there is none."""
    ngram_order: int = NGRAM_ORDER
    """Characters in an n-gram."""

    @property
    def n_articles(self) -> int:
        """Articles, or stretches, that sequences were cut from."""
        return int(self.scores.article_of[-1]) + 1

    def table(self) -> str:
        """Return the scores as text: overall, by window of the sequence, by position in the window, and the sentences."""
        # Parts with an empty line between them, as each has its own columns.
        sentences = [textwrap.fill(sentence, _LINE) for sentence in (self.sentence(), self.rounding_sentence()) if sentence]
        return "\n\n".join("\n".join(part) for part in (self._overall(), self._windows(), self._positions(), sentences))

    def title(self) -> str:
        """Return the title of the plot."""
        # The model's folder is the run's name; the file is called model.safetensors in every run.
        return (
            f"{Path(self.model).parent.name} on {self.text}: {self._chars:,} characters, "
            f"{self.n_articles:,} {self.unit}, with standard errors"
        )

    def sentence(self) -> str:
        """Return the gain from the context roll, and how the other conditions compare with it."""
        windows, _ = self._shape
        # All differences are to `as_is`. Window 0 is the same under all conditions, so it is left out.
        gain, other, plain = (self.scores.mean(name, minus="as_is", first_window=1) for name in ("zeroed", "other", "sliding"))
        # Two standard errors are about a 95% confidence interval.
        if abs(gain.nats) <= 2 * gain.error:
            meaning = "That is within two standard errors of zero: on this text the roll makes no measurable difference."
        elif gain.nats > 0:
            meaning = f"That is {gain.nats / self.scores.mean('zeroed', first_window=1).nats:.2%} of the loss."
        else:
            meaning = "The model does better without its context vector."
        return (
            f"Gain from the context roll: {gain.nats:.5f} +- {gain.error:.5f} nats per character ({gain.bits:.5f} bits) on "
            f"windows 1 to {windows - 1}, the loss with the context vector zeroed minus the loss with it. {meaning} The vector "
            f"of another article costs {_more(other)} than its own, and overlapping windows without a roll {_more(plain)}."
        )

    def rounding(self) -> Estimate | None:
        """Return the loss in `dtype` minus the loss in float32, paired by character; None in float32."""
        # Over all windows, unlike the conditions: rounding affects the first one too.
        return self.scores.mean("as_is", minus=_FLOAT32) if _FLOAT32 in self.scores.losses else None

    def rounding_sentence(self) -> str:
        """Return a sentence on the loss due to the type of the weights; empty in float32."""
        cost = self.rounding()
        if cost is None:
            return ""
        return f"In {self.dtype} a character costs {_more(cost)} nats than in float32, with the context vector as it is."

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        windows, context_len = self._shape
        single_bins = [(p, p) for p in range(1, context_len + 1)]  # the table has wider bins
        # Scripts read these keys: add new ones, never rename one. A sequence is called a roll here for that reason.
        return {
            "model": self.model,
            "text": {"name": self.text, "part": self.part, "rolls": len(self.scores.article_of), "characters": self._chars},
            "errors_over": {"unit": self.unit, "number": self.n_articles},
            "dtype": self.dtype,
            "more_than_float32": _plain(cost) if (cost := self.rounding()) else None,
            "windows": windows,
            "context_len": context_len,
            "scores": {
                name: {
                    **_plain(self.scores.mean(name)),
                    "by_window": [_plain(estimate) for estimate in self.scores.by_window(name)],
                    "by_position": [_plain(estimate) for estimate in self.scores.by_position(name, single_bins)],
                }
                for name in self.scores.losses
            },
            "more_than_as_is": {
                name: _plain(self.scores.mean(name, minus="as_is", first_window=1)) for name in CONDITIONS if name != "as_is"
            },
            "compressors": {name: {"bits": bits, "nats": bits * math.log(2)} for name, bits in self.compressors.items()},
            "ngram": self.ngram,
            "sentence": self.sentence(),
        }

    @property
    def _shape(self) -> tuple[int, int]:
        """Windows in a sequence, and characters in a window."""
        _, windows, context_len = self.scores.losses["as_is"].shape  # (R, W, n)
        return windows, context_len

    @property
    def _chars(self) -> int:
        return self.scores.losses["as_is"].size

    def _labels(self) -> Iterator[tuple[str, str]]:
        """Name and label of each row with a loss for every character; compressors have only a total."""
        yield from CONDITIONS.items()
        if _FLOAT32 in self.scores.losses:
            yield _FLOAT32, "as it is, in float32"
        if _NGRAM in self.scores.losses:
            yield _NGRAM, f"{self.ngram_order}-gram"

    def _overall(self) -> list[str]:
        rows = [f"{'':{_WIDTH}}  {'nats/char':>16}  {'bits':>6}  {'more*':>17}"]
        # The last column compares with the first row, so that row has none.
        for name, label in self._labels():
            mean = self.scores.mean(name)
            more = "" if name == "as_is" else _pair(self.scores.mean(name, minus="as_is", first_window=1), sign="+")
            rows.append(f"{label:{_WIDTH}}  {_pair(mean):>16}  {mean.bits:6.4f}  {more:>17}".rstrip())
        # Compressors give one number for the whole text, so their rows have no error.
        for name, bits_per_char in self.compressors.items():
            label = _COMPRESSOR_LABELS[name]
            rows.append(f"{label:{_WIDTH}}  {bits_per_char * math.log(2):<16.4f}  {bits_per_char:6.4f}".rstrip())
        windows, _ = self._shape
        footnote = f"* nats per character more than as it is, on windows 1 to {windows - 1}, paired"
        return [*rows, footnote, f"+- is a standard error over {self.unit}"]

    def _windows(self) -> list[str]:
        windows, _ = self._shape
        by_window = {name: self.scores.by_window(name) for name, _ in self._labels()}
        labels = [str(i) for i in range(windows)]
        return ["nats per character by window of the sequence", *self._columns("window", labels, by_window)]

    def _positions(self) -> list[str]:
        windows, context_len = self._shape
        bins = position_bins(context_len)  # eight rows for a window of 128
        labels = [f"{first}" if first == last else f"{first}-{last}" for first, last in bins]
        by_position = {name: self.scores.by_position(name, bins) for name, _ in self._labels()}
        title = f"nats per character by position in the window (characters seen), windows 1 to {windows - 1}"
        return [title, *self._columns("position", labels, by_position)]

    def _columns(self, heading: str, labels: Sequence[str], estimates: Mapping[str, Sequence[Estimate]]) -> list[str]:
        """Return a table with a row for each label and a column for each name, the first with its standard errors."""
        headings = {**_HEADINGS, _NGRAM: f"{self.ngram_order}-gram"}
        first, *others = (headings.get(name, name) for name in estimates)
        table = [_row(heading, [first, "+-", *others])]
        # The errors of the other columns are about the same.
        for label, (one, *rest) in zip(labels, zip(*estimates.values(), strict=True), strict=True):
            table.append(_row(label, [f"{value:.4f}" for value in (one.nats, one.error, *(other.nats for other in rest))]))
        return table


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label:>8}" + "".join(f"{cell:>10}" for cell in cells)


def _pair(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.nats:{sign}.4f} +- {estimate.error:.4f}"


# In words, as a sign is easily misread in a sentence.
def _more(estimate: Estimate) -> str:
    return f"{abs(estimate.nats):.5f} +- {estimate.error:.5f} {'less' if estimate.nats < 0 else 'more'}"


def _plain(estimate: Estimate) -> dict[str, float]:
    return {
        "nats": estimate.nats,
        "nats_error": estimate.error,
        "bits": estimate.bits,
        "bits_error": estimate.bits_error,
    }
