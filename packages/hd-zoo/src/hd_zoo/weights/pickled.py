"""The tensors of a ``torch.save`` file, read without running its pickle.

Such a file is a zip archive: ``data.pkl``, a program for a small stack machine, and one record of bytes per storage.
The program is read here as data. It can make dictionaries, lists, tuples, text, numbers and descriptions of tensors;
whatever else it asks for is refused by name. No object of its choice is made and no function of its choice is called.
A tensor's size is held against its record before there is a tensor, and the tensor is a view of the mapped file.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

#: Of ``data.pkl``; a checkpoint of a thousand tensors with its optimiser has about 0.5 MB. [ours]
PROGRAM_BYTES = 16_000_000
#: Storage classes by the names in the file. Only floating point can be weights; the others may stand beside them.
STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_DICTIONARIES = ("collections OrderedDict", "argparse Namespace")
_TENSOR, _PARAMETER, _SIZE = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch Size"


class Storage(NamedTuple):
    """A record of the archive by its key, and how many numbers the program says it has."""

    dtype: torch.dtype
    key: str
    numel: int


class Dense(NamedTuple):
    """A tensor that is not there yet: where in which storage its numbers lie."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Name(str):
    """A global name that the program mentions, "module name"."""


class Archive:
    """An open ``torch.save`` file: ``contents``, with :class:`Dense` in place of tensors, and :meth:`tensor`.

    Raises:
        ValueError: for anything but dictionaries, lists, tuples, text, numbers and dense tensors, with its name.
        OSError: if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            try:
                self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except ValueError as error:
                raise ValueError("the file is empty") from error
        try:
            self._zip = zipfile.ZipFile(_Mapped(self._buffer))
        except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError, OverflowError, OSError) as error:
            raise ValueError(f"not a zip archive of torch.save: {error}") from error
        programs = [one for one in self._zip.infolist() if one.filename.rsplit("/", 1)[-1] == "data.pkl"]
        if len(programs) != 1:
            raise ValueError("not a zip archive of torch.save: it holds no data.pkl, or several")
        self._folder = programs[0].filename[: -len("data.pkl")]
        if self._small("byteorder", b"little") != b"little":
            raise ValueError("the file is of a big-endian machine")
        if programs[0].file_size > PROGRAM_BYTES:
            raise ValueError(f"data.pkl has {programs[0].file_size:,} bytes; at most {PROGRAM_BYTES:,} are read")
        self.contents = run(bytes(self._bytes(programs[0])))

    def tensor(self, dense: Dense) -> Tensor:
        """A view of the file, which stays mapped; what is written to it stays in memory.

        Raises:
            ValueError: if the tensor's numbers are not all in its record, or lie there more than once (expanded).
        """
        storage, size = dense.storage, dense.storage.dtype.itemsize
        if not storage.dtype.is_floating_point:
            raise ValueError(f"it has dtype {storage.dtype}, not a floating-point one")
        numbers = [storage.numel, dense.offset, *dense.shape, *dense.stride]
        if len(dense.shape) != len(dense.stride) or not all(type(one) is int and 0 <= one < 2**62 for one in numbers):
            raise ValueError("its shape or stride is damaged")
        record = self._record(f"data/{storage.key}")
        if record is None or record.file_size < storage.numel * size:
            raise ValueError(f"its {storage.numel:,} numbers are not in the file")
        last = dense.offset + sum((n - 1) * step for n, step in zip(dense.shape, dense.stride, strict=True))
        if math.prod(dense.shape) == 0:
            return torch.empty(dense.shape, dtype=storage.dtype)
        if last >= storage.numel or math.prod(dense.shape) > storage.numel:
            raise ValueError(f"its shape {dense.shape} does not fit the {storage.numel:,} numbers of its storage")
        whole = torch.frombuffer(self._bytes(record), dtype=storage.dtype, count=storage.numel)
        return whole.as_strided(dense.shape, dense.stride, dense.offset)

    def _record(self, name: str) -> zipfile.ZipInfo | None:
        try:
            return self._zip.getinfo(self._folder + name)
        except KeyError:
            return None

    def _small(self, name: str, default: bytes) -> bytes:
        record = self._record(name)
        return default if record is None else bytes(self._bytes(record)[:16])

    def _bytes(self, record: zipfile.ZipInfo) -> memoryview:
        """A record where it lies in the file: torch stores without compression."""
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise ValueError(f"{record.filename} is compressed or encrypted, which torch.save never does")
        start = record.header_offset
        header = self._buffer[start : start + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"the header of {record.filename} is damaged")
        start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if start + record.file_size > len(self._buffer):
            raise ValueError(f"{record.filename} reaches beyond the end of the file")
        return memoryview(self._buffer)[start : start + record.file_size]


class _Mapped(io.RawIOBase):
    """A mapped file as zipfile reads it: without a copy, and with a place of its own."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer, self._at = buffer, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._at, len(self._buffer))[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = len(self._buffer) if size is None or size < 0 else self._at + size
        found = self._buffer[self._at : end]
        self._at += len(found)
        return found


def run(program: bytes) -> Any:
    """What a pickle of protocol 2 describes, made of plain values and :class:`Dense` alone.

    Raises:
        ValueError: for a damaged program, and for one that asks for anything else, with its name.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        found = stack[start:]
        del stack[start:]
        return found

    try:
        for opcode, value, _ in pickletools.genops(program):
            name, argument = opcode.name, cast(Any, value)
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                stack.append(argument)
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name == "GLOBAL":
                stack.append(_Name(argument))
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name in _TUPLES:
                count = _TUPLES[name]
                stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in ("SETITEM", "SETITEMS"):
                pairs = since_mark() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
                for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                    stack[-1][key if isinstance(key, str) else int(key)] = value
            elif name in ("APPEND", "APPENDS"):
                items = since_mark() if name == "APPENDS" else [stack.pop()]
                stack[-1].extend(items)
            elif name == "BINPERSID":
                stack.append(_storage(stack.pop()))
            elif name in ("REDUCE", "NEWOBJ"):
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            elif name == "BUILD":
                # A state dict's versions, or what an argparse.Namespace holds: settings, not weights.
                if not isinstance(stack.pop(), dict) or not isinstance(stack[-1], dict):
                    raise ValueError("sets the state of an object")
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"uses {name}, which torch.save does not write for weights")
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        raise ValueError(f"data.pkl is damaged: {type(error).__name__}") from error
    raise ValueError("data.pkl ends too early")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(["BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"])
_EMPTY: dict[str, Any] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _storage(identity: Any) -> Storage:
    kind, storage, key, _, numel = identity
    if kind != "storage" or not isinstance(storage, _Name) or not isinstance(key, str):
        raise TypeError("not a storage")
    if storage not in STORAGES:
        raise ValueError(f"holds a {storage.split()[-1]}, which is no storage of floating-point weights")
    return Storage(STORAGES[storage], key, numel)


def _call(function: Any, arguments: Any) -> Any:
    """What the few known names make of their arguments; nothing is looked up."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise TypeError("calls what is no name")
    if function in _DICTIONARIES and not arguments:
        return {}
    if function == _SIZE:
        return _few(arguments[0])
    if function == _TENSOR:
        storage, offset, shape, stride = arguments[:4]
        if not isinstance(storage, Storage):
            raise TypeError("a tensor without a storage")
        return Dense(storage, offset, _few(shape), _few(stride))
    if function == _PARAMETER:
        if not isinstance(arguments[0], Dense):
            raise TypeError("a parameter that is no tensor")
        return arguments[0]
    raise ValueError(f"asks for {function.replace(' ', '.')}, which no file of plain dense weights needs")


def _few(numbers: Any) -> tuple[int, ...]:
    """A shape; checked number by number where the tensor is made."""
    if not isinstance(numbers, (tuple, list)) or len(numbers) > 16:
        raise TypeError("not a shape")
    return tuple(numbers)
