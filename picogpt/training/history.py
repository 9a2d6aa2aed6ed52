"""What a model showed at each epoch's end, kept for the run's page: a sample of text, and how probable it found an excerpt.

`epochs.json` holds both, an entry an epoch, beside the loss log. The file is for looking at only: without it, or with a damaged
one, a run trains on and its page starts anew.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from picogpt.data import Source, TextSource
from picogpt.device import instruction_set
from picogpt.evaluation.baselines import NGRAM_ORDER, NGram, compressed_bits
from picogpt.export.log_page import EpochView, RunView, render_page
from picogpt.files import atomic_write
from picogpt.kernels.compiled import kernels_name
from picogpt.runs.folder import LossLog
from picogpt.tokenizer import CharTokenizer
from picogpt.training.sample import sample_text
from picogpt.training.state import TrainState
from picogpt.wording import Notify, plural

__all__ = ["History", "describe_settings"]

EXCERPT_CHARS = 400
"""Characters of the validation text that the page shades."""
COUNTED_CHARS = 2_000_000
"""Characters of the training text that the n-gram is counted on at most: a second's work."""
PREDICTED_CHARS = 256_000
"""Characters of the validation text that lzma and the n-gram predict at most: that of a long text would take minutes."""

_FILE = "epochs.json"


@dataclass
class History:
    """Samples and probabilities of a run's epochs."""

    excerpt: str = ""
    """The start of the validation text."""
    marks: dict[str, float] = field(default_factory=dict)
    """Other predictors of the validation text, in nats per character."""
    first: int = 1
    """Number of the first of `epochs`, from 1 on: a run of an earlier version has recorded none before."""
    epochs: list[EpochView] = field(default_factory=list)
    """Epochs in order, without a gap."""

    @classmethod
    def read(cls, folder: Path) -> History:
        """The history of the run in `folder`; an empty one where there is none that can be read."""
        try:
            content = json.loads((folder / _FILE).read_bytes())
            epochs = [EpochView(str(entry["sample"]), _unpack(entry["probabilities"])) for entry in content["epochs"]]
            marks = {str(name): float(value) for name, value in content["marks"].items()}
            return cls(str(content["excerpt"]), marks, int(content["first"]), epochs)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()  # it is for looking at only, and the next epoch writes it anew

    def record(self, state: TrainState, source: Source, log: LossLog, notify: Notify) -> None:
        """Add the epoch that has just been validated.

        Args:
            state: the model as it is.
            source: the run's text.
            log: the loss log, which has the epoch already.
            notify: given a line before something is compiled.
        """
        if not self.excerpt:
            self._begin(source)
        ids = source.val_ids[: EXCERPT_CHARS + 1]
        view = EpochView(sample_text(state.model, source.text, notify), excerpt_probabilities(state, ids))
        before = self._epochs_until(len(log.val) - 1)
        if not before:
            self.first = len(log.val)
        self.epochs = [*before, view]

    def _epochs_until(self, last: int) -> list[EpochView]:
        """The epochs up to number `last`; none if they do not reach it.

        After a crash a run can resume before epochs that are here already, and trains them again. Epochs that could not be
        written are missing at the end.
        """
        count = last - self.first + 1
        return self.epochs[:count] if 0 < count <= len(self.epochs) else []

    def _begin(self, source: Source) -> None:
        """Take the excerpt, and measure the other predictors once."""
        val_ids = source.val_ids[:PREDICTED_CHARS]
        self.excerpt = CharTokenizer().decode(val_ids[: EXCERPT_CHARS + 1].tolist())
        self.marks = {"lzma": compressed_bits(val_ids)["lzma"] * math.log(2)}
        if isinstance(source, TextSource):
            losses = NGram(source.train_ids[:COUNTED_CHARS]).losses(val_ids[None])
            self.marks[f"{NGRAM_ORDER}-gram"] = float(losses.mean())

    def write(self, folder: Path) -> None:
        """Write `epochs.json`.

        Raises:
            OSError: it cannot be written.
        """
        content: dict[str, Any] = {
            "excerpt": self.excerpt,
            "marks": self.marks,
            "first": self.first,
            "epochs": [{"sample": view.sample, "probabilities": _pack(view.probabilities)} for view in self.epochs],
        }
        atomic_write(folder / _FILE, json.dumps(content).encode())

    def page(self, name: str, state: TrainState, log: LossLog, *, in_training: bool) -> str:
        """The run's `log.html`."""
        view = RunView(
            name=name,
            log=log,
            epochs=self._epochs_until(len(log.val)),
            excerpt=self.excerpt,
            marks=self.marks,
            settings=describe_settings(state, log),
            in_training=in_training,
        )
        return render_page([view])


def _pack(probabilities: Any) -> str:
    """A byte for each probability, as text."""
    return base64.b64encode(bytes(round(255 * p) for p in probabilities)).decode()


def _unpack(text: str) -> list[float]:
    return [byte / 255 for byte in base64.b64decode(text)]


@torch.no_grad()
def excerpt_probabilities(state: TrainState, ids: npt.NDArray[np.uint8]) -> list[float]:
    """How probable the model finds each of ids (T + 1,) but the first, given those before it; (T,)."""
    idx = torch.from_numpy(ids.astype(np.int64))[None].to(state.device)  # (1, T + 1)
    state.model.eval()
    logits, _ = state.model(idx[:, :-1], idx[:, 1:])  # (1, T, V)
    state.model.train()
    probabilities = logits.float().softmax(dim=-1).gather(2, idx[:, 1:, None])[0, :, 0]  # (T,)
    return [float(p) for p in probabilities.nan_to_num(0.0).clamp(0, 1)]


def describe_settings(state: TrainState, log: LossLog) -> dict[str, str]:
    """The settings of a run in words, for its page."""
    model, train = state.model.config, state.config
    seconds, chars = [0.0, *log.seconds][-2:], [0, *log.chars][-2:]
    speed = (chars[-1] - chars[0]) / max(seconds[-1] - seconds[0], 1e-9)
    kernels = kernels_name(state.fast_blocks.kernels)
    threads = plural(torch.get_num_threads(), "thread")
    return {
        "model": f"{state.model.num_params():,} parameters: {model.describe()}",
        "step": f"{plural(train.batch_size, 'sequence')} of {train.windows} windows",
        "recipe": f"{train.recipe}: {train.optimizer}, learning rate {train.lr:g}, seed {train.seed}",
        "computed with": f"{str(state.dtype).removeprefix('torch.')}, {threads}, kernels {kernels}, {instruction_set()}",
        "speed": f"{speed:,.0f} characters/s in the last epoch",
    }
