"""Checks of settings: one line that names the setting, what is accepted and what was given."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def is_finite(value: Any) -> bool:
    """A real number, neither bool nor infinite nor NaN."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a float
        return False


def check_finite(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a finite number."""
    if not is_finite(value):
        raise ValueError(f"{name} must be a finite number; got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless 0 < value < infinity."""
    if not (is_finite(value) and value > 0):
        raise ValueError(f"{name} must be > 0 and finite; got {value!r}")


def check_share(name: str, value: Any) -> None:
    """Raise ValueError unless 0 <= value <= 1."""
    if not (is_finite(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must lie in [0, 1]; got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")


def check_sampler(name: str, value: Any, signature: str) -> None:
    """Raise ValueError unless ``value`` is an object (not a class) with a method ``sample``."""
    if isinstance(value, type) or not callable(getattr(value, "sample", None)):
        raise ValueError(f"{name} must have a method {signature}; got {value!r}")
