"""Which run is meant, by whatever name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from picogpt.config import GPTConfig
from picogpt.errors import RunError
from picogpt.runs import find
from picogpt.runs.checkpoint import Checkpoint
from picogpt.runs.find import find_log, find_model, picture_path
from picogpt.runs.folder import RunFolder, resumable_runs
from picogpt.runs.loss_log import LossLog
from picogpt.runs.names import MODEL_FILE

LOG = LossLog(train=[2.0], val=[2.1], chars=[10], seconds=[1.0], best_loss=2.1, iter_num=8)


@pytest.fixture(autouse=True)
def pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of its own, empty at first, for the models that come with picogpt."""
    folder = tmp_path / "clone" / "logs"
    monkeypatch.setattr(find, "PRETRAINED", folder)
    return folder


def add(folder: Path, *, age: int = 0, finished: bool = False) -> Path:
    """Make a run with a model saved `age` seconds ago, with a checkpoint unless it is `finished`; return the model's path."""
    run = RunFolder(folder)
    run.create()
    run.save_model({"w": np.ones(3, np.float32)}, GPTConfig())
    run.write_log(LOG)
    if not finished:
        run.save_checkpoint(Checkpoint(tensors={}, state={}))
    os.utime(folder / MODEL_FILE, (1e9 - age, 1e9 - age))
    return folder / MODEL_FILE


def test_find(tmp_path: Path) -> None:
    """A run by its name, its folder or its file, and the one saved last where none is named."""
    logs = tmp_path / "logs"
    newest = add(logs / "new")
    add(logs / "old", age=1)

    assert find_model(None, logs) == (newest, f"model {newest}, saved last of 2")
    for name in ("new", str(logs / "new"), str(newest)):
        assert find_model(name, logs) == (newest, f"model {newest}")
    assert find_log("old", logs) == logs / "old" / "log.pkl"
    with pytest.raises(RunError, match=r"newe: no such file, and no run of that name .* did you mean new\?"):
        find_model("newe", logs)
    with pytest.raises(RunError, match="runs there: new, old"):
        find_log("zzz", logs)
    with pytest.raises(RunError, match="not the name of a run"):
        find_log("", logs)


def test_own_runs_of_the_clone_are_not_bundled(tmp_path: Path, pretrained: Path) -> None:
    """Another logs folder does not find the runs that someone trained in the clone."""
    logs = tmp_path / "logs"
    add(pretrained / "mine")
    add(pretrained / "wikipedia", finished=True)

    for lookup in (find_model, find_log):
        with pytest.raises(RunError, match="^mine: no such file, and no run of that name .*; runs there: wikipedia$"):
            lookup("mine", logs)
    assert find_model("mine", pretrained)[0] == pretrained / "mine" / MODEL_FILE


def test_hidden_folders_are_no_runs(tmp_path: Path) -> None:
    """A forecast tries out the end of an epoch in one of them, with weights that have learned nothing."""
    logs = tmp_path / "logs"
    add(logs / ".pace-abc.part")
    old = add(logs / "old", age=9)

    assert find_model(None, logs)[0] == old
    assert resumable_runs(logs) == ["old"]


def test_no_model_at_all(tmp_path: Path) -> None:
    """Where nothing comes with picogpt either, it says how to get one."""
    with pytest.raises(RunError, match="no trained model there; train one with picogpt-train"):
        find_model(None, tmp_path)


def test_what_comes_with_picogpt(tmp_path: Path, pretrained: Path) -> None:
    """From any folder: the Wikipedia model where none is named, the others by name; a run of one's own goes before them."""
    logs = tmp_path / "logs"
    play, wikipedia = (add(pretrained / name, finished=True) for name in ("tinyshakespeare", "wikipedia"))

    assert find_model(None, logs) == (wikipedia, f"model {wikipedia}, as there is no run of your own")
    assert find_model("tinyshakespeare", logs)[0] == play
    assert find_log("wikipedia", logs) == pretrained / "wikipedia" / "log.pkl"
    with pytest.raises(RunError, match=r"did you mean wikipedia\?"):
        find_model("wikipedi", logs)
    own = add(logs / "wikipedia", age=9)
    assert find_model(None, logs)[0] == own
    assert find_model("wikipedia", logs)[0] == own


def test_in_the_clone(pretrained: Path) -> None:
    """The runs there are the user's, but for those without a checkpoint, however new these are."""
    wikipedia = add(pretrained / "wikipedia", finished=True)
    add(pretrained / "zebra", finished=True)

    assert find_model(None, pretrained) == (wikipedia, f"model {wikipedia}, as there is no run of your own under {pretrained}")
    own = add(pretrained / "mine", age=9)
    assert find_model(None, pretrained) == (own, f"model {own}")


def test_pictures_of_bundled_models(tmp_path: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture lies next to its run, also to one in the clone; for a bundled model, in the working directory."""
    theirs, own, beside = add(pretrained / "wikipedia", finished=True), add(tmp_path / "logs" / "mine"), add(pretrained / "mine")
    monkeypatch.chdir(pretrained.parent)

    for model in (theirs, Path("logs", "wikipedia", MODEL_FILE)):
        assert picture_path(model, "eval.jpg") == Path("wikipedia-eval.jpg")
    for model in (own, beside):
        assert picture_path(model, "eval.jpg") == model.with_name("eval.jpg")


def test_runs_before_their_first_epoch(tmp_path: Path) -> None:
    """A run that was stopped so early is not said to be absent."""
    run = RunFolder(tmp_path / "logs" / "new")
    run.create()
    run.save_checkpoint(Checkpoint(tensors={}, state={}))

    for name in ("new", str(run.path)):
        for lookup, file in ((find_model, MODEL_FILE), (find_log, "log.pkl")):
            with pytest.raises(RunError) as caught:
                lookup(name, tmp_path / "logs")
            message = f"{run.path}: no {file} before the end of the first epoch; picogpt-train --run new trains on"
            assert str(caught.value) == message
