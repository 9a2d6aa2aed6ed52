"""Reads the original project's `log.pkl`: weights and losses, and nothing that runs.

The file is a raw pickle that holds a live optimizer. `pickle.Unpickler` reads it with inert stand-ins for imported names: a dict
for the dicts and the optimizer, and functions that only record their calls. A restricted `find_class` alone bounds neither time
nor memory, so each opcode is checked first:

- Only opcodes of such a file are allowed, and a limited number of them; arguments are as long as they say. `pickletools.genops`
  would parse arguments of the others too, which imports codecs and can take long.
- A memo index is at most the number of opcodes before it, as the unpickler allocates a table of that length.
- EMPTY_DICT is replaced by a persistent id, which makes the stand-in: it rejects keys that are not text before they are hashed.
  Hashing nested tuples overflows the stack or takes forever, and integers can be made to collide.

A storage is a legacy torch file within the pickle. Its header is matched, not unpickled; its numbers are views.
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

from picogpt.config import GPTConfig
from picogpt.errors import ConfigError, RunError
from picogpt.runs.folder import LossLog, Tensors
from picogpt.tokenizer import VOCAB_SIZE

__all__ = ["OriginalRun", "read_original"]

SEQUENCES_PER_STEP: Final = 8
"""Rolls in a step of the original, of ten windows each; its log counts steps only."""

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
_REPLACED = {"EMPTY_DICT": b"NQ", "FRAME": b""}
"""Opcodes that are replaced, by NONE and BINPERSID or by nothing."""
_DICTS = {"builtins.dict", "__builtin__.dict", "collections.OrderedDict", "collections.defaultdict", "torch.optim.adamw.AdamW"}
_FUNCTIONS = {
    "_codecs.encode",
    "torch.storage._load_from_bytes",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
}
_STORAGE_TYPES = {b"Float": "<f4", b"Double": "<f8", b"Half": "<f2", b"Long": "<i8", b"Int": "<i4"}
_HEADER = re.compile(
    rb"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\."  # magic number
    rb"\x80\x02M\xe9\x03\."  # version of the format
    rb"\x80\x02\}q\x00\(X\x10\x00\x00\x00protocol_versionq\x01M\xe9\x03X\x0d\x00\x00\x00little_endianq\x02\x88"
    rb"X\x0a\x00\x00\x00type_sizesq\x03\}q\x04\((?:X.\x00\x00\x00(?:short|int|long)q.K.){3}uu\."
    rb"\x80\x02\(X\x07\x00\x00\x00storage(?:q.)?ctorch\n(?P<type>\w{1,32})Storage\n(?:q.)?"  # persistent id: the type,
    rb"(?P<key>X.{4}\d{1,20})(?:q.)?X.{4}[\w:]{1,20}(?:q.)?"  # key and device,
    rb"(?:[KMJ]|\x8a.)(?P<count>.{1,8}?)Nt(?:q.)?Q\."  # number of elements, no view
    rb"\x80\x02\](?:q.)?(?P=key)(?:q.)?a\."  # keys of all storages
    rb"(?P<count_again>.{8})",
    re.DOTALL,
)
"""What stands before the elements in a legacy torch file of one storage; `q` puts a value into the memo."""


@dataclass(frozen=True, kw_only=True)
class OriginalRun:
    """What is worth bringing over of a run of the original project."""

    config: GPTConfig
    """The model's shape."""
    weights: Tensors
    """The best weights, by nanoGPT's names."""
    log: LossLog
    """Losses and steps; characters as the original's batches had them, seconds 0, as it did not count them."""


def read_original(path: Path, n_head: int) -> OriginalRun:
    """Read a `log.pkl` of the original project.

    Args:
        path: the file.
        n_head: attention heads, which the file does not tell.

    Raises:
        RunError: the file is missing, damaged, hostile or of another kind.
    """
    try:
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
    """The file does something that a log of the original project does not do."""


class _Call(NamedTuple):
    """A call that the file asks for. It is not made."""

    function: str
    arguments: tuple[Any, ...]


class _Function(NamedTuple):
    """A function that the file imports. A call of it is recorded; as a tuple it has no attributes that BUILD could set."""

    name: str

    def __call__(self, *arguments: Any) -> _Call:
        return _Call(self.name, arguments)


class _Dict(dict[str, Any]):
    """Every dict of the file, and the optimizer. Its methods raise `_Rejected` for what such a file does not do."""

    __slots__ = ()

    def __init__(self, *arguments: Any) -> None:
        if arguments not in ((), (_Dict,)):  # a defaultdict is given the class of its values
            raise _Rejected("a dict made from something")
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str):
            super().__setitem__(key, value)
        elif not isinstance(key, _Call):  # the optimizer's state is by parameter, and is dropped
            raise _Rejected("a key that is neither text nor parameter")

    def __setstate__(self, state: Any) -> None:
        """Drop the optimizer's attributes and the metadata of a state dict."""


class _InertUnpickler(pickle.Unpickler):
    """Imports nothing: a name becomes a stand-in, or raises `_Rejected`."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in _DICTS:
            return _Dict
        if full_name in _FUNCTIONS:
            return _Function(full_name)
        raise _Rejected(f"it imports {full_name[:80]!a}")

    def persistent_load(self, pid: Any) -> _Dict:  # noqa: ARG002 - the only id stands for EMPTY_DICT
        return _Dict()


def _unpickle(content: bytes) -> Any:
    """The pickle's value, made of stand-ins; `_Rejected` if it is damaged, or has names or opcodes that such a file has not."""
    try:
        return _InertUnpickler(_checked(content)).load()
    except (_Rejected, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _Rejected(f"it is damaged: {str(error)[:80]!a}") from error


def _checked(content: bytes) -> io.BytesIO:
    """The pickle with opcodes replaced; `_Rejected` for one that is not allowed, ValueError where an argument is cut off."""
    stream, checked, view, start = io.BytesIO(content), io.BytesIO(), memoryview(content), 0
    for count in range(_MAX_OPCODES):
        position = stream.tell()
        code = stream.read(1).decode("latin1")
        opcode = _OPCODES.get(code)
        if opcode is None:
            raise _Rejected(f"byte {ord(code):#x} is no opcode" if code else "it has no end")
        if opcode.name not in _ALLOWED:
            raise _Rejected(f"opcode {opcode.name}")
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
    """The parts worth keeping of the log, a file of `n_bytes`; `_Rejected` if one is missing or impossible."""
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
    encode = functools.cache(_latin1)  # many tensors may share a text
    arrays = {name: _tensor(value, encode) for name, value in weights.items()}
    config = _shape(arrays, n_head)
    n_values = _n_values(config)
    if sum(array.size for array in arrays.values()) != n_values:
        raise _Rejected("its weights are not those of a GPT of one shape")
    if n_values > n_bytes:  # two bytes each and the head stored once make them nearly equal; many views of a storage, larger
        raise _Rejected("it has fewer bytes than weights")
    if isinstance(steps, bool) or not 0 <= steps < 1 << 40:
        raise _Rejected("an impossible number of steps")
    # An epoch that was cut short has an entry in one of the lists only.
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
    """View of a tensor's elements; `_Rejected` if `value` is no call that rebuilds a contiguous one within its storage."""
    match value:
        case _Call(
            "torch._utils._rebuild_tensor_v2", (storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), *_)
        ) if len(shape) == len(strides) <= _MAX_DIMENSIONS:
            pass
        case _:
            raise _Rejected("a tensor of another form")
    elements = _storage(storage, encode)
    if not all(type(n) is int and n > 0 for n in shape) or offset < 0:
        raise _Rejected("a tensor of an impossible shape")
    contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if strides != contiguous or offset + math.prod(shape) > elements.size:
        raise _Rejected("a tensor that is not laid out in one piece")
    return elements[offset : offset + math.prod(shape)].reshape(shape)


def _storage(value: Any, encode: Callable[[str], bytes]) -> npt.NDArray[Any]:
    """View of a storage's elements; `_Rejected` if it is no legacy torch file of one storage of its type and length."""
    match value:
        case _Call("torch.storage._load_from_bytes", (bytes(data),)):
            pass
        case _Call("torch.storage._load_from_bytes", (_Call("_codecs.encode", (str(text), "latin1")),)):
            data = encode(text)  # protocol 2 has no bytes
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
    """The bytes that protocol 2 has as text; `_Rejected` for other text."""
    try:
        return text.encode("latin1")
    except UnicodeEncodeError as error:
        raise _Rejected("bytes that are none") from error


def _weight(name: str, array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The weight in float32; `_Rejected` if it holds integers or values that are not finite."""
    if array.dtype.kind != "f":
        raise _Rejected("a weight that is no tensor of numbers")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise _Rejected(f"{name[:80]!a} has values that are not finite")
    return array


def _number(value: Any, encode: Callable[[str], bytes]) -> float:
    """A loss: a number or a tensor of one, which may be NaN or infinite; `_Rejected` for anything else."""
    if isinstance(value, _Call) and (array := _tensor(value, encode)).size == 1:
        value = array.item()
    try:
        if isinstance(value, int | float):
            return float(value)
    except OverflowError as error:
        raise _Rejected("a loss that is no number") from error
    raise _Rejected("a loss that is no number")


def _n_values(config: GPTConfig) -> int:
    """Numbers in a state dict of that shape, with the tied head twice."""
    C, bias = config.n_embd, config.bias
    block = 12 * C * C + 2 * C + (11 * C if bias else 0)
    return config.n_layer * block + (2 * config.vocab_size + config.context_len + 2) * C + (C if bias else 0)


def _shape(arrays: Tensors, n_head: int) -> GPTConfig:
    """The model's shape as the weights have it; `_Rejected` if there is none."""
    wte, wpe = (arrays.get(f"transformer.{name}.weight") for name in ("wte", "wpe"))
    if wte is None or wpe is None or not wte.ndim == wpe.ndim == 2:
        raise _Rejected("the embeddings are missing")
    if wte.shape[0] != VOCAB_SIZE:
        raise _Rejected(f"a vocabulary of {wte.shape[0]} where {VOCAB_SIZE} ids are known")
    blocks = {name[:20].split(".")[2] for name in arrays if name.startswith("transformer.h.")}
    try:
        return GPTConfig(
            n_layer=len(blocks),
            n_head=n_head,
            n_embd=wte.shape[1],
            context_len=wpe.shape[0] - 1,
            vocab_size=wte.shape[0],
            bias="transformer.ln_f.bias" in arrays,
        )
    except ConfigError as error:
        raise _Rejected(str(error)) from error
