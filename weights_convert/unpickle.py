"""Reader of pickles as data: the stack machine of Python's pickle, without importing or calling anything it names.

A pickle is a program that builds objects by calling functions by name. Here a name stays a name: functions that rebuild
tensors are recognized and replaced, using storages from the file; containers become plain dicts and lists; other
objects of training, from a fixed list of names, become empty stand-ins that ignore every operation. Any other name is
refused, and so is anything that costs more than its size: keys of a dict are texts and integers (hashing nested tuples
takes time exponential in their depth), and the number of instructions is bounded.
"""

from __future__ import annotations

import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.config import quote
from minidiff.errors import CheckpointError

MOST_INSTRUCTIONS = 1_000_000  # per pickle; SDXL has 90,000
MOST_DIMENSIONS = 16
LARGEST_KEY = 2**60  # larger integers may share a hash in large numbers

STORAGES: dict[str, torch.dtype | None] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": None,  # bytes, whose dtype is that of the tensor
}
DTYPES = {str(dtype): dtype for dtype in (*STORAGES.values(), torch.float8_e4m3fn, torch.float8_e5m2) if dtype}
# Names that are allowed, and never called.
VALUES = (*STORAGES, *DTYPES, "torch.Tensor")
FOREIGN = {"torch._utils._rebuild_sparse_tensor": "sparse", "torch._utils._rebuild_qtensor": "quantized"}
PARAMETERS = "torch.nn.modules.container.ParameterDict"
DICTS = ("collections.OrderedDict", "collections.Counter", "collections.defaultdict", "builtins.dict", PARAMETERS)
# Names that become stand-ins. Most come from training loops, and none holds a tensor of a model.
HARMLESS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf)\.[\w.]+"
    r"|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray|dtypes\.\w+)"
    r"|builtins\.(bool|bytearray|complex|float|int|list|object|set|str|tuple)|typing\.Any"
    r"|pathlib\.\w*Path|argparse\.Namespace|_codecs\.encode|torch\.(Size|device)|torch\.serialization\._get_layout"
)


class Storage(NamedTuple):
    """Range of the file's bytes; ``dtype`` None: that of the tensor. ``data`` None: not available yet."""

    data: torch.UntypedStorage | None
    dtype: torch.dtype | None
    nbytes: int


class Global:
    """A name that a pickle mentions."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name


class Inert:
    """Stand-in for an object of training."""


class Parameters(dict[Any, Any]):
    """Stand-in for a ParameterDict, the format of the first learned words: its tensors by name."""


class Foreign(NamedTuple):
    """Tensor of a kind that minidiff does not support."""

    kind: str


INERT = Inert()
Load = Callable[[str, "torch.dtype | None", int], Storage]


def unpickle(file: Any, load: Load) -> Any:
    """Return the object in the next pickle of ``file`` (with ``read`` and ``readline``).

    ``load(key, dtype, count)`` returns the storage with that key and number of entries. Raises :class:`CheckpointError`
    for a name, an instruction or a tensor that is refused; damaged pickles may raise other errors.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def marked() -> list[Any]:
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    for _ in range(MOST_INSTRUCTIONS):
        opcode = OPCODES.get(file.read(1))
        if opcode is None:
            raise CheckpointError("an instruction that torch.save does not write")
        argument: Any = None if opcode.arg is None else opcode.arg.reader(file)
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                outer.append(stack)
                stack = []
            case "POP":
                stack.pop()
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE" | "FROZENSET":
                items = marked()  # first, since the stack is another one afterwards
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "APPEND":
                _extend(stack[-2], [stack.pop()])
            case "APPENDS" | "ADDITEMS":
                items = marked()
                _extend(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _update(stack[-1], [(key, value)])
            case "SETITEMS":
                items = marked()
                _update(stack[-1], zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_name(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], (dict, Inert)):
                    raise CheckpointError(f"it sets the state of a {type(stack[-1]).__name__}")
                if isinstance(stack[-1], Parameters) and isinstance(state, dict):
                    stack[-1].update(state.get("_parameters") or {})
            case "BINPERSID":
                stack.append(_storage(stack.pop(), load))
            case _:  # a number or a text
                stack.append(argument)
    raise CheckpointError(f"more than {MOST_INSTRUCTIONS:,} instructions; a checkpoint has far fewer")


_NAMES = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_LIST", "EMPTY_SET", "EMPTY_DICT", "EMPTY_TUPLE", "TUPLE", "FROZENSET"),
    *("TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL"),
    *("REDUCE", "NEWOBJ", "BUILD", "BINPERSID", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
)
OPCODES = {op.code.encode("latin-1"): op for op in pickletools.opcodes if op.name in _NAMES}


def _name(module: Any, name: Any) -> Global:
    """Return the name in Python 3 (protocol 2 still writes Python 2's), if it is allowed."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise CheckpointError("a name that is no text")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    full = f"{module}.{name}"
    if full in VALUES or full in DICTS or full in FUNCTIONS or full in FOREIGN or HARMLESS.fullmatch(full):
        return Global(full)
    raise CheckpointError(f"refused, its pickle asks for {full}; only tensors are loaded")


def _call(function: Any, arguments: Any) -> Any:
    name = function.name if isinstance(function, Global) else None
    if name is None or name in VALUES or not isinstance(arguments, tuple):
        what = name or f"a {type(function).__name__}"
        raise CheckpointError(f"refused, its pickle calls {what}; only tensors that were stored are loaded")
    if name in FUNCTIONS:
        return FUNCTIONS[name](*arguments)
    if name in FOREIGN:
        return Foreign(FOREIGN[name])
    if name not in DICTS:
        return INERT
    made: dict[Any, Any] = Parameters() if name == PARAMETERS else {}
    for given in arguments:
        if isinstance(given, dict):
            made.update(given)
        elif isinstance(given, list):
            _update(made, given)
    return made


def _extend(there: Any, items: list[Any]) -> None:
    if isinstance(there, list):
        there.extend(items)
    elif not isinstance(there, Inert):
        raise CheckpointError(f"it appends to a {type(there).__name__}")


def _update(there: Any, items: Any) -> None:
    if isinstance(there, Inert):
        return
    if not isinstance(there, dict):
        raise CheckpointError(f"it puts items into a {type(there).__name__}")
    for key, value in items:
        fits = isinstance(key, (str, Global, type(None))) or (isinstance(key, int) and abs(key) < LARGEST_KEY)
        if not fits:
            raise CheckpointError(f"refused, a {type(key).__name__} is the key of a dict; keys are texts and numbers")
        there[key] = value


def _storage(asked: Any, load: Load) -> Storage:
    """Resolve torch's persistent id: ("storage", kind, key, device, number of entries[, None])."""
    if (
        not isinstance(asked, tuple)
        or len(asked) not in (5, 6)
        or asked[0] != "storage"
        or asked[5:] not in ((), (None,))
    ):
        raise CheckpointError("it asks for something that is no storage of torch's")
    _, kind, key, _, count = asked[:5]
    if not isinstance(kind, Global) or kind.name not in STORAGES or type(key) is not str or type(count) is not int:
        raise CheckpointError("it describes a storage in a way that torch.save does not")
    if not 0 <= count < 2**60:
        raise CheckpointError(f"storage {quote(key)} is said to have {quote(count)} entries")
    return load(key, STORAGES[kind.name], count)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """Return the tensor in ``storage`` at ``offset``; the other arguments (gradients, hooks) concern training."""
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise CheckpointError("a tensor without a storage")
    return _placed(storage, storage.dtype, offset, size, stride)


def _tensor_of(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any) -> Any:
    """Return a tensor as :func:`_tensor` does, for a dtype without a storage class of its own."""
    if not isinstance(storage, Storage) or not isinstance(dtype, Global) or dtype.name not in DTYPES:
        raise CheckpointError("a tensor without a storage")
    return _placed(storage, DTYPES[dtype.name], offset, size, stride)


def _placed(storage: Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Tensor | Inert:
    told = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else ("",)
    if not all(type(n) is int and 0 <= n < 2**62 for n in told) or not len(size) == len(stride) <= MOST_DIMENSIONS:
        # Not quoted: writing out nested tuples takes as long as hashing them.
        raise CheckpointError("a tensor whose shape, strides or offset are no whole numbers, or negative or too many")
    end = offset + (1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else 0)
    if end * dtype.itemsize > storage.nbytes:
        raise CheckpointError(f"a tensor of shape {quote(size)} reaches beyond its storage of {storage.nbytes:,} bytes")
    if storage.data is None:
        return INERT
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage.data, offset, size, stride)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _typed(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Return the plain tensor of a tensor subclass or of one with attributes."""
    return _call(function, arguments)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
}
