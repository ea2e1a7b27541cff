"""The rows of the table, and ``evaluation.json``, where they are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hd_trainer.earlier import upgrade_evaluation
from hd_trainer.errors import UserError
from hd_trainer.files import is_number, read_json, write_json

RESULTS = "evaluation.json"
HELD_OUT = "held-out data"
HALVES = "training halves"

#: What an extractor's features give, in the order of the table, with the header and digits of its column.
SCORES = {
    "fd": ("FD", 2),
    "kid": ("KID", 3),
    "precision": ("prec.", 3),
    "recall": ("recall", 3),
    "density": ("dens.", 3),
    "coverage": ("cover.", 3),
    "inception_score": ("IS", 2),
    "accuracy": ("acc.", 3),
}
#: What pixels give.
PIXELS = {"nearest": ("nearest", 2), "deviation": ("dev.", 2)}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. A number of generated images is the mean over the sampling seeds.

    The scores are those of the first extractor, None where there is none or it cannot say; the others' are in
    ``further``, each seed's in ``per_seed``.
    """

    name: str
    """"teacher", "trajectory" or "distribution"; "held-out data" or "training halves" for a floor; else a path"""
    steps: int
    """integration steps or jumps; 0 for data"""
    calls: int
    """network evaluations per image, guidance counted"""
    samples: int
    """images measured, for each seed"""
    fd: float | None
    """Fréchet distance to the training split in the extractor's features"""
    kid: float | None
    """kernel distance, unbiased"""
    precision: float | None
    recall: float | None
    accuracy: float | None
    """share of the images that the extractor takes for the class that was asked for"""
    nearest: float | None
    """mean distance, in pixel space, to the nearest training image: far below the held-out data's means copying"""
    deviation: float | None = None
    """mean standard deviation of a pixel over the images: far below the held-out data's means they are all alike"""
    images_per_second: float | None
    """of the first sampling seed; None for data"""
    density: float | None = None
    coverage: float | None = None
    inception_score: float | None = None
    further: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """the scores in the other extractors, by their names"""
    per_seed: tuple[dict[str, Any], ...] = ()
    """by sampling seed what the row is the mean of; () for data"""

    def score(self, measure: str, extractor: str | None = None) -> float | None:
        """A measure's mean; in the first extractor, or in another one by its name."""
        value: float | None = getattr(self, measure) if extractor is None else self.further[extractor].get(measure)
        return value

    def range(self, measure: str, extractor: str | None = None) -> tuple[float, float] | None:
        """Least and greatest value of a measure over the sampling seeds; None where there are fewer than two."""
        found = [one if extractor is None else one["further"][extractor] for one in self.per_seed]
        values = [value for one in found if (value := one.get(measure)) is not None]
        return (min(values), max(values)) if len(values) > 1 else None


def row_of_seeds(per_seed: Sequence[dict[str, Any]], **facts: Any) -> Row:
    """The row whose numbers are means over sampling seeds.

    Args:
        per_seed: "seed", every score and what pixels give, and "further" with scores by extractor.
        facts: name, steps, calls, samples, images_per_second.
    """
    measures = (*SCORES, *PIXELS)
    further = {
        name: {measure: _mean([one["further"][name][measure] for one in per_seed]) for measure in SCORES}
        for name in per_seed[0]["further"]
    }
    means: dict[str, Any] = {measure: _mean([one[measure] for one in per_seed]) for measure in measures}
    return Row(**facts, **means, further=further, per_seed=tuple(per_seed))


def save_rows(rows: list[Row], folder: Path, facts: dict[str, Any]) -> None:
    """Write ``evaluation.json``: what was measured, on what, and the rows."""
    write_rows(folder / RESULTS, rows, facts)


def write_rows(path: Path, rows: list[Row], facts: dict[str, Any]) -> None:
    """As :func:`save_rows`, into a file of any name."""
    write_json(path, {**facts, "rows": [vars(row) for row in rows]})


def read_results(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """(rows, facts) of ``evaluation.json``, an earlier version's too.

    Raises:
        UserError: if it is missing or not as :func:`save_rows` wrote it.
    """
    path = folder / RESULTS
    if not path.exists():
        raise UserError(f"{folder} is not evaluated yet; run: hdistill evaluate {folder}")
    results = upgrade_evaluation(read_json(path))
    facts = {name: value for name, value in results.items() if name != "rows"}
    known = {one.name for one in dataclasses.fields(Row)}
    try:
        rows = [Row(**{name: value for name, value in row.items() if name in known}) for row in results["rows"]]
        rows = [dataclasses.replace(row, per_seed=tuple(row.per_seed)) for row in rows]
        fits = rows[0].name == HELD_OUT and all(_is_row(row) for row in rows)
        fits = fits and all(isinstance(facts[name], str) for name in ("device", "torch"))
        fits = fits and all(is_number(facts[name]) for name in ("seed", "threads", "guidance_scale"))
        fits = fits and all(is_number(seconds) for seconds in facts["training_seconds"].values())
        names = [one["name"] for one in facts["extractors"]]
        fits = fits and all(isinstance(name, str) for name in names)
        fits = fits and all(set(row.further) == set(names[1:]) for row in rows)
    except (KeyError, TypeError, AttributeError, IndexError):
        fits = False
    if not fits:
        raise UserError(f"{path} is damaged; run: hdistill evaluate {folder}")
    return rows, facts


def _is_row(row: Row) -> bool:
    """Whether every entry is of its kind."""
    if not isinstance(row.name, str):
        return False
    numbers = {name: value for name, value in vars(row).items() if name not in ("name", "further", "per_seed")}
    optional = {one.name for one in dataclasses.fields(Row) if "None" in str(one.type)}
    if not all((value is None and name in optional) or is_number(value) for name, value in numbers.items()):
        return False
    seeds = [{name: value for name, value in one.items() if name != "further"} for one in row.per_seed]
    alike = all(one["further"].keys() == row.further.keys() for one in row.per_seed)
    below = [scores for one in (row.further, *(one["further"] for one in row.per_seed)) for scores in one.values()]
    return alike and all(value is None or is_number(value) for one in (*seeds, *below) for value in one.values())


def title(extractor: str) -> str:
    """What a Fréchet distance in an extractor's features is called: "FID" in the standard InceptionV3's alone."""
    return extractor if extractor == "FID" else f"FD-{extractor}"


def format_rows(rows: list[Row], extractors: Sequence[str]) -> str:
    """The rows as a text table for a terminal, one table per extractor; below means their range over the seeds.

    Args:
        extractors: names, those of ``further`` in the end.
    """
    tables = [_table(rows, extractors[0] if extractors else None, None)]
    tables += [_table(rows, name, name) for name in extractors[1:]]
    return "\n\n".join(tables)


def _table(rows: list[Row], name: str | None, key: str | None) -> str:
    unit = "FD" if name is None else title(name)
    columns = {measure: (unit if measure == "fd" else header, digits) for measure, (header, digits) in SCORES.items()}
    columns = {
        measure: column
        for measure, column in columns.items()
        if measure in ("fd", "kid", "precision", "recall") or any(row.score(measure, key) is not None for row in rows)
    }
    if key is None:
        columns["nearest"] = PIXELS["nearest"]
    first = max(14, *(len(row.name) + 1 for row in rows))
    cells = {measure: [_cells(row, measure, digits, key) for row in rows] for measure, (_, digits) in columns.items()}
    widths = {
        measure: max(len(header), *(len(text) for pair in cells[measure] for text in pair)) + 2
        for measure, (header, _) in columns.items()
    }
    head = f"{'':{first}s}{'steps':>6s}{'calls':>6s}{'N':>7s}"
    head += "".join(f"{header:>{widths[measure]}s}" for measure, (header, _) in columns.items())
    lines = [head + f"{'images/s':>10s}" * (key is None)]
    for index, row in enumerate(rows):
        speed = "-" if row.images_per_second is None else f"{row.images_per_second:,.0f}"
        line = f"{row.name:{first}s}{row.steps or '-':>6}{row.calls or '-':>6}{row.samples:>7d}"
        line += "".join(f"{cells[measure][index][0]:>{widths[measure]}s}" for measure in columns)
        lines.append(line + f"{speed:>10s}" * (key is None))
        if any(cells[measure][index][1] for measure in columns):
            ranges = "".join(f"{cells[measure][index][1]:>{widths[measure]}s}" for measure in columns)
            lines.append(f"{'':{first + 19}s}{ranges}".rstrip())
    return "\n".join(lines)


def _cells(row: Row, measure: str, digits: int, key: str | None) -> tuple[str, str]:
    """(mean, range) as text."""
    found = row.range(measure, key)
    return number(row.score(measure, key), digits), f"{found[0]:.{digits}f}..{found[1]:.{digits}f}" if found else ""


def number(value: float | None, digits: int) -> str:
    """The value with so many digits, "-" for what was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
