"""Error messages out of what a file says: one short line, whatever it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

LIMIT = 200


def one_line(text: object, limit: int = LIMIT) -> str:
    """``text`` on one line of at most ``limit`` characters; control characters and broken UTF-8 are escaped."""
    shown = "".join(
        one if one.isprintable() else " " if one.isspace() else one.encode("unicode_escape").decode()
        for one in str(text)[: 4 * limit]
    )
    shown = " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def listed(problems: Iterable[str], shown: int = 4) -> str:
    """The first few of some problems, of every kind (its first word) in turn, and how many more there are."""
    kinds: Counter[str] = Counter()
    ranked = []
    for problem in sorted(problems):
        kind = problem.split(" ", 1)[0]
        ranked.append((kinds[kind], problem))
        kinds[kind] += 1
    ordered = [problem for _, problem in sorted(ranked)]
    more = f"; and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return "; ".join(one_line(one, 80) for one in ordered[:shown]) + more
