"""Arrays of numbers out of a pickle of dictionaries of NumPy arrays, read as data: nothing in it is called.

Reference statistics are handed around in this form: EDM2's (``pickle.dump``) and torch-fidelity's (``torch.save`` of
arrays). The pickle, a program for a small stack machine, is walked through here. It can make dictionaries, lists,
tuples, text, numbers, bytes and arrays of plain numbers; whatever else it asks for is refused by name.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np

#: Largest file that is read: a covariance of 2048 features has 34 MB.
MOST_BYTES = 1 << 30
_FAULTS = (IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError, MemoryError)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "INT")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE")
_LITERALS = frozenset([*_NUMBERS, *_TEXTS, "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"])
_EMPTY: dict[str, Any] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KINDS = {f"{kind}{size}" for kind, sizes in (("f", "248"), ("i", "1248"), ("u", "1248"), ("b", "1")) for size in sizes}


class _Name(str):
    """A global name that the program mentions, "module name"."""


class _Dtype:
    """A dtype whose byte order comes later."""

    def __init__(self, kind: Any) -> None:
        if kind not in _KINDS:
            raise ValueError(f"holds an array of dtype {str(kind)[:20]!a}")
        self.kind, self.order = kind, "<"

    def made(self) -> np.dtype[Any]:
        return np.dtype(("" if self.order == "|" else self.order) + self.kind)


class _Array:
    """An array whose numbers come later."""

    value: np.ndarray | None = None


def read_pickled_arrays(path: Path) -> Any:
    """What the file holds: plain values and NumPy arrays.

    Args:
        path: a pickle, or a file of ``torch.save`` with NumPy arrays in it.

    Raises:
        ValueError: for anything else, with the name of what it asks for.
        OSError: if the file cannot be read.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes; at most {MOST_BYTES:,} are read")
    if not zipfile.is_zipfile(path):
        return walk(path.read_bytes())
    try:
        with zipfile.ZipFile(path) as archive:
            programs = [one for one in archive.infolist() if one.filename.rsplit("/", 1)[-1] == "data.pkl"]
            if len(programs) != 1 or programs[0].file_size > MOST_BYTES:
                raise ValueError("it is no file of torch.save")
            return walk(archive.read(programs[0]))
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"it is no file of torch.save ({error})") from error


def walk(program: bytes) -> Any:
    """What a pickle describes; see :func:`read_pickled_arrays`."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        found = stack[start:]
        del stack[start:]
        return found

    try:
        for opcode, argument, _ in pickletools.genops(program):
            name, value = opcode.name, cast(Any, bytes(argument) if isinstance(argument, bytearray) else argument)
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                stack.append(value)
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name == "GLOBAL":
                stack.append(_Name(value))
            elif name == "STACK_GLOBAL":
                stack[-2:] = [_Name(f"{stack[-2]} {stack[-1]}")]
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name in _TUPLES:
                stack[len(stack) - _TUPLES[name] :] = [tuple(stack[len(stack) - _TUPLES[name] :])]
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[int(value)] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[int(value)])
            elif name in ("SETITEM", "SETITEMS"):
                pairs = since_mark() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
                if not isinstance(stack[-1], dict):
                    raise TypeError("items of what is no dictionary")
                stack[-1].update(zip(map(str, pairs[::2]), pairs[1::2], strict=True))
            elif name in ("APPEND", "APPENDS"):
                items = since_mark() if name == "APPENDS" else [stack.pop()]
                if not isinstance(stack[-1], list):
                    raise TypeError("items of what is no list")
                stack[-1].extend(items)
            elif name == "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            elif name == "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            elif name == "STOP":
                return _resolved(stack.pop())
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"uses {name}, which arrays of numbers do not need")
    except _FAULTS as error:
        raise ValueError(f"the pickle is damaged: {type(error).__name__}") from error
    raise ValueError("the pickle ends too early")


def _call(function: Any, arguments: Any) -> Any:
    """What the few known names make of their arguments; nothing is looked up."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise TypeError("calls what is no name")
    if function in ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"):
        return _Array()
    if function == "numpy dtype":
        return _Dtype(arguments[0])
    if function == "_codecs encode" and arguments[1:] in (("latin1",), ("latin-1",)):
        return str(arguments[0]).encode("latin1")
    if function in ("numpy.core.multiarray scalar", "numpy._core.multiarray scalar"):
        return _filled((), arguments[0], False, arguments[1]).item()
    if function in ("numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer"):
        found = _Array()
        found.value = _filled(arguments[2], arguments[1], arguments[3] == "F", arguments[0])
        return found
    raise ValueError(f"asks for {function.replace(' ', '.')[:80]}, which arrays of numbers do not need")


def _build(what: Any, state: Any) -> None:
    if isinstance(what, _Dtype) and state[1] in ("<", ">", "|"):
        what.order = state[1]
    elif isinstance(what, _Array):
        _, shape, dtype, in_columns, content = state
        what.value = _filled(shape, dtype, in_columns, content)
    else:
        raise ValueError("sets the state of an object")


def _filled(shape: Any, dtype: Any, in_columns: Any, content: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes) or not isinstance(shape, tuple):
        raise TypeError("an array of something else than numbers")
    if not all(type(side) is int and 0 <= side < 1 << 40 for side in shape):
        raise TypeError("an impossible shape")
    kind = dtype.made()
    if len(content) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"an array of shape {shape} has {len(content)} bytes")
    return np.frombuffer(content, kind).reshape(shape, order="F" if in_columns else "C")


def _resolved(value: Any, depth: int = 0) -> Any:
    """The value with arrays in the place of what stood for them."""
    if depth > 20:
        raise ValueError("it is nested more than 20 levels deep")
    if isinstance(value, dict):
        return {key: _resolved(one, depth + 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_resolved(one, depth + 1) for one in value]
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array without numbers")
        return value.value
    if isinstance(value, (_Dtype, _Name)):
        raise ValueError(f"holds {str(getattr(value, 'kind', value))[:60]} as a value")
    return value
