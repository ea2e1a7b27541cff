"""Ctrl-C and SIGTERM: one meaning, one at a time, never in the middle of a file."""

# ruff: noqa: PT012 (where in the block the exception comes is what is tested)

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainer_helpers import hdistill

from hd_trainer import cli, signals
from hd_trainer.commands import COMMANDS, Command
from hd_trainer.files import write_atomically
from hd_trainer.signals import Interrupted, Stopped

BOTH = pytest.mark.parametrize("one", signals.SIGNALS, ids=lambda one: one.name)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Every test leaves the handlers as it found them."""
    before = [signal.getsignal(one) for one in signals.SIGNALS]
    yield
    assert [signal.getsignal(one) for one in signals.SIGNALS] == before


@BOTH
def test_a_request_interrupts(one: signal.Signals) -> None:
    with pytest.raises(Interrupted, match="give the same command again"), signals.listening():
        signal.raise_signal(one)
        pytest.fail("it went on")
    assert issubclass(Interrupted, KeyboardInterrupt)


@BOTH
def test_a_request_waits_for_what_must_not_be_half_done(one: signal.Signals) -> None:
    done = []
    with pytest.raises(Interrupted), signals.listening():
        with signals.held():
            with signals.held():
                signal.raise_signal(one)
                signal.raise_signal(one)
            done.append("inner")
            done.append("outer")
        pytest.fail("it went on")
    assert done == ["inner", "outer"]


def test_a_file_is_written_to_its_end(tmp_path: Path) -> None:
    def write(place: Path) -> None:
        place.write_text("first ")
        signal.raise_signal(signal.SIGINT)
        with open(place, "a") as file:
            file.write("second")

    with pytest.raises(Interrupted), signals.listening():
        write_atomically(tmp_path / "a.txt", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "first second"


def test_an_error_inside_is_not_replaced_by_the_request() -> None:
    with pytest.raises(OSError, match="disk full"), signals.listening(), signals.held():
        signal.raise_signal(signal.SIGINT)
        raise OSError("disk full")


def test_further_requests_do_not_break_what_the_first_one_cleans_up() -> None:
    cleaned = []
    with pytest.raises(Interrupted), signals.listening():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)
    assert cleaned == [True]


def test_a_request_that_a_library_swallowed_can_be_repeated() -> None:
    with pytest.raises(Interrupted), signals.listening():
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")


@BOTH
def test_training_is_asked_once_and_told_the_second_time(one: signal.Signals) -> None:
    with pytest.raises(Interrupted), signals.postponed() as stop_requested:
        assert not stop_requested()
        signal.raise_signal(one)
        assert stop_requested()
        with signals.held():
            signal.raise_signal(one)
            assert stop_requested()
        pytest.fail("it went on")


def test_a_stop_between_two_steps_is_the_answer_to_a_request() -> None:
    with signals.listening():
        with pytest.raises(Stopped, match="after step 3"), signals.postponed() as stop_requested:
            signal.raise_signal(signal.SIGINT)
            if stop_requested():
                raise Stopped("after step 3")
        with signals.held():  # answered: nothing is pending
            pass


def test_a_request_that_nobody_saw_is_not_lost() -> None:
    with pytest.raises(Interrupted), signals.listening():
        with signals.postponed():
            signal.raise_signal(signal.SIGTERM)
        pytest.fail("it went on")


def test_an_outer_listener_keeps_listening_after_an_inner_one() -> None:
    with pytest.raises(Interrupted), signals.listening():
        with signals.listening():
            pass
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it went on")


def test_nothing_is_left_to_stop_after_the_end() -> None:
    with signals.listening():
        signals.finish()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted), signals.listening():  # the next command listens again
        signal.raise_signal(signal.SIGINT)


def test_other_threads_neither_listen_nor_hold() -> None:
    found: list[object] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGINT)
        with signals.listening(), signals.postponed() as stop_requested, signals.held():
            inside.set()
            found.append(signal.getsignal(signal.SIGINT) is before)
            found.append(stop_requested())
            leave.wait(60)
        found.append("left")

    inside, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60)
    try:
        with pytest.raises(Interrupted), signals.listening():
            signal.raise_signal(signal.SIGINT)  # not held by the other thread, which is in the middle of a file
            pytest.fail("it went on")
    finally:
        leave.set()
        thread.join()
    assert found == [True, False, "left"]


@BOTH
@pytest.mark.parametrize("times", [1, 2])
def test_the_command_answers_with_one_line_and_130(
    one: signal.Signals, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(_: list[str]) -> None:
        try:
            signal.raise_signal(one)
        finally:
            for _ in range(times - 1):
                signal.raise_signal(one)

    monkeypatch.setitem(COMMANDS, "evaluate", Command(usage="", line="", do=work))
    answer = hdistill("evaluate", "runs/digits")
    assert (answer.code, answer.line) == (130, f"hdistill: {signals.INTERRUPTED}")


def test_an_error_that_a_library_made_of_the_request_is_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(_: list[str]) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy.core.multiarray failed to import") from None

    monkeypatch.setitem(COMMANDS, "report", Command(usage="", line="", do=work))
    assert hdistill("report", "runs/digits").code == 130


def test_an_error_that_nobody_asked_for_is_shown_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(_: list[str]) -> None:
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setitem(COMMANDS, "report", Command(usage="", line="", do=work))
    with pytest.raises(ImportError, match="multiarray"):
        hdistill("report", "runs/digits")


def test_a_request_while_the_line_of_an_error_is_printed_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    complain = cli._complain

    def interrupted(message: str) -> None:
        signal.raise_signal(signal.SIGINT)
        complain(message)

    monkeypatch.setattr(cli, "_complain", interrupted)
    answer = hdistill("nonsense")
    assert answer.code == 2
    assert "unknown command 'nonsense'" in answer.line
