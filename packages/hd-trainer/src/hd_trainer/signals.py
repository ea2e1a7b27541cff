"""Ctrl-C and SIGTERM: one meaning everywhere, and none of them in the middle of a file."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A command was asked to stop. What is on disk is complete; the same command goes on from there."""


class Stopped(Exception):
    """Training was asked to stop between two steps; its state is saved. The message says how to go on."""


class _State:
    """What was asked for, and who is busy. One per process, as signal handlers are."""

    listening = False
    held = 0
    postponable = False
    requested = False


_state = _State()


def _request(_number: int, _frame: Any) -> None:
    first, _state.requested = not _state.requested, True
    if _state.held or (_state.postponable and first):
        return
    _stop()


def _stop() -> None:
    _state.requested = False
    raise Interrupted("interrupted; the same command goes on from the newest checkpoint")


@contextmanager
def listening() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM raise :class:`Interrupted`. Outside of the main thread signals are somebody else's."""
    if _state.listening:
        yield
        return
    previous: dict[signal.Signals, Any] = {}
    try:
        for one in SIGNALS:
            previous[one] = signal.signal(one, _request)
    except ValueError:
        previous.clear()
    _state.listening, _state.requested = True, False
    try:
        yield
    finally:
        _state.listening = False
        for one, handler in previous.items():
            signal.signal(one, handler)


@contextmanager
def held() -> Iterator[None]:
    """Inside, a request waits: for what must not be half done, such as writing a file or importing a library."""
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1
    if _state.requested and not _state.held and not _state.postponable:
        _stop()


@contextmanager
def postponed() -> Iterator[Callable[[], bool]]:
    """Inside, the first request only sets the flag that is yielded; a second one raises as soon as no file is open."""
    with listening():
        _state.postponable = True
        try:
            yield lambda: _state.requested
        finally:
            _state.postponable = False
            _state.requested = False


def ignore_from_now_on() -> None:
    """For the last lines of a command: nothing is left to stop."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
