"""The one place that writes files: to a temporary name in the same folder, then renamed; complete or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hd_trainer import signals
from hd_trainer.errors import UserError

#: Begins the name of whatever is being written; one that a killed process left behind may be removed.
INCOMPLETE = ".incomplete-"

#: Nothing that a run records is larger: it is computed in float32.
MAX_NUMBER = 3.5e38

#: What reading a damaged header ends in: unknown dtypes, sizes beyond 64 bits, sizes beyond the memory.
_ODD_TENSORS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError, MemoryError)

#: No file of a run is nested deeper than a few levels; what walks through it would overflow the stack.
_MAX_DEPTH = 50


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write(temporary)``, then rename the temporary file to ``path``; on any error ``path`` is untouched."""
    with signals.held():
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=INCOMPLETE, suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_folder(target: Path, fill: Callable[[Path], Any]) -> None:
    """Call ``fill(temporary folder)``, then put it where ``target`` is, which is replaced if it exists."""
    with signals.held():
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=INCOMPLETE))
        try:
            fill(temporary)
            if target.exists():
                remove_folder(target)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def folder_in_progress(target: Path) -> Iterator[Path]:
    """A temporary folder to fill; it is put where ``target`` is, which is replaced, once the block has ended well.

    For what takes long: unlike with :func:`write_folder`, whatever fills it can be interrupted.
    """
    with signals.held():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=INCOMPLETE))
    try:
        yield temporary
        with signals.held():
            if target.exists():
                remove_folder(target)
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_files(folder: Path, fill: Callable[[Path], Any], last: str) -> None:
    """Call ``fill(temporary folder)``, then move what is in it into ``folder``, the file named ``last`` at the end.

    The other files are complete wherever that one is.

    Raises:
        OSError: if they cannot be written, whatever the libraries below call that.
    """
    with signals.held():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=INCOMPLETE))
        try:
            with _os_errors(folder):
                fill(temporary)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def npz_in_progress(path: Path) -> Iterator[Callable[[str, tuple[int, ...], str, Iterable[np.ndarray]], None]]:
    """A function that adds an array to a NumPy archive, part by part, never whole in memory.

    It takes the array's name, its shape, its dtype and its parts. The archive is at ``path`` once the block has ended
    well; like :func:`folder_in_progress` it can be interrupted.
    """
    with signals.held():
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=INCOMPLETE, suffix=path.suffix)
        os.close(handle)
    temporary = Path(name)
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:

            def add(name: str, shape: tuple[int, ...], dtype: str, parts: Iterable[np.ndarray]) -> None:
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    for part in parts:
                        member.write(np.ascontiguousarray(part, dtype).tobytes())

            yield add
        with signals.held():
            temporary.chmod(0o644)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_incomplete(parent: Path, older_than: float = 0.0) -> None:
    """Remove what a killed process left behind while it wrote into this folder, which may be missing.

    Args:
        older_than: seconds without a change after which nobody writes there any more, where several processes may.
    """
    for abandoned in parent.glob(f"{INCOMPLETE}*"):
        if older_than and time.time() - _last_change(abandoned) < older_than:
            continue
        if abandoned.is_dir():
            shutil.rmtree(abandoned, ignore_errors=True)
        else:
            abandoned.unlink(missing_ok=True)


def _last_change(path: Path) -> float:
    """Time of the last change of a file, or of a folder and what is in it; now, if it goes meanwhile."""
    try:
        return max(one.stat().st_mtime for one in (path, *(path.iterdir() if path.is_dir() else ())))
    except OSError:
        return time.time()


def remove_folder(path: Path) -> None:
    """Remove a complete folder: renamed first, so that a kill leaves no half of it under its name."""
    with signals.held():
        grave = Path(tempfile.mkdtemp(dir=path.parent, prefix=INCOMPLETE))
        os.replace(path, grave / path.name)
        shutil.rmtree(grave, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """The text in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_record(path: Path, record: dict[str, Any]) -> None:
    """One more line of a JSON-lines file, written at once."""
    with signals.held(), open(path, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file. Entries are copied: no two of them share memory in the file.

    Raises:
        OSError: if it cannot be written, whatever the library below calls that.
    """
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with _os_errors(path):
        write_atomically(path, lambda temporary: save_file(copies, temporary))


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Safetensors reports a full disk as an error of its own; here it is an OSError like any other."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, *_ODD_TENSORS) as error:
        raise UserError(f"{path} is missing or damaged ({str(error)[:200]})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file.

    Raises:
        UserError: if it is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits, nested deep
        raise UserError(f"{path} is not JSON ({str(error)[:200]}); remove it and run again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; remove it and run again")
    if _is_deep(value):
        raise UserError(f"{path} is nested more than {_MAX_DEPTH} levels deep; remove it and run again")
    return value


def _is_deep(value: Any) -> bool:
    """Level by level, without recursion."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        below = [list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [one for some in below for one in some]
    return bool(level)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file: objects of numbers, each with its "step". No file: no records.

    A last line torn by a crash is dropped.

    Raises:
        UserError: if any other line is not such a record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):  # what follows the last end of line is empty or torn
            raise UserError(f"{path} is damaged in line {number}; remove that line and run again")
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return record if all(map(is_number, record.values())) else None


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value read from a file is a number that a run may have recorded."""
    # The comparison is false for NaN.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def make_folder(path: Path) -> Path:
    """Create the folder and make sure that files can be written there, before any work is done.

    Raises:
        UserError: if that fails, with the reason.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path, prefix=INCOMPLETE):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to {path}: {reason}; choose another folder") from error
    return path


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()
