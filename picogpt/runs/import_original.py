"""Read weights and losses from the original project's `log.pkl` without running any code in it.

The file is a raw pickle that contains a live optimizer. `pickle.Unpickler` reads it with inert stand-ins for imported names: a
dict for the dicts and the optimizer, and functions that only record their calls. A restricted `find_class` alone bounds neither
time nor memory, so each opcode is validated first:

- Only opcodes that such a file contains are allowed, up to a maximum number, and arguments must be complete.
  `pickletools.genops` would also parse arguments of other opcodes, which imports codecs and can take long.
- A memo index is at most the number of opcodes before it, as the unpickler allocates a table of that length.
- EMPTY_DICT is replaced by a persistent id, which creates the stand-in: it rejects keys that are not strings before they are
  hashed. Hashing nested tuples overflows the stack or takes forever, and integers can be made to collide.

A storage is a legacy torch file within the pickle. Its header is matched by a regular expression, not unpickled; tensors are
views of the bytes that follow.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from picogpt.alphabet import PICOGPT
from picogpt.config import GPTConfig
from picogpt.errors import ConfigError, RunError
from picogpt.runs.loss_log import LossLog
from picogpt.runs.tensor_file import Tensors

__all__ = ["OriginalRun", "read_original"]

SEQUENCES_PER_STEP: Final = 8
"""Sequences in a step of the original, of ten windows each. Its log counts steps only, so characters are computed from this."""

# Limits far above any log of the original; they bound the time and memory that a hostile file can cost.
_MAX_BYTES = 1 << 30
_MAX_OPCODES = 1_000_000
_MAX_DIMENSIONS = 8
# fmt: off
_ALLOWED = frozenset({
    "PROTO", "FRAME", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "MARK", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD",
})
# fmt: on
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
# EMPTY_DICT becomes NONE, BINPERSID. FRAME is dropped: its length is wrong once opcodes within the frame are replaced.
_REPLACED = {"EMPTY_DICT": b"NQ", "FRAME": b""}
# Imported names that become a `_Dict`, and those whose calls are recorded.
_DICTS = {"builtins.dict", "__builtin__.dict", "collections.OrderedDict", "collections.defaultdict", "torch.optim.adamw.AdamW"}
_FUNCTIONS = {
    "_codecs.encode",
    "torch.storage._load_from_bytes",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
}
# Little-endian, which the header states.
_STORAGE_TYPES = {b"Float": "<f4", b"Double": "<f8", b"Half": "<f2", b"Long": "<i8", b"Int": "<i4"}
# Header of a legacy torch file with one storage: five pickles, then the elements. `q` is BINPUT, which is optional.
_HEADER = re.compile(
    rb"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\."  # magic number
    rb"\x80\x02M\xe9\x03\."  # protocol version, 1001
    rb"\x80\x02\}q\x00\(X\x10\x00\x00\x00protocol_versionq\x01M\xe9\x03X\x0d\x00\x00\x00little_endianq\x02\x88"
    # Sizes of C types on the machine that wrote the file.
    rb"X\x0a\x00\x00\x00type_sizesq\x03\}q\x04\((?:X.\x00\x00\x00(?:short|int|long)q.K.){3}uu\."
    rb"\x80\x02\(X\x07\x00\x00\x00storage(?:q.)?ctorch\n(?P<type>\w{1,32})Storage\n(?:q.)?"  # persistent id: the type,
    rb"(?P<key>X.{4}\d{1,20})(?:q.)?X.{4}[\w:]{1,20}(?:q.)?"  # key and device,
    rb"(?:[KMJ]|\x8a.)(?P<count>.{1,8}?)Nt(?:q.)?Q\."  # number of elements, no view
    rb"\x80\x02\](?:q.)?(?P=key)(?:q.)?a\."  # keys of all storages
    rb"(?P<count_again>.{8})",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class OriginalRun:
    """The parts of an original run that are imported."""

    config: GPTConfig
    """The model's shape."""
    weights: Tensors
    """The best weights, by nanoGPT's names."""
    log: LossLog
    """Losses and steps. Characters are computed from the original's batch size; seconds are 0, as it did not record them."""


def read_original(path: Path, n_head: int) -> OriginalRun:
    """Read a `log.pkl` of the original project.

    Args:
        path: the file.
        n_head: attention heads, which the file does not contain.

    Raises:
        RunError: the file is missing, damaged, hostile or of another kind.
    """
    try:
        # Checked before reading, as the whole file is held in memory.
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise RunError(f"{path}: {size:,} bytes are too many for a log of the original project (at most {_MAX_BYTES:,})")
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        return _extract(_unpickle(content), n_head, size)
    except _Rejected as error:
        raise RunError(f"{path}: no log of the original project ({error}); nothing was run from it") from error


class _Rejected(Exception):
    """The file contains something that no log of the original project contains."""


class _Call(NamedTuple):
    """A call requested by the file. It is recorded, never executed."""

    function: str
    arguments: tuple[Any, ...]


class _Function(NamedTuple):
    """Stand-in for an imported function; calling it records the call. A tuple has no attributes that BUILD could set."""

    name: str

    def __call__(self, *arguments: Any) -> _Call:
        return _Call(self.name, arguments)


class _Dict(dict[str, Any]):
    """Stand-in for every dict of the file, and for the optimizer. Unexpected use raises `_Rejected`."""

    __slots__ = ()

    def __init__(self, *arguments: Any) -> None:
        if arguments not in ((), (_Dict,)):  # defaultdict(dict) is the only call with an argument
            raise _Rejected("a dict made from something")
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str):
            super().__setitem__(key, value)
        elif not isinstance(key, _Call):  # the optimizer's state has parameters as keys, and is dropped
            raise _Rejected("a key that is neither text nor parameter")

    def __setstate__(self, state: Any) -> None:
        """Drop the optimizer's attributes and the metadata of a state dict."""


class _InertUnpickler(pickle.Unpickler):
    """Unpickler that imports nothing: a known name becomes a stand-in, any other raises `_Rejected`."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in _DICTS:
            return _Dict
        if full_name in _FUNCTIONS:
            return _Function(full_name)
        raise _Rejected(f"it imports {full_name[:80]!a}")

    def persistent_load(self, pid: Any) -> _Dict:  # noqa: ARG002 - the only id is that of EMPTY_DICT
        return _Dict()


def _unpickle(content: bytes) -> Any:
    """Return the pickle's value, built of stand-ins; raise `_Rejected` if it is damaged or has unknown names or opcodes."""
    try:
        return _InertUnpickler(_checked(content)).load()
    except (_Rejected, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _Rejected(f"it is damaged: {str(error)[:80]!a}") from error


def _checked(content: bytes) -> io.BytesIO:
    """Return the pickle with opcodes replaced; raise `_Rejected` for a forbidden one, ValueError for a truncated argument."""
    # Everything from `start` on is not yet copied to `checked`: long stretches are copied at once.
    stream, checked, view, start = io.BytesIO(content), io.BytesIO(), memoryview(content), 0
    for count in range(_MAX_OPCODES):
        position = stream.tell()
        code = stream.read(1).decode("latin1")
        opcode = _OPCODES.get(code)
        if opcode is None:
            raise _Rejected(f"byte {ord(code):#x} is no opcode" if code else "it has no end")
        if opcode.name not in _ALLOWED:
            raise _Rejected(f"opcode {opcode.name}")
        # The reader skips the argument, and checks its length against the content.
        argument: Any = None if opcode.arg is None else opcode.arg.reader(stream)
        if opcode.name in _REPLACED:
            checked.write(view[start:position])
            checked.write(_REPLACED[opcode.name])
            start = stream.tell()
        if opcode.name == "LONG_BINPUT" and argument > count:
            raise _Rejected("a memo index beyond the opcodes before it")
        if opcode.name == "STOP":
            checked.write(view[start : stream.tell()])
            checked.seek(0)
            return checked
    raise _Rejected("too many opcodes")


def _extract(content: Any, n_head: int, n_bytes: int) -> OriginalRun:
    """Return the imported parts of a log, a file of `n_bytes`; raise `_Rejected` if one is missing or impossible."""
    match content:
        case {
            "best_weight": dict(weights),
            "best_loss": best,
            "losses": {"train": list(train), "val": list(val)},
            "iter_num": int(steps),
        }:
            pass
        case _:
            raise _Rejected("best_weight, best_loss, losses or iter_num is missing")
    encode = functools.cache(_latin1)  # a hostile file may use one long string for many tensors
    arrays = {name: _tensor(value, encode) for name, value in weights.items()}
    config = _shape(arrays, n_head)
    n_values = _n_values(config)
    # Names and shapes in detail are checked when the weights are loaded into a model.
    if sum(array.size for array in arrays.values()) != n_values:
        raise _Rejected("its weights are not those of a GPT of one shape")
    # Small storages viewed many times would expand to far more memory than the file. An honest file has at least two bytes per
    # value, with the tied head counted twice and stored once.
    if n_values > n_bytes:
        raise _Rejected("it has fewer bytes than weights")
    if isinstance(steps, bool) or not 0 <= steps < 1 << 40:
        raise _Rejected("an impossible number of steps")
    # An interrupted epoch may have an entry in only one of the lists.
    n_epochs = min(len(train), len(val))
    chars = steps * SEQUENCES_PER_STEP * 10 * config.context_len
    log = LossLog(
        train=[_number(x, encode) for x in train[:n_epochs]],
        val=[_number(x, encode) for x in val[:n_epochs]],
        chars=[chars * (i + 1) // n_epochs for i in range(n_epochs)],
        seconds=[0.0] * n_epochs,
        best_loss=best if math.isfinite(best := _number(best, encode)) else None,
        iter_num=steps,
    )
    return OriginalRun(config=config, weights={name: _weight(name, array) for name, array in arrays.items()}, log=log)


def _tensor(value: Any, encode: Callable[[str], bytes]) -> npt.NDArray[Any]:
    """Return a view of a tensor's elements; raise `_Rejected` unless `value` rebuilds a contiguous tensor within its storage."""
    match value:
        case _Call(
            "torch._utils._rebuild_tensor_v2", (storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), *_)
        ) if len(shape) == len(strides) <= _MAX_DIMENSIONS:
            pass
        case _:
            raise _Rejected("a tensor of another form")
    elements = _storage(storage, encode)
    # type() and not isinstance, as bool is a subclass of int.
    if not all(type(n) is int and n > 0 for n in shape) or offset < 0:
        raise _Rejected("a tensor of an impossible shape")
    # Row-major strides: overlapping ones would view a small storage as a large tensor.
    contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if strides != contiguous or offset + math.prod(shape) > elements.size:
        raise _Rejected("a tensor that is not laid out in one piece")
    return elements[offset : offset + math.prod(shape)].reshape(shape)


def _storage(value: Any, encode: Callable[[str], bytes]) -> npt.NDArray[Any]:
    """Return a view of a storage's elements; raise `_Rejected` unless it is a legacy torch file of the stated type and length."""
    match value:
        case _Call("torch.storage._load_from_bytes", (bytes(data),)):
            pass
        case _Call("torch.storage._load_from_bytes", (_Call("_codecs.encode", (str(text), "latin1")),)):
            data = encode(text)  # protocol 2 has no bytes: they are pickled as a latin1 string and a call of encode
        case _:
            raise _Rejected("a storage that is no bytes")
    header = _HEADER.match(data)
    if header is None:
        raise _Rejected("a storage that is no legacy torch file of one storage")
    if header["type"] not in _STORAGE_TYPES:
        raise _Rejected(f"a storage of an unknown kind, {header['type'].decode()}")
    item = np.dtype(_STORAGE_TYPES[header["type"]])
    count, count_again = (int.from_bytes(header[name], "little") for name in ("count", "count_again"))
    if count != count_again or len(data) - header.end() != count * item.itemsize:
        raise _Rejected("a storage of another length than it says")
    return np.frombuffer(data, item, offset=header.end())


def _latin1(text: str) -> bytes:
    """Return the bytes that protocol 2 pickles as a string; raise `_Rejected` for characters beyond latin1."""
    try:
        return text.encode("latin1")
    except UnicodeEncodeError as error:
        raise _Rejected("bytes that are none") from error


def _weight(name: str, array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return a weight in float32; raise `_Rejected` if it has integers or values that are not finite."""
    if array.dtype.kind != "f":
        raise _Rejected("a weight that is no tensor of numbers")
    # Checked after the conversion, in which a large float64 overflows to infinity.
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise _Rejected(f"{name[:80]!a} has values that are not finite")
    return array


def _number(value: Any, encode: Callable[[str], bytes]) -> float:
    """Return a loss, stored as a number or a tensor of one element; NaN and infinity are valid. Else raise `_Rejected`."""
    if isinstance(value, _Call) and (array := _tensor(value, encode)).size == 1:
        value = array.item()
    try:
        if isinstance(value, int | float):
            return float(value)
    except OverflowError as error:  # an integer beyond the range of floats
        raise _Rejected("a loss that is no number") from error
    raise _Rejected("a loss that is no number")


def _n_values(config: GPTConfig) -> int:
    """Return the number of values in a state dict of this shape; the tied head counts twice, as both names are stored."""
    C, bias = config.n_embd, config.bias
    # Matrices C x 3C, C x C, C x 4C and 4C x C, and the gains of two norms.
    # Biases 3C + C + 4C + C, and C for each of the two norms.
    block = 12 * C * C + 2 * C + (11 * C if bias else 0)
    return config.n_layer * block + (2 * config.vocab_size + config.context_len + 2) * C + (C if bias else 0)


def _shape(arrays: Tensors, n_head: int) -> GPTConfig:
    """Derive the model's shape from the weights; raise `_Rejected` if they have none."""
    wte, wpe = (arrays.get(f"transformer.{name}.weight") for name in ("wte", "wpe"))
    if wte is None or wpe is None or not wte.ndim == wpe.ndim == 2:
        raise _Rejected("the embeddings are missing")
    if wte.shape[0] != PICOGPT.vocab_size:
        raise _Rejected(f"a vocabulary of {wte.shape[0]} where {PICOGPT.vocab_size} ids are known")
    # The index in transformer.h.<index>.; the slice keeps a hostile long name from being split.
    blocks = {name[:20].split(".")[2] for name in arrays if name.startswith("transformer.h.")}
    try:
        return GPTConfig(
            n_layer=len(blocks),
            n_head=n_head,
            n_embd=wte.shape[1],
            context_len=wpe.shape[0] - 1,  # one position is the context vector's
            vocab_size=wte.shape[0],
            bias="transformer.ln_f.bias" in arrays,
        )
    except ConfigError as error:
        raise _Rejected(str(error)) from error
