"""Checks of settings and arguments. UserError names the value, what was given and what is accepted."""

from __future__ import annotations

import math
from typing import Any, get_args

from hd_trainer.errors import UserError

#: No run of any size needs more; a number beyond it is a slip of the finger.
MAX_STEPS, MAX_BATCH, MAX_IMAGES = 10**8, 10**6, 10**7


def check_whole(*, low: int = 1, high: int, **values: Any) -> None:
    """Every value is an integer in [low, high]."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UserError(f"{name} must be a whole number from {low:,} to {high:,}; got {short(value)}")


def check_steps(**values: Any) -> None:
    """Every value is a number of training or sampling steps."""
    check_whole(high=MAX_STEPS, **values)


def check_number(*, low: float = 0.0, high: float = math.inf, above: bool = False, **values: Any) -> None:
    """Every value is a finite number in [low, high], with ``above`` in (low, high]."""
    for name, value in values.items():
        fits = _is_finite(value) and low <= value <= high
        if not fits or (above and value == low):
            least = f"> {low:g}" if above else f">= {low:g}"
            most = " and finite" if high == math.inf else f" and <= {high:g}"
            raise UserError(f"{name} must be {least}{most}; got {short(value)}")


def check_shares(**values: Any) -> None:
    """Every value lies in [0, 1]."""
    check_number(high=1.0, **values)


def check_range(name: str, value: Any) -> None:
    """``value`` is a pair (low, high) with 0 <= low <= high <= 1."""
    pair = isinstance(value, tuple) and len(value) == 2 and all(_is_finite(one) for one in value)
    if not pair or not 0 <= value[0] <= value[1] <= 1:
        raise UserError(f"{name} must be two numbers with 0 <= low <= high <= 1; got {short(value)}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """``value`` is one of a Literal's: Python checks none of them at run time."""
    if value not in get_args(choices):
        raise UserError(f"{name} must be one of {', '.join(get_args(choices))}; got {short(value)}")


def check_seed(seed: Any) -> None:
    """0 <= seed < 2^32: larger ones overflow where seeds of images are derived."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"seed must be a whole number >= 0 and below 2^32; got {short(seed)}")


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def short(value: Any) -> str:
    """The value as text, cut where a slip has made it long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
