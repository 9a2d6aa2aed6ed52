"""The loss log: what is written comes back, and what is damaged or hostile is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from picogpt.errors import RunError
from picogpt.runs.folder import RunFolder
from picogpt.runs.loss_log import LossLog, read_log

LOG = LossLog(train=[2.0, 1.5], val=[2.1, 1.6], chars=[10, 20], seconds=[1.0, 2.0], best_loss=1.6, iter_num=8)


def test_log_round_trip(run: RunFolder) -> None:
    """The log comes back, and plain pickle reads the original's keys from it."""
    run.write_log(LOG)
    content = pickle.loads((run.path / "log.pkl").read_bytes())

    assert run.read_log() == LOG
    assert content["losses"] == {"train": [2.0, 1.5], "val": [2.1, 1.6]}
    assert (content["best_loss"], content["iter_num"]) == (1.6, 8)


def test_log_as_a_table(run: RunFolder) -> None:
    """One row per epoch, with what is known; the speed is that of the epoch."""
    log = LossLog(train=[2.0, 1.5], val=[2.1, 1.6], chars=[10, 20], seconds=[1.0, 1.0], best_loss=1.6, iter_num=8)
    log.train.append(1.25)
    log.val.append(1.75)
    log.chars.append(70)
    log.seconds.append(1.5)
    log.steps.append(12)
    log.rates.append(0.001)
    run.write_log(log)

    assert (run.path / "log.csv").read_text() == (
        "epoch,step,chars,seconds,train_loss,val_loss,best,lr,chars_per_second\n"
        "1,,10,1.0,2.0,2.1,2.1,,10.0\n"
        "2,,20,1.0,1.5,1.6,1.6,,\n"
        "3,12,70,1.5,1.25,1.75,1.6,0.001,100.0\n"
    )
    assert run.read_log() == log


def test_log_of_before(run: RunFolder) -> None:
    """A log without steps and rates is read, its epochs without them."""
    content = LOG.to_dict()
    del content["steps"], content["rates"]
    (run.path / "log.pkl").write_bytes(pickle.dumps(content))

    assert run.read_log() == LOG
    assert run.read_log().rates == [None, None]


def test_log_names_nothing_to_import(run: RunFolder) -> None:
    """No GLOBAL opcode of any kind."""
    import pickletools

    run.write_log(LOG)
    names = {opcode.name for opcode, _, _ in pickletools.genops((run.path / "log.pkl").read_bytes())}

    assert not names & {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BUILD"}


class Attack:
    """Runs a command when it is unpickled by something careless."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "EOFError"),
        (b"not a pickle", "no loss log"),
        (pickle.dumps([1]), "no loss log"),
        (pickle.dumps({"losses": {}}), "KeyError"),
        (pickle.dumps({**LOG.to_dict(), "chars": []}), "its lists have different lengths"),
        (pickle.dumps({**LOG.to_dict(), "rates": [0.1, 0.1, 0.1]}), "its lists have different lengths"),
        (pickle.dumps(LOG.to_dict())[:-9], "no loss log"),
    ],
    ids=["empty", "text", "list", "keys missing", "lengths differ", "too many rates", "truncated"],
)
def test_damaged_log(run: RunFolder, content: bytes, message: str) -> None:
    """A file that is no log is one clear error."""
    path = run.path / "log.pkl"
    path.write_bytes(content)

    with pytest.raises(RunError, match=message):
        read_log(path)


def test_hostile_log(run: RunFolder, tmp_path: Path) -> None:
    """A log that would run something is refused by the name of it, and runs nothing."""
    (run.path / "log.pkl").write_bytes(pickle.dumps(Attack(tmp_path / "marker")))

    with pytest.raises(RunError, match=r"it imports (posix|nt)\.system, which a log may not do"):
        run.read_log()
    assert not (tmp_path / "marker").exists()


def test_missing_log(tmp_path: Path) -> None:
    """A log that is not there is said."""
    with pytest.raises(RunError, match="log.pkl: cannot be read .No such file"):
        read_log(tmp_path / "log.pkl")
