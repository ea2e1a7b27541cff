"""Progress of long work: a bar that moves on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(*arguments: Any, **options: Any) -> Any:
    """tqdm's bar, with its arguments; drawn twice a second on a terminal, every ten seconds elsewhere."""
    return tqdm(*arguments, mininterval=0.5 if sys.stderr.isatty() else 10.0, **options)


def say(line: str) -> None:
    """A line on stderr that does not run into a bar."""
    tqdm.write(line, file=sys.stderr)
