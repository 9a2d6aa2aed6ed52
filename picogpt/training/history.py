"""Samples and probabilities of each epoch, for the run's page: generated text, and how probable the model finds an excerpt.

Both are stored in `epochs.json` next to the loss log, one entry per epoch. Training does not depend on the file: if it is missing
or damaged, training continues and the page starts with the next epoch.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import Source, TextSource
from picogpt.device import instruction_set
from picogpt.errors import PicoGPTError
from picogpt.evaluation.baselines import NGram, compressed_bits, ngram_order
from picogpt.export.log_page import EpochView, RunView, pack_probabilities, render_page
from picogpt.files import atomic_write
from picogpt.kernels.compiled import kernels_name
from picogpt.runs.folder import RunFolder
from picogpt.runs.loss_log import LossLog
from picogpt.runs.names import EPOCHS_FILE
from picogpt.tokenizer import CharTokenizer
from picogpt.training.sample import sample_text
from picogpt.training.state import TrainState
from picogpt.wording import Notify, plural

__all__ = ["History", "describe_recipe", "describe_settings", "run_view", "target_probabilities"]

EXCERPT_CHARS = 400
"""Characters of the validation text that the page shades."""
COUNTED_CHARS = 2_000_000  # more would delay the first epoch
"""Maximum number of training characters to count the n-gram on."""
PREDICTED_CHARS = 256_000  # lzma is slow
"""Maximum number of validation characters for the losses of lzma and the n-gram."""


@dataclass
class History:
    """Samples and probabilities of a run's epochs."""

    excerpt: Sequence[str] = ()
    """The start of the validation text, one string for each id: an unknown character has several letters."""
    marks: dict[str, float] = field(default_factory=dict)
    """Losses of baselines on the validation text by name, in nats per character."""
    first: int = 1
    """Number of the first entry of `epochs`, counted from 1: a run of an older version has no entries for its first epochs."""
    epochs: list[EpochView] = field(default_factory=list)
    """Epochs in order, without gaps."""
    settings: dict[str, str] = field(default_factory=dict)
    """Settings of the run as text, by name, with the speed of the last epoch; a run of an older version has none."""

    @classmethod
    def read(cls, folder: Path) -> History:
        """Read the history of the run in `folder`; return an empty one if there is none or it is damaged."""
        # Not an error: the file has no influence on training, and the next epoch writes it again.
        try:
            content = json.loads((folder / EPOCHS_FILE).read_bytes())
            epochs = [EpochView(str(entry["sample"]), _unpack(entry["probabilities"])) for entry in content["epochs"]]
            marks = {str(name): float(value) for name, value in content["marks"].items()}
            settings = {str(name): str(value) for name, value in content.get("settings", {}).items()}
            # Older versions stored a single string, of which each letter was an id.
            return cls([str(piece) for piece in content["excerpt"]], marks, int(content["first"]), epochs, settings)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()

    def record(self, state: TrainState, source: Source, log: LossLog, notify: Notify) -> None:
        """Add the epoch that has just been validated.

        Args:
            state: the training state after the epoch.
            source: source of the run's text.
            log: the loss log, which contains the epoch already.
            notify: receives a line before something is compiled.
        """
        if not self.excerpt:
            self._begin(source)
        view = EpochView(sample_text(state.model, source.text, notify), state.excerpt_probabilities)
        before = self._epochs_until(len(log.val) - 1)
        if not before:
            self.first = len(log.val)
        self.epochs = [*before, view]
        self.settings = describe_settings(state, log)

    def _epochs_until(self, last: int) -> list[EpochView]:
        """Return the epochs up to number `last`, or an empty list if they do not reach it."""
        # After a crash, a run may be resumed before epochs that are stored here: they are dropped and trained again. Epochs that
        # could not be written are missing at the end; later ones would then have wrong numbers, so the list starts again.
        count = last - self.first + 1
        return self.epochs[:count] if 0 < count <= len(self.epochs) else []

    def _begin(self, source: Source) -> None:
        """Take the excerpt and compute the losses of the baselines, which do not change during the run."""
        val_ids, alphabet = source.val_ids[:PREDICTED_CHARS], source.text.alphabet
        # One more character than is shaded: the first has no prediction.
        tokenizer = CharTokenizer(alphabet)
        self.excerpt = [tokenizer.decode([token]) for token in val_ids[: EXCERPT_CHARS + 1].tolist()]
        self.marks = {"lzma": compressed_bits(val_ids, alphabet)["lzma"] * math.log(2)}
        # A stream has no training text in memory to count an n-gram on.
        if isinstance(source, TextSource):
            losses = NGram(source.train_ids[:COUNTED_CHARS], alphabet.vocab_size).losses(val_ids[None])
            self.marks[f"{ngram_order(alphabet.vocab_size)}-gram"] = float(losses.mean())

    def write(self, folder: Path) -> None:
        """Write `epochs.json`.

        Raises:
            OSError: the file cannot be written.
        """
        content: dict[str, Any] = {
            "excerpt": self.excerpt,
            "marks": self.marks,
            "first": self.first,
            "settings": self.settings,
            "epochs": [{"sample": view.sample, "probabilities": pack_probabilities(view.probabilities)} for view in self.epochs],
        }
        # The whole file at each epoch: it has about a kilobyte per epoch.
        atomic_write(folder / EPOCHS_FILE, json.dumps(content).encode())

    def page(self, name: str, state: TrainState, log: LossLog, *, in_training: bool) -> str:
        """Return the content of the run's `log.html`."""
        self.settings = describe_settings(state, log)
        return render_page([replace(self.view(name, log), in_training=in_training, written=time.time())])

    def view(self, name: str, log: LossLog) -> RunView:
        """Return the content of the page of a run that is not in training.

        Args:
            name: the run's name.
            log: its loss log.
        """
        return RunView(
            name=name,
            log=log,
            epochs=self._epochs_until(len(log.val)),
            excerpt=self.excerpt,
            marks=self.marks,
            settings=self.settings,
        )


def run_view(name: str, folder: Path, log: LossLog) -> RunView:
    """Return the content of the page of the run in `folder`, as far as its files are there; without its history, the curve."""
    view = History.read(folder).view(name, log)
    if view.settings:
        return view
    try:
        settings = RunFolder(folder).read_settings()
    except PicoGPTError:
        return view  # a log without its run
    return replace(view, settings=describe_recipe(settings.model, settings.train))


def _unpack(text: str) -> list[float]:
    return [byte / 255 for byte in base64.b64decode(text)]


def target_probabilities(logits: torch.Tensor, targets: npt.NDArray[np.int64]) -> list[float]:
    """Return the probabilities of the first `EXCERPT_CHARS` targets (T,) by the logits (T, V)."""
    targets = targets[:EXCERPT_CHARS]
    idx = torch.from_numpy(targets).to(logits.device)[:, None]  # (n, 1)
    probabilities = logits[: len(targets)].float().softmax(dim=-1).gather(1, idx)[:, 0]  # (n,)
    # Rounding may give slightly more than 1, and a diverged model NaN; neither should end the run.
    return [float(p) for p in probabilities.nan_to_num(0.0).clamp(0, 1)]


def describe_settings(state: TrainState, log: LossLog) -> dict[str, str]:
    """Return the settings of a run as text, for its page."""
    model, train = state.model.config, state.config
    # The speed of the last epoch: differences between the last two entries, or to the start.
    seconds, chars = [0.0, *log.seconds][-2:], [0, *log.chars][-2:]
    speed = (chars[-1] - chars[0]) / max(seconds[-1] - seconds[0], 1e-9)
    kernels = kernels_name(state.runner.kernels)
    threads = plural(torch.get_num_threads(), "thread")
    return {
        **describe_recipe(model, train),
        "model": f"{state.model.num_params():,} parameters: {model.describe()}",
        "computed with": f"{str(state.dtype).removeprefix('torch.')}, {threads}, kernels {kernels}, {instruction_set()}",
        "speed": f"{speed:,.0f} characters/s in the last epoch",
    }


def describe_recipe(model: GPTConfig, train: TrainConfig) -> dict[str, str]:
    """Return the settings that are known of every run, also of one without a history."""
    return {
        "model": model.describe(),
        "step": f"{plural(train.batch_size, 'sequence')} of {train.windows} windows",
        "recipe": f"{train.recipe}: {train.optimizer}, {train.describe_rates()}, seed {train.seed}",
    }
