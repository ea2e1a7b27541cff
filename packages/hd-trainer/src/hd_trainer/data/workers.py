"""Many pictures decoded by worker processes. A picture that brings its decoder down is an unreadable one."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO

import numpy as np

from hd_trainer import decoding
from hd_trainer.errors import UserError
from hd_trainer.progress import progress

#: Pictures a request; an interruption waits for no more than these.
AT_ONCE = 32
#: More workers than this wait for the disk.
MOST = 16
#: A worker that falls more often than this is given up.
MOST_CRASHES = 20


def decode_files(
    paths: Sequence[Path], rows: Sequence[int], pixels: np.ndarray, size: int | None, *, workers: int | None = None
) -> dict[int, str]:
    """Fill ``pixels`` (N, H, W, C) uint8, row i from ``paths[i]``.

    Args:
        rows: which of them.
        size: see :func:`hd_trainer.decoding.decode`.
        workers: processes; None: one for each processor that this process may use.

    Returns:
        reason by row for those that cannot be read; their rows are left alone.
    """
    number = workers or min(MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    requests = [rows[first : first + AT_ONCE] for first in range(0, len(rows), AT_ONCE)]
    crew = [_Worker() for _ in range(min(number, len(requests)))]
    unreadable: dict[int, str] = {}
    queue = iter(requests)  # shared by the threads: next() on a list's iterator is one step of Python

    def work(worker: _Worker) -> None:
        for some in queue:
            unreadable.update(worker.decode(some, paths, pixels, size))
            bar.update(len(some))

    with progress(total=len(rows), desc="pictures", unit="picture", leave=False) as bar:
        threads = ThreadPoolExecutor(max(1, len(crew)))
        try:
            for done in as_completed([threads.submit(work, worker) for worker in crew]):
                done.result()
        finally:
            for worker in crew:
                worker.end()
            threads.shutdown(cancel_futures=True)
    return dict(sorted(unreadable.items()))


class _Worker:
    """A process that decodes; another one takes its place if it falls."""

    def __init__(self) -> None:
        self.ended = False
        self.crashes = 0
        self._start()

    def _start(self) -> None:
        # The path as it is here: not the current folder, in which anything may lie.
        script = f"import sys; sys.path[:] = {sys.path!r}; from hd_trainer.decoding import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the one who asked; a worker ends when its stdin does
        )

    def end(self) -> None:
        """Stop it; whoever waits for its answer gets none."""
        self.ended = True
        self._close()

    def _close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not sent is lost, and may be
                    pipe.close()

    def decode(
        self, rows: Sequence[int], paths: Sequence[Path], pixels: np.ndarray, size: int | None
    ) -> dict[int, str]:
        """Fill those rows; the reason by row for those that cannot be read."""
        unreadable: dict[int, str] = {}
        left = list(rows)
        while left and not self.ended:
            try:
                for row, answer in zip(left[:], self._ask([paths[row] for row in left], size, pixels), strict=True):
                    if isinstance(answer, str):
                        unreadable[row] = answer
                    elif answer.shape != pixels.shape[1:]:
                        unreadable[row] = f"{answer.shape[1]}x{answer.shape[0]} pixels, unlike the others"
                    else:
                        pixels[row] = answer
                    left.pop(0)
            except (EOFError, BrokenPipeError):
                if self.ended:
                    break
                unreadable[left.pop(0)] = "its decoder crashed"
                self.crashes += 1
                self._close()
                if self.crashes > MOST_CRASHES:
                    raise UserError(
                        f"processes that decode pictures have crashed {self.crashes} times, at last over "
                        f"{paths[max(unreadable)]}; convert these pictures with another program"
                    ) from None
                self._start()
        return unreadable

    def _ask(self, paths: list[Path], size: int | None, pixels: np.ndarray) -> Iterator[np.ndarray | str]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        channels = pixels.shape[3]
        request = {"paths": [str(path) for path in paths], "size": size, "channels": channels}
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.flush()
        for _ in paths:
            if _exactly(stdout, 1) == decoding.READ:
                height, width = struct.unpack("<II", _exactly(stdout, 8))
                content = _exactly(stdout, height * width * channels)
                yield np.frombuffer(content, np.uint8).reshape(height, width, channels)
            else:
                (length,) = struct.unpack("<I", _exactly(stdout, 4))
                yield _exactly(stdout, length).decode()


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content
