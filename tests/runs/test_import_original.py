"""The original's log is read exactly, and nothing that pretends to be one runs, hangs or crashes anything.

`PICOGPT_TORTURE=50 pytest -m '' tests/runs/test_import_original.py` tries fifty times as many mutations.
"""

from __future__ import annotations

import builtins
import codecs
import os
import pickle
import random
import struct
import sys
import time
import tracemalloc
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from picogpt.cli import generate, train
from picogpt.config import GPTConfig
from picogpt.errors import RunError
from picogpt.inference import Engine
from picogpt.inference.decoder import RollingDecoder
from picogpt.model.gpt import GPT
from picogpt.plot import draw_losses
from picogpt.runs.folder import RunFolder
from picogpt.runs.import_original import read_original
from picogpt.runs.model_file import load_model
from picogpt.training.import_run import describe_losses
from tests.conftest import VECTORS

TIMES = int(os.environ.get("PICOGPT_TORTURE", "1"))
SEED_LOG = VECTORS / "seed_log_small.pkl"


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Ids and the last logits that the log's weights give."""
    with np.load(VECTORS / "seed_log_small_expected.npz") as arrays:
        return dict(arrays)


def test_weights_and_losses(expected: dict[str, Any]) -> None:
    """Weights to 1e-4 in the logits, losses, steps and shape as they are."""
    original = read_original(SEED_LOG, 4)
    model = GPT(original.config)
    model.load_arrays(original.weights)

    assert original.config == GPTConfig(n_layer=2, n_head=4, n_embd=32, context_len=16)
    assert (original.log.train, original.log.val) == ([3.1, 2.8, 2.6], [3.0, 2.7, 2.5])
    assert (original.log.best_loss, original.log.iter_num) == (2.5, 1500)
    logits = model(torch.from_numpy(expected["idx"]))[0][:, 0].detach().numpy()
    np.testing.assert_allclose(logits, expected["last_logits"], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_import_and_go_on(
    expected: dict[str, Any], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--import-original` keeps the weights as they came, carries the losses over and trains on with a new optimizer."""
    monkeypatch.chdir(tmp_path)
    flags = ["--import-original", str(SEED_LOG), "--n-head", "4", "--text", str(text_file), "--run", "old", "--threads", "1"]
    flags += ["--steps-per-epoch", "750", "--val-steps", "1", "--windows", "2", "--batch-size", "1", "--dtype", "float32"]
    with monkeypatch.context() as context:
        context.setattr("picogpt.training.trainer.Trainer.fit", lambda *_, **__: True)
        assert train.main([*flags, "--epochs", "2"]) == 0
    assert "imported 1,500 steps, best loss 2.5000 there; its loss on this text is " in capsys.readouterr().err
    engine = Engine.load(Path("logs/old/model.safetensors"), dtype="float32")
    np.testing.assert_allclose(RollingDecoder(engine, 1).prefill(expected["idx"]), expected["last_logits"], atol=1e-4, rtol=0)
    before = load_model(Path("logs/old/model.safetensors")).weights

    assert train.main([*flags, "--steps-per-epoch", "10"]) == 0
    log = RunFolder(Path("logs/old")).read_log()
    assert log.iter_num == 1520
    assert log.val[:3] == [3.0, 2.7, 2.5]
    assert len(log.val) == 5
    assert log.chars == sorted(log.chars)
    assert log.chars[-1] - log.chars[2] == 20 * 32
    after = RunFolder(Path("logs/old")).load_checkpoint()[0].tensors
    assert all(not np.array_equal(after[f"model.{name}"], array) for name, array in before.items())
    assert all(array == 20 for name, array in after.items() if name.startswith("optimizer.step."))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n-head", "3"], "n_embd must be a multiple of n_head"),
        (["--n-head", "4", "--n-layer", "5"], "n_layer is 5 and was 2"),
    ],
)
def test_import_needs_the_right_shape(
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    """A shape that contradicts the file is one line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    if "--n-layer" not in flags:
        flags = [*flags, "--n-embd", "33"]

    assert train.main(["--import-original", str(SEED_LOG), "--text", str(text_file), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not Path("logs").exists()


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def storage(
    numbers: np.ndarray[Any, Any],
    *,
    kind: str = "FloatStorage",
    count: int | None = None,
    magic: int | None = None,
    keys: Sequence[str] = ("0",),
    little_endian: bool = True,
) -> bytes:
    """A legacy torch file of one storage."""
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C if magic is None else magic, 1001, system)]
    body = b"\x80\x02(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    n = len(numbers) if count is None else count
    body += b"\x8a\x08" + struct.pack("<q", n) + b"NtQ."
    return b"".join([*parts, body, pickle.dumps(list(keys), 2), struct.pack("<q", n), numbers.tobytes()])


def tensor(shape: tuple[Any, ...], strides: tuple[Any, ...], offset: Any = 0, data: Any = None) -> Call:
    """A tensor over a storage."""
    load: Any = torch.storage._load_from_bytes
    held = Call(load, storage(np.zeros(8, np.float32)) if data is None else data)
    return Call(torch._utils._rebuild_tensor_v2, held, offset, shape, strides, False, OrderedDict())


def log_with(weights: Any, **changes: Any) -> bytes:
    """A log around some weights."""
    content = {"best_weight": weights, "best_loss": 1.0, "losses": {"train": [1.0], "val": [1.0]}, "iter_num": 1, **changes}
    return pickle.dumps(content, 4)


TRICKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it has no end"),
    "text": (b"hello", "no log of the original project"),
    "no log": (pickle.dumps({"a": 1}), "best_weight, best_loss, losses or iter_num is missing"),
    "os.system": (pickle.dumps(Call(os.system, "touch ran"), 4), r"it imports .(posix|nt)\.system"),
    "os.system, protocol 0": (pickle.dumps(Call(os.system, "touch ran"), 0), "opcode PUT|no log"),
    "os.system, protocol 2": (pickle.dumps(Call(os.system, "touch ran"), 2), r"it imports .(posix|nt)\.system"),
    "eval": (pickle.dumps(Call(eval, "open('ran','w')"), 4), "it imports .builtins.eval"),
    "getattr": (pickle.dumps(Call(getattr, "x", "y"), 4), "it imports .builtins.getattr"),
    "within weights": (log_with({"a": Call(os.system, "touch ran")}), "it imports"),
    "class made": (b"\x80\x04\x8c\x02os\x8c\x05popen\x93)\x81.", "it imports .os.popen"),
    "inst": (b"(S'touch ran'\nios\nsystem\n.", "opcode"),
    "obj": (b"\x80\x02(cos\nsystem\nX\x09\x00\x00\x00touch rano.", "opcode OBJ"),
    "extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "persistent id": (b"\x80\x02X\x01\x00\x00\x00aQ.", "opcode BINPERSID"),
    "state of a name": (b"\x80\x02cos\nsystem\n}b.", "it imports .os.system"),
    "build on nothing": (b"\x80\x02}b.", "it is damaged"),
    "state of a function": (b"\x80\x02c_codecs\nencode\n}X\x01\x00\x00\x00aNsb.", "it is damaged"),
    "state of a call": (b"\x80\x02c_codecs\nencode\n)R}X\x01\x00\x00\x00aNsb.", "it is damaged"),
    "state of a class": (b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aNsb.", "it is damaged"),
    "attribute of a function": (b"\x80\x04c_codecs\nencode\nN}\x8c\x08__call__Ns\x86b.", "it is damaged"),
    "attribute of a call": (b"\x80\x04c_codecs\nencode\n)RN}\x8c\x08functionNs\x86b.", "it is damaged"),
    "attribute of a class": (b"\x80\x04ccollections\nOrderedDict\nN}\x8c\x0c__setstate__Ns\x86b.", "it is damaged"),
    "attribute of two lines": (b"\x80\x04]N}\x8c\x03a\nbNs\x86b.", "it is damaged"),
    "name of two lines": (b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.", "it imports .a.{1,2}nb.c"),
    "memo bomb": (b"\x80\x04" + b"]" + b"\x94" + b"(h\x00h\x00h\x00h\x00e" * 10 + b".", "missing"),
    "memo of exabytes": (b"\x80\x04Nr\xff\xff\xff\x7f.", "a memo index beyond the opcodes before it"),
    "frame of exabytes": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "is missing"),
    "unknown memo": (b"\x80\x04h\x05.", "it is damaged"),
    "memo of nothing": (b"\x80\x04\x94.", "it is damaged"),
    "stack underflow": (b"\x80\x04\x85.", "it is damaged"),
    "mark missing": (b"\x80\x04t.", "it is damaged"),
    "left over": (b"\x80\x04NN.", "is missing"),
    "no list": (b"\x80\x04NNa.", "it is damaged"),
    "a dict for a list": (b"\x80\x04}(NNe.", "it is damaged"),
    "key without value": (b"\x80\x04}(Nu.", "it is damaged"),
    "odd key": (b"\x80\x04}NNs.", "a key that is neither text nor parameter"),
    "unhashable key": (b"\x80\x04}]Ns.", "a key that is neither"),
    "deep key": (b"\x80\x04}N" + b"\x85" * 500_000 + b"Ns.", "a key that is neither"),
    "key of 2**100": (
        b"\x80\x04}N" + b"\x94h\x00\x86" + b"".join(b"\x94h%c\x86" % i for i in range(1, 100)) + b"Ns.",
        "a key that is neither",
    ),
    "keys of one hash": (
        b"\x80\x04}("
        + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, 200_000))
        + b"u.",
        "a key that is neither",
    ),
    "key of a class": (b"\x80\x04}ccollections\nOrderedDict\nNs.", "a key that is neither"),
    "name that is no text": (b"\x80\x04NN\x93.", "it is damaged"),
    "call of a number": (b"\x80\x04K\x01)R.", "it is damaged"),
    "call with a number": (b"\x80\x02c_codecs\nencode\nK\x01R.", "it is damaged"),
    "call of a call": (b"\x80\x02c_codecs\nencode\n)R)R.", "it is damaged"),
    "long text": (b"\x80\x04X\xff\xff\xff\xff.", "it is damaged: .expected 4294967295 bytes"),
    "long integer": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "opcode LONG4"),
    "long integer of text": (b"L" + b"9" * 1_000_000 + b"\n.", "opcode LONG"),
    "text with escapes": (b"V\\u0041\n.", "opcode UNICODE"),
    "huge bytes": (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "it is damaged"),
    "text not UTF-8": (b"\x80\x04\x8c\x01\xff.", "it is damaged: .*utf-8"),
    "name without end": (b"\x80\x02c" + b"a" * 500, "it is damaged: .no newline"),
    "no opcode": (b"\x80\x04\xff.", "is no opcode"),
    "deep": (b"\x80\x04" + b"(" * 100_000 + b".", "it is damaged"),
    "deep lists": (b"\x80\x04" + b"]" * 400_000 + b"a" * 399_999 + b".", "is missing"),
    "deep dicts": (b"\x80\x04" + b"}\x8c\x01a" * 200_000 + b"N" + b"s" * 200_000 + b".", "is missing"),
    "deep calls": (b"\x80\x04c_codecs\nencode\n\x94" + b"h\x00" * 200_000 + b"N" + b"\x85R" * 200_000 + b".", "is missing"),
    "a million dicts": (b"\x80\x04" + b"}" * 999_998 + b".", "is missing"),
    "many opcodes": (b"\x80\x04" + b"N0" * 1_500_000, "opcode POP|too many opcodes"),
    "too many opcodes": (b"\x80\x04" + b"N" * 2_100_000, "too many opcodes"),
    "deep tuples": (b"\x80\x04N" + b"\x85" * 500_000 + b".", "is missing"),
    "dict of something": (pickle.dumps(Call(OrderedDict, [("a", 1)]), 4), "a dict made from something"),
    "dict of unhashable": (pickle.dumps(Call(defaultdict, []), 4), "a dict made from something"),
    "dict of a tensor": (pickle.dumps(Call(OrderedDict, tensor((1,), (1,))), 4), "a dict made from something"),
    "object of a tensor": (pickle.dumps(tensor((2,), (1,)), 4)[:-1] + b")\x81.", "it is damaged"),
    "encode to a tensor": (
        b"\x80\x04c_codecs\nencode\nX\x01\x00\x00\x00a" + pickle.dumps(tensor((2,), (1,)), 2)[2:-1] + b"\x86R.",
        "no log",
    ),
    "encode to code": (
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.",
        "is missing",
    ),
    "storage encoded to code": (
        log_with({"a": tensor((8,), (1,), data=Call(codecs.encode, "a", "zlib"))}),
        "a storage that is no bytes",
    ),
    "storage not latin": (
        log_with({"a": tensor((8,), (1,), data=Call(codecs.encode, "\u65e5", "latin1"))}),
        "bytes that are none",
    ),
    "stride 0": (log_with({"a": tensor((1000, 1000), (0, 0))}), "not laid out in one piece"),
    "beyond the storage": (log_with({"a": tensor((9,), (1,))}), "not laid out in one piece"),
    "offset beyond": (log_with({"a": tensor((8,), (1,), 1)}), "not laid out in one piece"),
    "negative offset": (log_with({"a": tensor((8,), (1,), -1)}), "an impossible shape"),
    "negative shape": (log_with({"a": tensor((-8,), (1,))}), "an impossible shape"),
    "huge shape": (log_with({"a": tensor((2**62, 2**62), (2**62, 1))}), "not laid out in one piece"),
    "many dimensions": (log_with({"a": tensor((1,) * 99, (1,) * 99)}), "a tensor of another form"),
    "shape of text": (log_with({"a": tensor(("8",), (1,))}), "an impossible shape"),
    "tensor of tensor": (log_with({"a": tensor((1,), (1,), data=b"x")}), "no log"),
    "zip storage": (log_with({"a": tensor((8,), (1,), data=b"PK\x03\x04" + b"\0" * 50)}), "no log"),
    "deflate bomb": (log_with({"a": tensor((8,), (1,), data=b"PK\x03\x04" + b"\x08" * 5000)}), "no log"),
    "storage with a call": (
        log_with({"a": tensor((8,), (1,), data=pickle.dumps(Call(os.system, "touch ran")))}),
        "no legacy torch file",
    ),
    "other magic": (log_with({"a": tensor((8,), (1,), data=storage(np.zeros(8, np.float32), magic=1))}), "no legacy torch file"),
    "big-endian": (
        log_with({"a": tensor((8,), (1,), data=storage(np.zeros(8, np.float32), little_endian=False))}),
        "no legacy torch file",
    ),
    "other storage": (
        log_with({"a": tensor((8,), (1,), data=storage(np.zeros(8, np.float32), kind="QInt8Storage"))}),
        "unknown kind",
    ),
    "storage too short": (log_with({"a": tensor((8,), (1,), data=storage(np.zeros(8, np.float32), count=9))}), "another length"),
    "storage of 2**62": (
        log_with({"a": tensor((8,), (1,), data=storage(np.zeros(8, np.float32), count=2**62))}),
        "another length",
    ),
    "storages": (
        log_with({"a": tensor((8,), (1,), data=storage(np.zeros(8, np.float32), keys="01"))}),
        "no legacy torch file of one storage",
    ),
    "storage of a number": (log_with({"a": tensor((8,), (1,), data=5)}), "a storage that is no bytes"),
    "negative storage": (log_with({"a": tensor((8,), (1,), data=storage(np.zeros(8, np.float32), count=-1))}), "another length"),
    "no embeddings": (log_with({"a": tensor((8,), (1,))}), "the embeddings are missing"),
    "weights of no GPT": (
        log_with(
            {
                f"transformer.{name}.weight": tensor(
                    shape, (2, 1) if shape[0] > 1 else (8, 1), data=storage(np.zeros(176, np.float32))
                )
                for name, shape in (("wte", (88, 2)), ("wpe", (1, 8)), ("h.0.x", (1, 8)))
            }
        ),
        "context_len must be",
    ),
    "another vocabulary": (
        log_with({f"transformer.{name}.weight": tensor((2, 4), (4, 1)) for name in ("wte", "wpe")}),
        "a vocabulary of 2 where 88 ids are known",
    ),
    "a wide nothing": (
        log_with(
            {
                f"transformer.{name}.weight": tensor((88, 4), (4, 1), data=storage(np.zeros(352, np.float32)))
                for name in ("wte", "wpe", "h.0.x")
            }
        ),
        "not those of a GPT of one shape",
    ),
    "parameter of text": (
        pickle.dumps(Call(torch._utils._rebuild_parameter, "x", True, OrderedDict())),
        "is missing",
    ),
}


WATCHED = (
    "exec",
    "compile",
    "import",
    "os.system",
    "subprocess.Popen",
    "pickle.find_class",
    "marshal.loads",
    "ctypes.dlopen",
    "socket.connect",
)
"""Events of the interpreter that would run or import something."""


@pytest.fixture(scope="module")
def watched_events() -> Iterator[list[str]]:
    """Events of this module's tests; Python cannot remove a hook, so all of them share one."""
    events: list[str] = []
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event.startswith(WATCHED):
            events.append(f"{event} {arguments[:1]}")

    sys.addaudithook(hook)
    yield events
    active = False


@pytest.fixture
def nothing_runs(watched_events: list[str]) -> list[str]:
    """Events of this test."""
    watched_events.clear()
    return watched_events


@pytest.mark.parametrize("name", TRICKS)
def test_tricks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_runs: list[str]) -> None:
    """Every trick is refused, for its reason, and runs nothing."""
    monkeypatch.chdir(tmp_path)
    content, message = TRICKS[name]
    path = tmp_path / "log.pkl"
    path.write_bytes(content)
    nothing_runs.clear()
    with pytest.raises(RunError) as caught:
        read_original(path, 4)

    assert nothing_runs == []
    assert caught.match(message)
    assert caught.match("nothing was run from it")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.timing
@pytest.mark.parametrize("name", TRICKS)
def test_tricks_are_refused_at_once(name: str, tmp_path: Path) -> None:
    """No trick holds up its reader for 10 s."""
    path = tmp_path / "log.pkl"
    path.write_bytes(TRICKS[name][0])
    start = time.perf_counter()
    with pytest.raises(RunError):
        read_original(path, 4)

    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "name",
    [
        "memo of exabytes",
        "frame of exabytes",
        "long text",
        "huge bytes",
        "huge shape",
        "storage of 2**62",
        "deep key",
        "deep calls",
    ],
)
def test_memory(name: str, tmp_path: Path) -> None:
    """Tricks that ask for memory get little of it."""
    assert peak_memory(TRICKS[name][0], tmp_path / "log.pkl") < 64 << 20


def peak_memory(content: bytes, path: Path) -> int:
    """Bytes that were allocated at most while a log was rejected."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(RunError):
            read_original(path, 1)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_views_of_one_storage(tmp_path: Path) -> None:
    """Weights that are views of one small storage do not become large."""
    held = Call(torch.storage._load_from_bytes, storage(np.zeros(88 * 1000, np.float32)))

    def view(*shape: int) -> Call:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        return Call(torch._utils._rebuild_tensor_v2, held, 0, shape, strides, False, OrderedDict())

    missing = 12 * 1000 * 1000 + 2 * 1000 + (2 * 88 + 2 + 2) * 1000 - (88 + 3) * 1000
    weights = {"transformer.wte.weight": view(88, 1000), "transformer.wpe.weight": view(3, 1000)}
    weights |= {f"transformer.h.0.{i}": view(88_000) for i in range(missing // 88_000)}
    content = log_with(weights | {"transformer.h.0.rest": view(missing % 88_000)})
    assert len(content) < 1 << 20

    assert peak_memory(content, tmp_path / "log.pkl") < 4 << 20
    with pytest.raises(RunError, match="it has fewer bytes than weights"):
        read_original(tmp_path / "log.pkl", 1)


def test_a_text_that_is_encoded_often(tmp_path: Path) -> None:
    """Protocol 2 has a storage as text; however many tensors share it, it is encoded once."""
    text = storage(np.zeros(1_000_000, np.float32)).decode("latin1")
    load: Any = torch.storage._load_from_bytes
    losses = [
        Call(torch._utils._rebuild_tensor_v2, Call(load, Call(codecs.encode, text, "latin1")), i, (), (), False, OrderedDict())
        for i in range(1000)
    ]
    content = log_with(small_weights(None), losses={"train": losses, "val": losses}, best_loss="low")

    assert peak_memory(content, tmp_path / "log.pkl") < 64 << 20
    with pytest.raises(RunError, match="a loss that is no number"):
        read_original(tmp_path / "log.pkl", 1)


def test_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without memory is no fault of the file."""

    def fail(content: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr("picogpt.runs.import_original._checked", fail)
    with pytest.raises(MemoryError):
        read_original(SEED_LOG, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_loss": "low"}, "a loss that is no number"),
        pytest.param({"best_loss": 10**400}, "a loss that is no number", id="beyond any float"),
        ({"losses": {"train": ["x"], "val": [1.0]}}, "a loss that is no number"),
        ({"iter_num": -1}, "an impossible number of steps"),
        ({"iter_num": True}, "an impossible number of steps"),
        ({"best_weight": "not finite"}, "has values that are not finite"),
        ({"best_weight": "whole numbers"}, "a weight that is no tensor of numbers"),
    ],
    ids=str,
)
def test_impossible_values(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A log whose weights fit and whose values cannot be is refused too."""
    path = tmp_path / "log.pkl"
    if "best_weight" not in changes:
        path.write_bytes(log_with(small_weights(None)))
        assert read_original(path, 1).config.n_embd == 2
    path.write_bytes(log_with(small_weights(changes.pop("best_weight", None)), **changes))

    with pytest.raises(RunError, match=message):
        read_original(path, 1)


def small_weights(fault: str | None) -> dict[str, Any]:
    """Weights of a model of one block, whole or with a fault."""
    sizes = {
        "transformer.wte.weight": (88, 2),
        "transformer.wpe.weight": (3, 2),
        "lm_head.weight": (88, 2),
        "transformer.ln_f.weight": (2,),
    }
    block = {"ln_1.weight": (2,), "ln_2.weight": (2,), "attn.c_attn.weight": (6, 2), "attn.c_proj.weight": (2, 2)}
    block |= {"mlp.c_fc.weight": (8, 2), "mlp.c_proj.weight": (2, 8)}
    shapes = sizes | {f"transformer.h.0.{name}": shape for name, shape in block.items()}
    kind, value = ("LongStorage", np.int64(1)) if fault == "whole numbers" else ("FloatStorage", np.float32(1))
    if fault == "not finite":
        value = np.float32("nan")
    return {
        name: tensor(shape, (*shape[1:], 1), data=storage(np.full(int(np.prod(shape)), value), kind=kind))
        for name, shape in shapes.items()
    }


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "best", "said"),
    [
        (
            {"losses": {"train": [NAN, 2.0], "val": [float("inf"), 1.5]}, "best_loss": 1.5},
            1.5,
            ", best loss 1.5000, 2 losses not finite",
        ),
        ({"losses": {"train": [2.0], "val": [NAN]}, "best_loss": NAN}, None, ", 1 loss not finite"),
        ({"losses": {"train": [], "val": []}, "best_loss": float("inf")}, None, ""),
    ],
    ids=["some", "the best", "none"],
)
def test_losses_that_are_not_finite(changes: dict[str, Any], best: float | None, said: str, tmp_path: Path) -> None:
    """They say nothing about the weights, which are brought over; the log keeps them, and a run can be drawn with them."""
    path = tmp_path / "log.pkl"
    path.write_bytes(log_with(small_weights(None), **changes))
    original = read_original(path, 1)

    assert original.log.best_loss == best
    np.testing.assert_equal(original.log.val, changes["losses"]["val"])
    assert describe_losses(original.log) == said
    assert draw_losses({"a": original.log})


def test_import_alone(
    expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--epochs 0` the run is brought over as it is, without a text and without training, and can be generated with."""
    monkeypatch.chdir(tmp_path)
    flags = ["--import-original", str(SEED_LOG), "--n-head", "4", "--epochs", "0"]
    assert train.main([*flags, "--run", "old", "--dry-run"]) == 0
    assert not Path("logs").exists()
    assert train.main([*flags, "--run", "old"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"logs/old: 1,500 steps of {SEED_LOG}, best loss 2.5000; picogpt-generate -m old generates with it, picogpt-train "
        "--init-from old trains on from it"
    )
    engine = Engine.load(Path("logs/old/model.safetensors"), dtype="float32")
    np.testing.assert_allclose(RollingDecoder(engine, 1).prefill(expected["idx"]), expected["last_logits"], atol=1e-4, rtol=0)
    assert RunFolder(Path("logs/old")).read_log().val == [3.0, 2.7, 2.5]
    assert Path("logs/old/log.jpg").exists()
    assert generate.main(["-m", "old", "a", "-n", "1"]) == 0

    assert train.main([*flags, "--run", "old"]) == 1
    assert "logs/old: there is a run of that name; choose another --run" in capsys.readouterr().err
    with RunFolder(Path("logs/old")).lock():  # as of a process that trains in it
        assert train.main([*flags, "--run", "old", "--fresh"]) == 1
    assert "another process (pid " in capsys.readouterr().err
    assert train.main([*flags, "--run", "old", "--fresh"]) == 0
    assert Path("logs/old.old-1/model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--run must be given with --import-original and --epochs 0"),
        (["--run", "a", "--dataset", "sample"], "--epochs 0 trains on no text; leave --text and --dataset out"),
    ],
)
def test_import_alone_needs(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An import without training has a name and no text."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--import-original", str(SEED_LOG), "--epochs", "0", *flags]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_protocol_2(tmp_path: Path) -> None:
    """Bytes as protocol 2 has them, through `_codecs.encode`, are read like the others."""
    content = pickle.loads(SEED_LOG.read_bytes())
    with (tmp_path / "log.pkl").open("wb") as stream:
        pickle.dump(content, stream, protocol=2)
    found, expected = read_original(tmp_path / "log.pkl", 4), read_original(SEED_LOG, 4)

    assert found.log == expected.log
    assert all(np.array_equal(found.weights[name], array) for name, array in expected.weights.items())


def test_missing_and_huge(tmp_path: Path) -> None:
    """A file that is missing, or larger than any such log, is said."""
    with pytest.raises(RunError, match="cannot be read .No such file"):
        read_original(tmp_path / "none", 4)
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(2 << 30)
    with pytest.raises(RunError, match="2,147,483,648 bytes are too many"):
        read_original(tmp_path / "huge", 4)


@pytest.mark.slow
def test_mutations(tmp_path: Path, nothing_runs: list[str]) -> None:
    """Whatever bytes of a real log are changed, cut, doubled or moved: it is read or refused, and nothing else happens."""
    good = SEED_LOG.read_bytes()
    generator = random.Random(0)
    path = tmp_path / "log.pkl"
    outcomes = {"read": 0, "refused": 0}
    nothing_runs.clear()
    for _ in range(1000 * TIMES):
        path.write_bytes(mutate(good, generator))
        try:
            read_original(path, 4)
        except RunError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1

    assert nothing_runs == []
    assert outcomes["refused"] > 300 * TIMES


def mutate(content: bytes, generator: random.Random) -> bytes:
    """Change a few places, most of them where opcodes are."""
    changed = bytearray(content)
    # The bytes of tensors are most of the file; opcodes stand close to the names.
    places = [0, content.find(b"optimizer"), content.find(b"param_groups"), *(m for m in _NAMES)]
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        place = (
            generator.randrange(len(changed)) if generator.random() < 0.2 else generator.choice(places) + generator.randrange(90)
        )
        place = min(place, len(changed) - 1)
        match generator.randrange(5):
            case 0:
                changed[place] = generator.randrange(256)
            case 1:
                del changed[place : place + generator.randrange(1, 40)]
            case 2:
                changed[place:place] = changed[place : place + generator.randrange(1, 40)]
            case 3:
                changed[place:place] = bytes(generator.choice(b"cRQbioP\x81\x82\x92\x93h\x94(tue}].0") for _ in range(3))
            case _:
                changed[place] ^= 1 << generator.randrange(8)
        if not changed:
            return b""
    return bytes(changed)


_CONTENT = SEED_LOG.read_bytes()
_NAMES = [i for i in range(140_000) if _CONTENT[i : i + 12] == b"transformer."]


def test_tricks_are_real() -> None:
    """The tricks above are real: unpickled carelessly the first of them calls what it names."""
    called: list[str] = []

    def system(command: str) -> int:
        called.append(command)
        return 0

    class Careless(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return system if name == "system" else getattr(builtins, name)

    import io

    Careless(io.BytesIO(TRICKS["os.system"][0])).load()

    assert called == ["touch ran"]
