"""What a run showed at each epoch's end: samples, probabilities and other predictors, kept through resumes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from picogpt.config import TrainConfig
from picogpt.data import TextSource
from picogpt.evaluation.baselines import compressed_bits
from picogpt.runs.loss_log import LossLog
from picogpt.tokenizer import CharTokenizer
from picogpt.training.history import EXCERPT_CHARS, History, describe_settings, target_probabilities
from picogpt.training.trainer import Trainer
from picogpt.wording import say_nothing
from tests.conftest import TINY, needs_any_compiler, tiny_source

CONFIG = TrainConfig(batch_size=2, windows=3)


def make_trainer() -> Trainer:
    """A tiny model that has learned nothing."""
    return Trainer(TINY, CONFIG, tiny_source(CONFIG), torch.float32)


def log_of(n_epochs: int) -> LossLog:
    """The log of a run of so many epochs."""
    return LossLog(
        train=[2.0] * n_epochs, val=[2.0] * n_epochs, chars=[100 * i for i in range(1, n_epochs + 1)], seconds=[10.0] * n_epochs
    )


def test_probabilities_of_an_excerpt() -> None:
    """Validation keeps the probabilities of the first sequence: their mean logarithm is the model's loss on it."""
    trainer = make_trainer()
    trainer.validate(2)
    ids = trainer.source.val_ids[: CONFIG.windows * TINY.context_len + 1]
    inputs, targets = (torch.from_numpy(part.astype(np.int64))[None] for part in (ids[:-1], ids[1:]))
    _, loss = trainer.model(inputs, targets)
    assert loss is not None

    assert len(trainer.excerpt_probabilities) == 24
    assert -np.log(trainer.excerpt_probabilities).mean() == pytest.approx(loss.item(), rel=1e-5)


def test_target_probabilities() -> None:
    """Softmax picks two thirds for ln 2 against 0; a diverged model gives zeros, and the length is bounded."""
    logits = torch.tensor([[math.log(2), 0.0], [math.nan, 0.0]]).repeat(300, 1)
    found = target_probabilities(logits, np.zeros(600, np.int64))

    assert found[:2] == pytest.approx([2 / 3, 0])
    assert len(found) == EXCERPT_CHARS


def test_history_is_kept(tmp_path: Path) -> None:
    """What is recorded is read again, to a 255th of each probability."""
    trainer, history = make_trainer(), History()
    trainer.validate(1)
    history.record(trainer, trainer.source, log_of(1), say_nothing)
    history.write(tmp_path)
    again = History.read(tmp_path)

    assert (again.excerpt, again.marks, again.settings) == (history.excerpt, history.marks, history.settings)
    assert again.epochs[0].sample == history.epochs[0].sample
    assert len(history.epochs[0].probabilities) == 24
    np.testing.assert_allclose(again.epochs[0].probabilities, history.epochs[0].probabilities, atol=0.5 / 255 + 1e-9)


def test_samples_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails is tried at the first epoch alone, and numpy takes its place with one line."""
    monkeypatch.setenv("CC", "false")
    trainer, history = make_trainer(), History()
    said: list[str] = []
    for n_epochs in (1, 2):
        history.record(trainer, trainer.source, log_of(n_epochs), said.append)

    assert len(history.epochs[1].sample) > 100
    assert said == [
        "compiling decode.c, once for this machine (a few seconds)",
        "numpy generates the samples, several times more slowly than C: false fails (exit code 1)",
    ]


@needs_any_compiler
def test_samples_without_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where no library can be kept, a run compiles one for all of its samples."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    trainer, history = make_trainer(), History()
    said: list[str] = []
    for n_epochs in (1, 2):
        history.record(trainer, trainer.source, log_of(n_epochs), said.append)

    assert [line for line in said if line.startswith("compiling decode.c, at each start: ")] == said
    assert len(said) == 1


def test_epochs_that_are_trained_anew() -> None:
    """After a crash before the last checkpoints, epochs beyond the log are replaced."""
    trainer, history = make_trainer(), History()
    for n_epochs in (1, 2, 3, 2):
        history.record(trainer, trainer.source, log_of(n_epochs), say_nothing)

    assert len(history.epochs) == 2


def test_epochs_before_the_history() -> None:
    """A run whose first epochs were not recorded keeps the others in their places, also when one is trained again."""
    trainer, history = make_trainer(), History()
    for n_epochs in (6, 7, 7, 8):
        history.record(trainer, trainer.source, log_of(n_epochs), say_nothing)

    assert (history.first, len(history.epochs)) == (6, 3)
    assert "epoch 8, 800 characters" in history.page("a", trainer, log_of(8), in_training=False)


def test_page_of_a_run_that_was_set_back() -> None:
    """A checkpoint of an earlier epoch is resumed: the page shows that epoch, and not those after it."""
    trainer, history = make_trainer(), History()
    for n_epochs in (1, 2, 3):
        history.record(trainer, trainer.source, log_of(n_epochs), say_nothing)
    page = history.page("a", trainer, log_of(2), in_training=False)

    assert "epoch 2, 200 characters" in page
    assert "epoch 3" not in page
    assert "epoch 0" not in page


def test_epochs_that_could_not_be_written() -> None:
    """Where the history ends before the log, it begins anew, so that no sample stands beside another epoch's loss."""
    trainer, history = make_trainer(), History()
    for n_epochs in (1, 4):
        history.record(trainer, trainer.source, log_of(n_epochs), say_nothing)

    assert (history.first, len(history.epochs)) == (4, 1)


def test_long_validation_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other predictors read the beginning of a long validation text alone."""
    read: list[int] = []

    def compress(ids: npt.NDArray[np.uint8], _: object) -> dict[str, float]:
        read.append(len(ids))
        return {"lzma": 1.0}

    monkeypatch.setattr("picogpt.training.history.PREDICTED_CHARS", 50)
    monkeypatch.setattr("picogpt.training.history.compressed_bits", compress)
    trainer, history = make_trainer(), History()
    history.record(trainer, trainer.source, log_of(1), say_nothing)

    assert read == [50]


def test_other_predictors() -> None:
    """The validation text's lzma, and a 5-gram that knows the text's rule by heart."""
    trainer, history = make_trainer(), History()
    assert isinstance(trainer.source, TextSource)
    history.record(trainer, trainer.source, log_of(1), say_nothing)

    assert history.marks["lzma"] == pytest.approx(compressed_bits(trainer.source.val_ids)["lzma"] * math.log(2))
    assert 0 < history.marks["5-gram"] < 0.5
    assert len(history.excerpt) == min(EXCERPT_CHARS + 1, len(trainer.source.val_ids))


def test_excerpt_of_unknown_characters(tmp_path: Path) -> None:
    """Each id has a piece of its own, as it has a probability; a single string of an older version is read too."""
    trainer, history = make_trainer(), History()
    trainer.source.val_ids[:3] = (0, 10, 0)
    history.record(trainer, trainer.source, log_of(1), say_nothing)
    assert list(history.excerpt[:3]) == ["<?>", CharTokenizer().decode([10]), "<?>"]

    (tmp_path / "epochs.json").write_text('{"excerpt": "ab", "marks": {}, "first": 1, "epochs": []}')
    assert History.read(tmp_path).excerpt == ["a", "b"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"excerpt": "a"}', '{"excerpt": "a", "marks": {}, "epochs": [1]}', "[" * 100_000]
)
def test_damaged_history(tmp_path: Path, content: str) -> None:
    """A file that cannot be read is as good as none: it is for looking at only."""
    (tmp_path / "epochs.json").write_text(content)

    assert History.read(tmp_path) == History()


def test_page() -> None:
    """The page has the run's name, its settings and its speed in the last epoch."""
    trainer, history, log = make_trainer(), History(), log_of(2)
    log.seconds = [10.0, 15.0]
    history.record(trainer, trainer.source, log, say_nothing)
    page = history.page("a run", trainer, log, in_training=True)

    assert "<title>a run</title>" in page
    assert json.loads(page.split('id="data">')[1].split("</script>")[0])["reload"]["written"] == pytest.approx(
        time.time(), abs=60
    )
    assert "20 characters/s in the last epoch" in page
    assert "2 sequences of 3 windows" in page
    assert describe_settings(trainer, log)["model"].endswith("parameters: 2 layers, 2 heads, width 16, windows of 8")
    assert describe_settings(trainer, LossLog())["speed"] == "0 characters/s in the last epoch"


def test_file_is_small(tmp_path: Path) -> None:
    """Twenty epochs stay below 30 kB."""
    trainer, history = make_trainer(), History()
    for n_epochs in range(1, 21):
        history.record(trainer, trainer.source, log_of(n_epochs), say_nothing)
    history.write(tmp_path)

    assert len(json.loads((tmp_path / "epochs.json").read_text())["epochs"]) == 20
    assert (tmp_path / "epochs.json").stat().st_size < 30_000
