"""The run folder: what is written comes back, and what is damaged is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save as torch_save

from picogpt.errors import RunError
from picogpt.runs.checkpoint import Checkpoint
from picogpt.runs.folder import RunFolder
from picogpt.runs.model_file import load_model
from tests.conftest import TINY
from tests.programs import program


def checkpoint(value: float) -> Checkpoint:
    """A small checkpoint, told apart by `value`."""
    tensors = {"w": np.full((2, 3), value, np.float32), "step": np.array(value, np.float32)}
    return Checkpoint(tensors=tensors, state={"value": value})


def test_checkpoint_round_trip(run: RunFolder) -> None:
    """Tensors and state come back, scalars too, and the one before is kept."""
    run.save_checkpoint(checkpoint(1.0))
    run.save_checkpoint(checkpoint(2.0))
    loaded, fault = run.load_checkpoint()

    assert fault is None
    assert loaded.state == {"value": 2.0}
    assert loaded.tensors["step"].shape == ()
    assert np.array_equal(loaded.tensors["w"], checkpoint(2.0).tensors["w"])
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoint.previous.safetensors", "checkpoint.safetensors"]


def damage_bit(path: Path) -> None:
    """Flip one bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage_cut(path: Path) -> None:
    """Cut the end off."""
    path.write_bytes(path.read_bytes()[:-5])


def damage_text(path: Path) -> None:
    """Put a text in its place."""
    path.write_text("hello")


@pytest.mark.parametrize("damage", [damage_bit, damage_cut, damage_text])
def test_damaged_checkpoint(run: RunFolder, damage: Any) -> None:
    """A damaged checkpoint is passed over for the one before it, and said; if both are, nothing is taken."""
    run.save_checkpoint(checkpoint(1.0))
    run.save_checkpoint(checkpoint(2.0))
    damage(run.path / "checkpoint.safetensors")
    loaded, fault = run.load_checkpoint()

    assert loaded.state == {"value": 1.0}
    assert fault is not None
    assert "checkpoint.safetensors" in fault
    assert "resuming from the previous checkpoint" in fault
    assert (run.path / "checkpoint.damaged.safetensors").exists()
    run.save_checkpoint(checkpoint(3.0))
    assert run.load_checkpoint()[0].state == {"value": 3.0}
    for path in run.path.glob("checkpoint*"):
        damage(path)
    with pytest.raises(RunError, match="nothing to resume"):
        run.load_checkpoint()


def test_no_checkpoint(run: RunFolder) -> None:
    """A folder without one says so."""
    assert not run.has_checkpoint()
    with pytest.raises(RunError, match="no checkpoint to resume"):
        run.load_checkpoint()


def test_state_is_covered_by_the_checksum(run: RunFolder) -> None:
    """A changed value in the metadata is noticed as well as a changed tensor."""
    run.save_checkpoint(checkpoint(1.0))
    path = run.path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes().replace(rb"{\"value\": 1.0}", rb"{\"value\": 3.0}"))

    with pytest.raises(RunError, match="its SHA-256 does not match"):
        run.load_checkpoint()


def test_model_round_trip(run: RunFolder) -> None:
    """Weights and shape come back."""
    run.save_model({"w": np.ones(3, np.float32)}, TINY)
    model = load_model(run.path / "model.safetensors")

    assert model.config == TINY
    assert np.array_equal(model.weights["w"], np.ones(3))
    assert run.has_model()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "1"}, "no picogpt model"),
        ({"format": "1", "config": "{"}, "no picogpt model"),
        ({"format": "1", "config": json.dumps({"n_layer": -1})}, "no picogpt model"),
        ({"format": "2", "config": "{}"}, "format 2 is not supported .at most 1."),
        ({}, "format 0 is not supported"),
        ({"format": "x"}, "format None is not supported"),
    ],
)
def test_foreign_model(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    """A safetensors file of another kind or version is refused."""
    path = tmp_path / "model.safetensors"
    save_file({"w": np.ones(3, np.float32)}, path, metadata)

    with pytest.raises(RunError, match=message):
        load_model(path)


def test_missing_model(tmp_path: Path) -> None:
    """A model that is not there says how to get one."""
    with pytest.raises(RunError, match="safetensors: no such file; train a model with picogpt-train"):
        load_model(tmp_path / "model.safetensors")


def test_config_round_trip(run: RunFolder) -> None:
    """The config comes back with its format."""
    run.write_config({"a": 1})

    assert run.read_config() == {"format": 1, "a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("[1]", "not a run's config"), ('{"format": 9}', "format 9"), ("[" * 100_000, "cannot be read")],
    ids=["damaged", "list", "newer", "deep"],
)
def test_damaged_config(run: RunFolder, content: str, message: str) -> None:
    """A config that cannot be used is one clear error."""
    (run.path / "config.json").write_text(content)

    with pytest.raises(RunError, match=message):
        run.read_config()


def test_bfloat16(tmp_path: Path) -> None:
    """A model in bfloat16 is read in float32, to the bit, beside a tensor of float32 too."""
    config = {"config": json.dumps(asdict(TINY)), "format": "1"}
    halves = {"w": torch.randn(3, 5).bfloat16(), "b": torch.tensor([1.0, -0.0, 3e38]).bfloat16()}
    weights = {**halves, "x": torch.randn(2)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(torch_save(weights, config))
    loaded = load_model(path)

    assert loaded.config == TINY
    assert loaded.weights.keys() == weights.keys()
    for name, weight in weights.items():
        assert loaded.weights[name].dtype == np.float32
        assert loaded.weights[name].tobytes() == weight.float().numpy().tobytes()


def test_lock_is_exclusive_and_dies_with_its_holder(run: RunFolder) -> None:
    """While another process holds the folder nobody else gets it; its death frees it."""
    command = program("hold_lock", str(run.path))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"another process .pid {holder.pid}. trains in this run"), run.lock():
            pass
        holder.kill()
        holder.wait()
    with run.lock():
        pass


def test_set_aside(run: RunFolder) -> None:
    """An old run is kept under the first free name."""
    (run.path.with_name("a.old-1")).mkdir()

    assert run.archive().name == "a.old-2"
    assert not run.path.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_file_systems_without_locks(run: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """No lock is not another trainer: the run is held without one, which is told."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("picogpt.runs.lock.fcntl.flock", flock)
    with run.lock() as weaknesses:
        assert weaknesses == [
            f"{run.path}: this file system has no locks, so a second picogpt-train in this run cannot be detected; "
            "start only one at a time"
        ]


def test_lock_on_a_broken_disk(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is neither a holder nor a lack of locks comes out, with the file's name."""

    def flock(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("picogpt.runs.lock.fcntl.flock", flock)
    with pytest.raises(OSError, match=r"Input/output error: '.*\.lock'"), run.lock():
        pass


def test_file_systems_without_flush(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is told once what a missing flush weakens; where all is well there is nothing to tell."""
    with run.lock() as weaknesses:
        assert weaknesses == []
    monkeypatch.setattr("picogpt.runs.folder.can_flush", lambda _: False)
    with run.lock() as weaknesses:
        assert weaknesses == [
            f"{run.path}: this file system cannot flush to the disk, so a power failure may lose the latest checkpoints"
        ]


def test_same_content_is_the_same_bytes(run: RunFolder) -> None:
    """Metadata stand in one order, so that a model's SHA-256 tells whether it is another one, in whatever process."""
    found = set()
    for _ in range(4):
        subprocess.run(program("save_run", str(run.path)), check=True)
        found.add(tuple((run.path / name).read_bytes() for name in ("model.safetensors", "checkpoint.safetensors")))

    assert len(found) == 1
    assert load_model(run.path / "model.safetensors").config == TINY
    assert int.from_bytes((run.path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0
    assert run.load_checkpoint()[0].state == {"step": 1}
