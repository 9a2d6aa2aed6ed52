"""Reads the original project's `log.pkl` without unpickling it: weights and losses, and nothing that runs.

The file is a raw pickle that holds a live optimizer. Its opcodes are interpreted one by one; a name to import becomes an inert
tag, calls are a table of the six functions that such a file needs, and whatever else occurs is refused. Time and memory are
bounded by the file's own size: no opcode copies more than it brings, and tensors are views of the bytes they came in.
"""

from __future__ import annotations

import math
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from picogpt.config import GPTConfig
from picogpt.errors import ConfigError, RunError
from picogpt.run import LossLog, Tensors
from picogpt.tokenizer import VOCAB_SIZE

__all__ = ["OriginalRun", "read_original"]

ROLLS_OF_A_STEP: Final = 8
"""Rolls in a step of the original, of ten windows each; its log counts steps only."""

_MOST_BYTES = 1 << 30
_MOST_OPCODES = 2_000_000
_MOST_DIMENSIONS = 8
_HEADER_BYTES = 1 << 12
"""What stands before the numbers of a storage is some 250 bytes."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_STORAGE_TYPES: Mapping[str, str] = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
}


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
        if size > _MOST_BYTES:
            raise RunError(f"{path}: {size:,} bytes are too many for a log of the original project (at most {_MOST_BYTES:,})")
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        return _extract(_Interpreter(content, _CALLS).run(), n_head)
    except _Refused as error:
        raise RunError(f"{path}: no log of the original project ({error}); nothing was run from it") from error


class _Refused(Exception):
    """The file does something that a log of the original project does not do."""


@dataclass(frozen=True)
class _Global:
    """A name that a pickle wants to have imported. It is not."""

    name: str


def _is_named(value: Any, name: str) -> bool:
    """Whether `value` is that name. Asked so, as comparing an array with something gives no answer."""
    return isinstance(value, _Global) and value.name == name


@dataclass(frozen=True)
class _Bytes:
    """Bytes, still where the file has them."""

    view: memoryview


@dataclass(eq=False)
class _Parameter:
    """A parameter, which the optimizer's state has for a key."""

    array: npt.NDArray[Any]


class _Object:
    """An AdamW, of which nothing is kept."""


_MARK = object()


class _Interpreter:
    """Runs the opcodes of a pickle on inert values.

    Args:
        content: the pickle.
        calls: what REDUCE may call, by name.
        persistent: what BINPERSID makes of its value; None refuses it.
        budget: opcodes that may still be run, shared with the pickles within this one.
    """

    def __init__(
        self,
        content: bytes | memoryview,
        calls: Mapping[str, Callable[[_Interpreter, Any], Any]],
        persistent: Callable[[Any], Any] | None = None,
        budget: list[int] | None = None,
    ) -> None:
        self._content = memoryview(content)
        self._calls, self._persistent = calls, persistent
        self.budget = [_MOST_OPCODES] if budget is None else budget
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.end = 0
        """Where the pickle ended."""

    def run(self) -> Any:
        """Interpret up to STOP; return the value there."""
        for name, argument in self._opcodes():
            if name == "STOP":
                value = self._pop()
                if self._stack:
                    raise _Refused("values are left over")
                return value
            handler = _HANDLERS.get(name)
            if handler is None:
                raise _Refused(f"opcode {name}")
            handler(self, argument)
        raise _Refused("it has no end")

    def _opcodes(self) -> Iterator[tuple[str, Any]]:
        """Names and arguments, one by one; long arguments are views."""
        position, content = 0, self._content
        while position < len(content):
            self.budget[0] -= 1
            if self.budget[0] < 0:
                raise _Refused("too many opcodes")
            opcode = _OPCODES.get(chr(content[position]))
            if opcode is None:
                raise _Refused(f"byte {content[position]:#x} is no opcode")
            position += 1
            argument, position = self._argument(opcode, position)
            self.end = position
            yield opcode.name, argument

    def _argument(self, opcode: pickletools.OpcodeInfo, position: int) -> tuple[Any, int]:
        if opcode.arg is None:
            return None, position
        form = opcode.arg.name
        if form in _LENGTHS:
            size = struct.calcsize(_LENGTHS[form])
            (length,) = struct.unpack(_LENGTHS[form], self._take(position, size))
            return _Bytes(self._take(position + size, length)), position + size + length
        if form in _NUMBERS:
            size = struct.calcsize(_NUMBERS[form])
            return struct.unpack(_NUMBERS[form], self._take(position, size))[0], position + size
        if form == "stringnl_noescape_pair":
            # The two lines of GLOBAL; the names that are known are short.
            lines = bytes(self._content[position : position + 256]).split(b"\n", 2)
            if len(lines) < 3:
                raise _Refused("a name without an end")
            return f"{lines[0].decode('latin1')}.{lines[1].decode('latin1')}", position + len(lines[0]) + len(lines[1]) + 2
        raise _Refused(f"opcode {opcode.name}")

    def _take(self, position: int, length: int) -> memoryview:
        if length > len(self._content) - position:
            raise _Refused("it is cut off")
        return self._content[position : position + length]

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise _Refused("a value is missing")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack:
            value = self._stack.pop()
            if value is _MARK:
                items.reverse()
                return items
            items.append(value)
        raise _Refused("a mark is missing")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise _Refused(f"no {kind.__name__} where one should be")
        return self._stack[-1]

    def _remember(self, index: int) -> None:
        if not self._stack or self._stack[-1] is _MARK:
            raise _Refused("nothing to remember")
        self._memo[index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise _Refused("nothing was remembered there")
        self._push(self._memo[index])

    def _text(self, argument: _Bytes) -> None:
        try:
            self._push(str(argument.view, "utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise _Refused("text that is not UTF-8") from error

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise _Refused("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys do not occur, and some can be made to collide.
            if not isinstance(key, str | _Parameter):
                raise _Refused("a key that is neither text nor parameter")
            target[key] = value

    def _append(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise _Refused("a name that is no text")
        self._push(_Global(f"{module}.{name}"))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise _Refused("a call of something that is no function")
        if function.name not in self._calls:
            raise _Refused(f"it calls {function.name[:80]}")
        self._push(self._calls[function.name](self, arguments))

    def _new_object(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if not _is_named(kind, "torch.optim.adamw.AdamW") or not isinstance(arguments, tuple) or arguments:
            raise _Refused("it makes an object of another class than AdamW")
        self._push(_Object())

    def _build(self) -> None:
        self._pop()
        # State of the optimizer, which is not kept, or metadata of the state dict.
        if not self._stack or not isinstance(self._stack[-1], _Object | dict):
            raise _Refused("it sets the state of something else than the optimizer")

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise _Refused("a persistent id")
        self._push(self._persistent(self._pop()))

    def _pop_tuple(self, count: int) -> None:
        self._push(tuple(reversed([self._pop() for _ in range(count)])))


_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_LENGTHS = {
    "long1": "<B",
    "unicodestring1": "<B",
    "unicodestring4": "<I",
    "unicodestring8": "<Q",
    "bytes1": "<B",
    "bytes4": "<I",
    "bytes8": "<Q",
}
_NUMBERS = {"uint1": "<B", "uint2": "<H", "int4": "<i", "uint4": "<I", "uint8": "<Q", "float8": ">d"}
_Handler = Callable[[_Interpreter, Any], None]


def _pushing(make: Callable[[], Any]) -> _Handler:
    """A handler that pushes what `make` makes."""
    return lambda machine, _: machine._push(make())


def _doing(action: Callable[[_Interpreter], None]) -> _Handler:
    """A handler of an opcode without an argument."""
    return lambda machine, _: action(machine)


_HANDLERS: Mapping[str, _Handler] = {
    **dict.fromkeys(("PROTO", "FRAME"), _doing(lambda _: None)),
    "MARK": _pushing(lambda: _MARK),
    "NONE": _pushing(lambda: None),
    "NEWTRUE": _pushing(lambda: True),
    "NEWFALSE": _pushing(lambda: False),
    "EMPTY_DICT": _pushing(dict),
    "EMPTY_LIST": _pushing(list),
    "EMPTY_TUPLE": _pushing(tuple),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT"), _Interpreter._push),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _Interpreter._push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Interpreter._text),
    "LONG1": lambda machine, argument: machine._push(int.from_bytes(argument.view, "little", signed=True)),
    "GLOBAL": lambda machine, argument: machine._push(_Global(argument)),
    "TUPLE1": _doing(lambda machine: machine._pop_tuple(1)),
    "TUPLE2": _doing(lambda machine: machine._pop_tuple(2)),
    "TUPLE3": _doing(lambda machine: machine._pop_tuple(3)),
    "TUPLE": _doing(lambda machine: machine._push(tuple(machine._pop_to_mark()))),
    "MEMOIZE": _doing(lambda machine: machine._remember(len(machine._memo))),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Interpreter._remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Interpreter._recall),
    "SETITEM": _doing(lambda machine: machine._set_items([machine._pop(), machine._pop()][::-1])),
    "SETITEMS": _doing(lambda machine: machine._set_items(machine._pop_to_mark())),
    "APPEND": _doing(lambda machine: machine._append([machine._pop()])),
    "APPENDS": _doing(lambda machine: machine._append(machine._pop_to_mark())),
    "STACK_GLOBAL": _doing(_Interpreter._stack_global),
    "REDUCE": _doing(_Interpreter._reduce),
    "NEWOBJ": _doing(_Interpreter._new_object),
    "BUILD": _doing(_Interpreter._build),
    "BINPERSID": _doing(_Interpreter._persistent_id),
}
"""What each opcode does; the others of the format do not occur in such a file."""


def _empty_dict(_: _Interpreter, arguments: Any) -> dict[Any, Any]:
    if arguments and not (len(arguments) == 1 and _is_named(arguments[0], "builtins.dict")):
        raise _Refused("a dict made from something")
    return {}


def _latin1(_: _Interpreter, arguments: Any) -> _Bytes:
    """Bytes as protocol 2 has them."""
    match arguments:
        case (str(text), str(encoding)) if encoding == "latin1":
            try:
                return _Bytes(memoryview(text.encode("latin1")))
            except UnicodeEncodeError as error:
                raise _Refused("bytes that are none") from error
    raise _Refused("another encoding than latin1")


def _storage(machine: _Interpreter, arguments: Any) -> npt.NDArray[Any]:
    """The numbers of a tensor: a legacy torch file within the pickle, with just one storage in it."""
    match arguments:
        case (_Bytes(view),):
            pass
        case _:
            raise _Refused("a storage that is no bytes")
    place = 0

    def interpret(persistent: Callable[[Any], Any] | None = None) -> Any:
        nonlocal place
        inner = _Interpreter(view[place : place + _HEADER_BYTES], {}, persistent, machine.budget)
        value = inner.run()
        place += inner.end
        return value

    if interpret() != _LEGACY_MAGIC or interpret() != _LEGACY_PROTOCOL:
        raise _Refused("a storage that is no legacy torch file")
    interpret()
    kind, key, count = _storage_id(interpret(lambda value: ("storage id", value)))
    if interpret() != [key]:
        raise _Refused("a storage of several")
    data = view[place:]
    item = np.dtype(kind)
    if len(data) < 8 or struct.unpack("<q", data[:8])[0] != count or len(data) - 8 != count * item.itemsize:
        raise _Refused("a storage of another length than it says")
    return np.frombuffer(data, item, offset=8)


def _storage_id(value: Any) -> tuple[str, str, int]:
    match value:
        case ("storage id", ("storage", _Global(name), str(key), str(), int(count), None)):
            kind = _STORAGE_TYPES.get(name.removeprefix("torch."))
            if kind is not None and name.startswith("torch.") and not isinstance(count, bool) and count >= 0:
                return kind, key, count
    raise _Refused("a storage of an unknown kind")


def _tensor(_: _Interpreter, arguments: Any) -> npt.NDArray[Any]:
    match arguments:
        case (np.ndarray() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), *_):
            pass
        case _:
            raise _Refused("a tensor of another form")
    if storage.ndim != 1 or not len(shape) == len(strides) <= _MOST_DIMENSIONS:
        raise _Refused("a tensor of another form")
    if not all(type(n) is int and n > 0 for n in shape) or offset < 0:
        raise _Refused("a tensor of an impossible shape")
    count = math.prod(shape)
    contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if tuple(strides) != contiguous or offset + count > storage.size:
        raise _Refused("a tensor that is not laid out in one piece")
    return storage[offset : offset + count].reshape(shape)


def _parameter(_: _Interpreter, arguments: Any) -> _Parameter:
    match arguments:
        case (np.ndarray() as array, bool(), dict()):
            return _Parameter(array)
    raise _Refused("a parameter of another form")


_CALLS: Mapping[str, Callable[[_Interpreter, Any], Any]] = {
    "collections.OrderedDict": _empty_dict,
    "collections.defaultdict": _empty_dict,
    "_codecs.encode": _latin1,
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}


def _extract(content: Any, n_head: int) -> OriginalRun:
    """Take what is worth keeping from the interpreted log."""
    match content:
        case {
            "best_weight": dict(weights),
            "best_loss": best,
            "losses": {"train": list(train), "val": list(val)},
            "iter_num": int(steps),
        }:
            pass
        case _:
            raise _Refused("best_weight, best_loss, losses or iter_num is missing")
    config = _shape(weights, n_head)
    if sum(value.size for value in weights.values() if isinstance(value, np.ndarray)) != _n_values(config):
        raise _Refused("its weights are not those of a GPT of one shape")
    arrays = {name: _weight(name, value) for name, value in weights.items()}
    # An epoch that was cut short has an entry in one of the lists only.
    n_epochs = min(len(train), len(val))
    chars = steps * ROLLS_OF_A_STEP * 10 * config.context_len
    log = LossLog(
        train=[_number(x) for x in train[:n_epochs]],
        val=[_number(x) for x in val[:n_epochs]],
        chars=[chars * (i + 1) // n_epochs for i in range(n_epochs)],
        seconds=[0.0] * n_epochs,
        best_loss=best if math.isfinite(best := _number(best)) else None,
        iter_num=steps,
    )
    if isinstance(steps, bool) or not 0 <= steps < 1 << 40:
        raise _Refused("an impossible number of steps")
    return OriginalRun(config=config, weights=arrays, log=log)


def _weight(name: Any, value: Any) -> npt.NDArray[np.float32]:
    if not isinstance(name, str) or not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise _Refused("a weight that is no tensor of numbers")
    array = value.astype(np.float32)
    if not np.isfinite(array).all():
        raise _Refused(f"{name[:80]} has values that are not finite")
    return array


def _number(value: Any) -> float:
    """A loss: a number or a tensor of one. It may be NaN or infinite, which says nothing about the best weights."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0].item()
    if not isinstance(value, int | float):
        raise _Refused("a loss that is no number")
    try:
        return float(value)
    except OverflowError as error:
        raise _Refused("a loss that is no number") from error


def _n_values(config: GPTConfig) -> int:
    """Numbers in a state dict of that shape, with the tied head twice."""
    C, bias = config.n_embd, config.bias
    block = 12 * C * C + 2 * C + (11 * C if bias else 0)
    return config.n_layer * block + (2 * config.vocab_size + config.context_len + 2) * C + (C if bias else 0)


def _shape(weights: Mapping[Any, Any], n_head: int) -> GPTConfig:
    """The model's shape as the weights have it."""
    wte, wpe = (weights.get(f"transformer.{name}.weight") for name in ("wte", "wpe"))
    if not (isinstance(wte, np.ndarray) and isinstance(wpe, np.ndarray) and wte.ndim == wpe.ndim == 2):
        raise _Refused("the embeddings are missing")
    if wte.shape[0] != VOCAB_SIZE:
        raise _Refused(f"a vocabulary of {wte.shape[0]} where {VOCAB_SIZE} ids are known")
    blocks = {name[:20].split(".")[2] for name in weights if isinstance(name, str) and name.startswith("transformer.h.")}
    try:
        return GPTConfig(
            n_layer=len(blocks),
            n_head=n_head,
            n_embd=wte.shape[1],
            context_len=wpe.shape[0] - 1,
            vocab_size=wte.shape[0],
            bias="transformer.ln_f.bias" in weights,
        )
    except ConfigError as error:
        raise _Refused(str(error)) from error
