"""Writing that cannot leave half a file: to a temporary name in the same folder, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hd_trainer.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write(temporary)``, then rename the temporary file to ``path``; on any error ``path`` is untouched."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file.

    Raises:
        UserError: if it is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); remove it and run again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; remove it and run again")
    return value


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line torn by a crash is dropped. No file: no records."""
    return list(_records(path)) if path.exists() else []


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def make_folder(path: Path) -> Path:
    """Create the folder and make sure that files can be written there, before any work is done.

    Raises:
        UserError: if that fails, with the reason.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}; choose another folder") from error
    return path
