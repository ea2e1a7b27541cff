"""The error a user can mend: the command line prints it as one line and exits with code 2."""

from __future__ import annotations

from typing import Any, get_args


class UserError(ValueError):
    """Bad input. The message is one line: what was given, what is accepted, what to do."""


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise UserError unless ``value`` is one of a Literal's: Python checks none of them at run time."""
    if value not in get_args(choices):
        raise UserError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}")


def check_seed(seed: int) -> None:
    """Raise UserError unless 0 <= seed < 2^32: larger ones overflow where seeds of images are derived."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be >= 0 and below 2^32; got {seed}")
