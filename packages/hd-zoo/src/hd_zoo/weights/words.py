"""Error messages out of what a file says: one short line, whatever it holds."""

from __future__ import annotations

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
    """The first few of some problems, sorted, and how many more there are."""
    ordered = sorted(problems)
    more = f"; and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return "; ".join(one_line(one, 80) for one in ordered[:shown]) + more
