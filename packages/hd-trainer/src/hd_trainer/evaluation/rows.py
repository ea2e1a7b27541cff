"""The rows of the table, and ``evaluation.json``, where they are kept."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hd_trainer.errors import UserError
from hd_trainer.files import is_number, read_json, write_json

RESULTS = "evaluation.json"
HELD_OUT = "held-out data"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. A distance is None where the data set has no extractor."""

    name: str
    """"teacher", "trajectory" or "distribution"; "held-out data" for the floor"""
    steps: int
    """integration steps or jumps; 0 for data"""
    calls: int
    """network evaluations per image, guidance counted"""
    samples: int
    """images measured"""
    fd: float | None
    """Fréchet distance to the training split in the extractor's features"""
    kid: float | None
    """kernel distance, unbiased"""
    precision: float | None
    recall: float | None
    accuracy: float | None
    """share of the images that the extractor takes for the class that was asked for"""
    nearest: float
    """mean distance, in pixel space, to the nearest training image: far below the held-out data's means copying"""
    deviation: float | None = None
    """mean standard deviation of a pixel over the images: far below the held-out data's means they are all alike"""
    images_per_second: float | None
    """None for data"""


def save_rows(rows: list[Row], folder: Path, facts: dict[str, Any]) -> None:
    """Write ``evaluation.json``: what was measured, on what, and the rows."""
    write_json(folder / RESULTS, {**facts, "rows": [vars(row) for row in rows]})


def read_results(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """(rows, facts) of ``evaluation.json``.

    Raises:
        UserError: if it is missing or not as :func:`save_rows` wrote it.
    """
    path = folder / RESULTS
    if not path.exists():
        raise UserError(f"{folder} is not evaluated yet; run: hdistill evaluate {folder}")
    results = read_json(path)
    facts = {name: value for name, value in results.items() if name != "rows"}
    known = {one.name for one in dataclasses.fields(Row)}
    try:
        rows = [Row(**{name: value for name, value in row.items() if name in known}) for row in results["rows"]]
        fits = rows[0].name == HELD_OUT and all(_is_row(row) for row in rows)
        fits = fits and all(isinstance(facts[name], str) for name in ("device", "torch"))
        fits = fits and all(is_number(facts[name]) for name in ("seed", "threads", "guidance_scale"))
        fits = fits and all(is_number(seconds) for seconds in facts["training_seconds"].values())
    except (KeyError, TypeError, AttributeError, IndexError):
        fits = False
    if not fits:
        raise UserError(f"{path} is damaged; run: hdistill evaluate {folder}")
    return rows, facts


def _is_row(row: Row) -> bool:
    """Whether every entry is of its kind."""
    if not isinstance(row.name, str):
        return False
    numbers = {name: value for name, value in vars(row).items() if name != "name"}
    optional = {one.name for one in dataclasses.fields(Row) if "None" in str(one.type)}
    return all((value is None and name in optional) or is_number(value) for name, value in numbers.items())


def format_rows(rows: list[Row], data: str) -> str:
    """The rows as a text table for a terminal."""
    unit = f"FD-{data}"
    width = max(11, len(unit) + 2)
    header = f"{'':14s}{'steps':>6s}{'calls':>6s}{'N':>6s}{unit:>{width}s}{'KID':>9s}{'prec.':>7s}{'recall':>7s}"
    header += f"{'acc.':>7s}{'nearest':>9s}{'images/s':>10s}"
    lines = [header]
    for row in rows:
        speed = "-" if row.images_per_second is None else f"{row.images_per_second:,.0f}"
        lines.append(
            f"{row.name:14s}{row.steps or '-':>6}{row.calls or '-':>6}{row.samples:>6d}{number(row.fd, 2):>{width}s}"
            f"{number(row.kid, 3):>9s}{number(row.precision, 3):>7s}{number(row.recall, 3):>7s}"
            f"{number(row.accuracy, 3):>7s}{row.nearest:>9.2f}{speed:>10s}"
        )
    return "\n".join(lines)


def number(value: float | None, digits: int) -> str:
    """The value with so many digits, "-" for what was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"
