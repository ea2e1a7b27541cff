"""Runs the command in children of this process and breaks them: the tests of test_attack.py call it as a script.

A child is a fork, so that a hundred of them cost one import of PyTorch. It must be a process of its own: a fork of
pytest would inherit threads. The last line on stdout is a JSON list of findings; an empty list is a pass.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = """
import numpy as np
from hd_trainer.data import images_from_arrays

def data():
    pixels = np.random.default_rng(0).uniform(-1, 1, (60, 8, 8)).astype("float32")
    return images_from_arrays("noise", pixels, np.arange(60) % 3)
"""
TINY = [
    *("digits", "--smoke", "--device", "cpu", "--precision", "fp32", "--model.width", "16", "--model.depth", "2"),
    *("--distribution.discriminator.layers", "blocks.0", "blocks.1", "--distribution.student-update-every", "2"),
    *("--loop.log-every", "2", "--loop.checkpoint-every", "1"),
    *(f"--{stage}.{name}" for stage in ("teacher", "trajectory", "distribution") for name in ("steps=3", "batch=8")),
    *("--evaluation.samples", "10", "--evaluation.teacher-steps", "1", "--evaluation.timing-repeats", "1"),
]
KILLED = 9


@dataclass(frozen=True)
class Answer:
    """What a child left behind."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line on stderr."""
        return self.err.rstrip().splitlines()[-1] if self.err.strip() else ""


def in_child(arguments: list[str], prepare: Callable[[], Any] = lambda: None) -> Answer:
    """The command in a child, after ``prepare()`` there; what that returns is called at the end."""
    pipes = [os.pipe(), os.pipe()]
    child = os.fork()
    if child == 0:
        code, after = 1, None
        try:
            for number, (_, write) in enumerate(pipes, start=1):
                os.dup2(write, number)
            sys.stdout, sys.stderr = (open(number, "w", 1, closefd=False) for number in (1, 2))  # noqa: SIM115
            from hd_trainer.cli import entry

            sys.argv = ["hdistill", *arguments]
            after = prepare()
            entry()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.setprofile(None)
            if after is not None:
                after()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    texts = []
    for _, write in pipes:
        os.close(write)
    for read, _ in pipes:  # stdout is short: the second pipe is not full before the first has ended
        with open(read, "rb") as pipe:
            texts.append(pipe.read().decode(errors="replace"))
    _, status = os.waitpid(child, 0)
    return Answer(os.waitstatus_to_exitcode(status), *texts)


def outcome(folder: Path) -> dict[str, Any]:
    """All files below a folder: their bytes, but for the seconds that were measured."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            found[name] = [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]
        elif path.name in ("done.json", "state.json"):
            found[name] = {**json.loads(path.read_text()), "seconds": 0}
        elif path.name == "evaluation.json":
            rows = json.loads(path.read_text())["rows"]
            found[name] = [{**row, "images_per_second": 0} for row in rows]
        elif path.name == "sources.json":
            found[name] = {key: entry["sha256"] for key, entry in json.loads(path.read_text()).items()}
        elif path.is_file():
            found[name] = "" if path.suffix == ".html" else path.read_bytes()
        else:
            found[f"{name}/"] = None
    return found


def unlike(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of the files that differ."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name, 0) != expected.get(name, 0))


def clone(source: Path, target: Path) -> Path:
    """A fresh copy of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    if source.exists():
        shutil.copytree(source, target)
    return target


# ---- kills


class FileEvents:
    """Counts what a process does to files below a folder, and kills it before one of these deeds."""

    def __init__(self, folder: Path, kill_at: int | None, tear: bool, count_into: Path) -> None:
        self.folder, self.kill_at, self.tear, self.count_into = str(folder), kill_at, tear, count_into
        self.number, self.busy = 0, False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.busy or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not path.startswith(self.folder):
            return
        if self.number == self.kill_at:
            self.busy = True
            if self.tear and event == "open":
                with open(path, "ab") as file:
                    file.write(b'{"step": 1, "los')
            os._exit(KILLED)
        self.number += 1
        if self.kill_at is None:
            self.busy = True
            self.count_into.write_text(str(self.number))
            self.busy = False


def kills(base: Path) -> list[str]:
    """Kill stage 2 before a file event, then go on: the folder is that of an undisturbed run, and nothing more.

    Every third event, so that a test takes a minute; the mode "all-kills" tries every one.
    """
    return _kills(base, every=3)


def all_kills(base: Path) -> list[str]:
    """:func:`kills` before every event."""
    return _kills(base, every=1)


def _kills(base: Path, every: int) -> list[str]:
    sources, findings = base / "sources", []
    for stage in ("teacher", "trajectory"):
        answer = in_child(["train", stage, *TINY, "--out", str(sources)])
        assert answer.code == 0, answer.err
    given = ["--teacher-weights", str(sources / "teacher"), "--student-weights", str(sources / "trajectory")]
    out, counter = base / "out", base / "count"
    command = ["train", "distribution", *TINY, *given, "--out", str(out)]

    def attack(kill_at: int | None, tear: bool = False) -> Answer:
        return in_child(command, lambda: sys.addaudithook(FileEvents(out, kill_at, tear, counter)))

    answer = attack(None)
    assert answer.code == 0, answer.err
    expected, number = outcome(out), int(counter.read_text())
    moments = [(kill, tear) for kill in range(0, number, every) for tear in (False, True)]
    draw = random.Random(0)
    for kill, tear in moments:
        if tear and draw.random() > 0.15:
            continue
        shutil.rmtree(out, ignore_errors=True)
        first = attack(kill, tear)
        again = [attack(draw.randrange(number // 2))] if draw.random() < 0.15 else []  # killed while it tidies up
        last = in_child(command)
        where = f"event {kill}{', torn' * tear}{', twice' * len(again)}"
        if first.code != KILLED:
            findings.append(f"{where}: code {first.code}")
        if last.code != 0:
            findings.append(f"{where}: going on ended with {last.code}: {last.err[-300:]}")
        elif differing := unlike(outcome(out), expected):
            findings.append(f"{where}: {differing[:5]} differ")
    print(f"{number} file events")
    return findings


# ---- signals


class Progress:
    """Counts calls and returns, and at one of them lets another thread send the signals, as a terminal would."""

    def __init__(self, at: int | None, numbers: list[int], count_into: Path) -> None:
        self.at, self.number, self.count_into, self.due = at, 0, count_into, threading.Event()
        if at is not None:
            threading.Thread(target=self._send, args=(numbers,), daemon=True).start()
        sys.setprofile(self._count)

    def _count(self, *_: Any) -> None:
        self.number += 1
        if self.number == self.at:
            sys.setprofile(None)
            self.due.set()

    def _send(self, numbers: list[int]) -> None:
        self.due.wait()
        for index, number in enumerate(numbers):
            time.sleep(0.005 * index)
            os.kill(os.getpid(), number)

    def write(self) -> None:
        self.count_into.write_text(str(self.number))


def stop_findings(answer: Answer, folder: Path, codes: tuple[int, ...]) -> list[str]:
    """What is wrong with how a command stopped."""
    found = []
    if answer.code not in codes:
        found.append(f"code {answer.code}: {answer.err[-600:]}")
    line = answer.last.rpartition("\r")[2]
    if answer.code == 130 and not line.startswith("hdistill: "):
        found.append(f"last line {line!r}")
    found += [f"{word} on stderr: {answer.err[-900:]}" for word in ("Traceback", "ignored in") if word in answer.err]
    return found + [f"left {path}" for path in folder.rglob(".incomplete*")]


def watch(at: int | None, numbers: list[int], counter: Path, report: bool = True) -> Callable[[], None]:
    """Begin to count in a child, perhaps without a report, which takes most of a short run's time."""
    if not report:
        pipeline: Any = importlib.import_module("hd_trainer.pipeline")
        pipeline.write_report = lambda settings, context, out: out / "report.html"
    return Progress(at, numbers, counter).write


def stops(base: Path) -> list[str]:
    """Stop commands at seeded moments, once and twice, then give them again: they end as if nothing had happened."""
    (base / "own.py").write_text(DATA)
    out, counter = base / "attacked/run", base / "count"
    out.parent.mkdir()
    whole = ["run", *TINY, "--data", str(base / "own.py"), "--out"]
    assert in_child([*whole, str(base / "whole")]).code == 0
    commands = {
        "run": ([*whole, str(out)], base / "none", 22, False),
        "evaluate": (["evaluate", str(out)], base / "whole", 5, True),
        "report": (["report", str(out)], base / "whole", 5, True),
        "sample": (["sample", str(out), "--count", "30", "--out", str(out / "drawn.png")], base / "whole", 4, True),
    }
    draw, findings, stopped = random.Random(1), [], 0
    for name, (command, start, cases, report) in commands.items():
        clone(start, out)
        answer = in_child(command, functools.partial(watch, None, [], counter, report))
        assert answer.code == 0, answer.err
        expected, number = outcome(out.parent), int(counter.read_text())
        for case in range(cases):
            clone(start, out)
            numbers = [draw.choice([signal.SIGINT, signal.SIGTERM]) for _ in range(1 + case % 2)]
            at = draw.randrange(100, number)
            first = in_child(command, functools.partial(watch, at, numbers, counter, report))
            stopped += first.code == 130
            where = f"{name} at {at:,} of {number:,}, {[one.name for one in numbers]}"
            findings += [f"{where}: {one}" for one in stop_findings(first, out.parent, (0, 130))]
            last = in_child(command, functools.partial(watch, None, [], counter, report))
            if last.code != 0:
                findings.append(f"{where}: going on ended with {last.code}: {last.err[-300:]}")
            findings += [f"{where}: {one} differs" for one in unlike(outcome(out.parent), expected)]
    print(f"{stopped} of {sum(cases for _, _, cases, _ in commands.values())} commands were stopped")
    return findings if stopped > 15 else [*findings, f"only {stopped} commands were stopped"]


def imports(base: Path) -> list[str]:
    """Stop a command while it imports its libraries: this process must not have imported them."""
    command, counter = ["report", str(base / "nothing")], base / "count"
    answer = in_child(command, functools.partial(watch, None, [], counter))
    assert answer.code == 2, answer.err
    number, draw, findings, stopped = int(counter.read_text()), random.Random(2), [], 0
    for case in range(6):
        numbers = [draw.choice([signal.SIGINT, signal.SIGTERM]) for _ in range(1 + case % 2)]
        at = draw.randrange(100, number)
        answer = in_child(command, functools.partial(watch, at, numbers, counter))
        stopped += answer.code == 130
        where = f"imports at {at:,} of {number:,}, {[one.name for one in numbers]}"
        findings += [f"{where}: {one}" for one in stop_findings(answer, base, (2, 130))]
    return findings if stopped > 3 else [*findings, f"only {stopped} commands were stopped"]


# ---- disks


def limited(base: Path) -> list[str]:
    """Files may not grow beyond a size: one line, code 2; the same command goes on without the limit."""
    findings, out = [], base / "out"
    command = ["train", "teacher", *TINY, "--out", str(out)]
    assert in_child(command).code == 0
    expected = outcome(out)
    largest = max(path.stat().st_size for path in out.rglob("*") if path.is_file())
    for limit in (10, 200, 20_000, largest // 2, largest - 1):
        shutil.rmtree(out)
        answer = in_child(command, functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)))
        findings += full_findings(f"limit {limit}", answer, out, r"File too large")
        last = in_child(command)
        if last.code != 0 or unlike(outcome(out), expected):
            findings.append(f"limit {limit}: going on ended with {last.code}: {last.err[-300:]}")
    return findings


def full(base: Path) -> list[str]:
    """A disk without room, or without inodes: one line, code 2; the same command goes on once there is room."""
    findings, disk = [], base / "disk"
    disk.mkdir()
    command = ["train", "teacher", *TINY, "--out", str(disk / "out")]
    subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=True)
    try:
        assert in_child(command).code == 0
        expected = outcome(disk / "out")
        size = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
        number = len(expected)
        options = [f"size={int(size * share) // 1024}k" for share in (0.05, 0.4, 0.9)]
        options += [f"nr_inodes={count}" for count in (2, number // 2, number - 2)]
        for option in options:
            subprocess.run(["umount", disk], check=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", option, "none", disk], check=True)
            answer = in_child(command)
            findings += full_findings(option, answer, disk / "out", "No space left")
            complete = {str(path.parent) for path in disk.rglob("checkpoints/*/state.json")}
            subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=1000", disk], check=True)
            last = in_child(command)
            if last.code != 0 or unlike(outcome(disk / "out"), expected):
                findings.append(f"{option}: going on ended with {last.code}: {last.err[-300:]}")
            if complete and "resuming after step" not in last.out:
                findings.append(f"{option}: the checkpoint before was lost")
    finally:
        subprocess.run(["umount", disk], check=True)
    return findings


def full_findings(where: str, answer: Answer, out: Path, words: str) -> list[str]:
    """What is wrong with how a command ended that had no room."""
    found = []
    if answer.code != 2 or "Traceback" in answer.err:
        found.append(f"{where}: code {answer.code}: {answer.err[-600:]}")
    line = answer.last.rpartition("\r")[2]
    if not line.startswith("hdistill: ") or words not in line:
        found.append(f"{where}: last line {line!r}")
    return found + [f"{where}: left {path}" for path in out.rglob(".incomplete*")]


def main() -> None:
    mode, base = sys.argv[1], Path(sys.argv[2])
    if mode != "imports":
        importlib.import_module("torch").set_num_threads(1)
        # What children would import each: PyTorch does so when it first draws on "meta".
        for name in ("hd_trainer.pipeline", "hd_trainer.run_options", "hd_trainer.sample", "sklearn.datasets"):
            importlib.import_module(name)
        importlib.import_module("torch").empty(1, device="meta").normal_()
    modes = {
        "kills": kills,
        "all-kills": all_kills,
        "stops": stops,
        "imports": imports,
        "limited": limited,
        "full": full,
    }
    print(json.dumps(modes[mode](base)))


if __name__ == "__main__":
    main()
