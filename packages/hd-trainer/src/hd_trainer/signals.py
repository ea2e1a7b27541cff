"""Ctrl-C and SIGTERM: one meaning everywhere, and none of them in the middle of a file.

Python runs signal handlers in the main thread alone. Calls from other threads therefore change nothing here.
"""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

INTERRUPTED = "interrupted; give the same command again to go on"


class Interrupted(KeyboardInterrupt):
    """A command was asked to stop. What is on disk is complete; the same command goes on from there."""


class Stopped(Exception):
    """Training was asked to stop between two steps; its state is saved. The message says how to go on."""


class _State:
    """What was asked for, and who is busy. One per process, as signal handlers are."""

    listening = False
    deaf = False
    held = 0
    postponed = False
    requests = 0
    """not acted upon yet"""
    asked = False
    """whether there was any request since listening began"""
    raised: Callable[[], Interrupted | None] = staticmethod(lambda: None)
    """a weak reference to the exception that is on its way to whoever handles it"""


_state = _State()


def _request(_number: int, _frame: Any) -> None:
    # While an Interrupted is on its way, a second one would break what the first one cleans up.
    if _state.deaf or _state.raised() is not None:
        return
    _state.requests += 1
    _state.asked = True
    _stop_if_due()


def _stop_if_due() -> None:
    if _state.held or not _state.requests or (_state.postponed and _state.requests == 1):
        return
    _state.requests = 0
    stop = Interrupted(INTERRUPTED)
    _state.raised = weakref.ref(stop)
    try:
        raise stop
    finally:
        del stop  # this frame is in its traceback: a circle would keep it alive


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def listening() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM raise :class:`Interrupted`; further ones are ignored until it has been handled."""
    if _state.listening or not _is_main_thread():
        yield
        return
    _state.listening, _state.deaf, _state.asked = True, False, False
    _state.requests, _state.raised = 0, lambda: None
    previous = {one: signal.signal(one, _request) for one in SIGNALS}
    try:
        yield
    finally:
        _state.deaf, _state.listening = True, False
        for one, handler in previous.items():
            if signal.getsignal(one) is _request:  # else somebody has chosen otherwise meanwhile
                signal.signal(one, handler or signal.SIG_DFL)


@contextmanager
def held() -> Iterator[None]:
    """Inside, a request waits: for what must not be half done, such as writing a file or importing a library."""
    if not _is_main_thread():
        yield
        return
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1
    _stop_if_due()


@contextmanager
def postponed() -> Iterator[Callable[[], bool]]:
    """Inside, the first request only sets the flag that is yielded; a second one raises as soon as no file is open.

    Whoever sees the flag raises :class:`Stopped`. A request that nobody saw raises :class:`Interrupted` at the end.
    """
    if not _is_main_thread():
        yield lambda: False
        return
    with listening():
        _state.postponed = True
        try:
            yield lambda: _state.requests > 0
        except Stopped:
            _state.requests = 0
            raise
        finally:
            _state.postponed = False
        _stop_if_due()


def asked() -> bool:
    """Whether anybody asked to stop since listening began: an error after that may be what a library made of it."""
    return _state.asked


def finish() -> None:
    """Ignore requests until listening ends: nothing is left to stop."""
    _state.deaf = True


def ignore_from_now_on() -> None:
    """For the last lines of a process, when Python itself is being taken down."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
