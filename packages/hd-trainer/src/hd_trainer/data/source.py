"""The text after ``--data``: a kind, a place, and options after a question mark: ``folder:PATH?size=32&flip=true``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hd_trainer.checks import check_number, check_whole, short
from hd_trainer.errors import UserError

#: A question mark begins options only where a name and "=" follow: file names may hold one too.
_OPTIONS = re.compile(r"\?(?=\w+=)")


def split_place(text: str) -> tuple[str, str]:
    """(place, options with their question mark; nothing where there are none)."""
    found = _OPTIONS.search(text)
    return (text[: found.start()], text[found.start() :]) if found else (text, "")


def split_options(kind: str, text: str, known: Mapping[str, Callable[[str, str], Any]]) -> tuple[str, dict[str, Any]]:
    """(place, options by name) of ``PLACE?name=value&name=value``.

    Args:
        kind: of the source, for errors.
        known: for each option a function of its name and its value as text.

    Raises:
        UserError: for an option that is unknown, given twice or does not fit.
    """
    place, given = split_place(text)
    options: dict[str, Any] = {}
    for part in given[1:].split("&") if given else ():
        name, equals, value = part.partition("=")
        if name not in known:
            raise UserError(f"{kind}: unknown option {short(name)}; known: {', '.join(known) or 'none'}")
        if name in options or not equals:
            raise UserError(f"{kind}: option {name} needs one value, as in ?{name}=...; got {short(given[1:])}")
        options[name] = known[name](f"{kind}: {name}", value)
    return place, options


def a_size(name: str, value: str) -> int:
    """A side in pixels."""
    number = int(value) if value.isascii() and value.isdigit() and len(value) < 9 else value
    check_whole(low=4, high=4096, **{name: number})
    return int(number)


def channels(name: str, value: str) -> int:
    """1 for grey, 3 for colour."""
    if value not in ("1", "3"):
        raise UserError(f"{name} must be 1 (grey) or 3 (colour); got {short(value)}")
    return int(value)


def a_share(name: str, value: str) -> float:
    """A share of the images that is held out."""
    try:
        number: Any = float(value)
    except ValueError:
        number = value
    check_number(high=0.9, above=True, **{name: number})
    return float(number)


def a_switch(name: str, value: str) -> bool:
    """true or false."""
    if value not in ("true", "false"):
        raise UserError(f"{name} must be true or false; got {short(value)}")
    return value == "true"


def text(name: str, value: str) -> str:
    """Any name."""
    if not value:
        raise UserError(f"{name} must not be empty")
    return value


def existing(kind: str, place: str, what: str) -> Path:
    """The path of an existing folder or file; ``what`` is "folder" or "file".

    Raises:
        UserError: if it is not there, or the other of the two.
    """
    if not place:
        raise UserError(f"{kind}: which {what}? Name it: {kind}:PATH")
    path = Path(place).expanduser()
    try:
        fits = path.is_dir() if what == "folder" else path.is_file()
    except (OSError, ValueError) as error:
        raise UserError(f"{kind}: {short(place)} cannot be read ({error})") from error
    if not fits:
        raise UserError(f"{kind}: {path} is {f'not a {what}' if path.exists() else 'not there'}")
    return path


def cache_folder() -> Path:
    """Where decoded pictures and built sets are kept: $HDISTILL_CACHE, else hdistill in the user's cache folder."""
    if own := os.environ.get("HDISTILL_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "hdistill"


def tell_left_out(name: str, total: int, unreadable: Iterable[tuple[str, str]]) -> None:
    """One line on stderr that names and counts the pictures that cannot be read; nothing where there are none."""
    found = list(unreadable)
    if found:
        named = ", ".join(f"{picture} ({reason})" for picture, reason in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        line = f"{name}: {len(found)} of {total} pictures cannot be read and are left out: {named}{more}"
        print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)
