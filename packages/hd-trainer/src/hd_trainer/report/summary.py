"""What the page opens with: the comparison, and what a reader must be told before believing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hd_trainer.earlier import upgrade_record
from hd_trainer.errors import UserError
from hd_trainer.evaluation import Row
from hd_trainer.files import read_records
from hd_trainer.stages import STAGES
from hd_trainer.stages.alarms import LEAST_DEVIATION, SATURATED
from hd_trainer.writers import METRICS

#: A teacher further from the data than this many times the floor is no teacher to compare with [ours].
FAR = 10.0


def summarise(rows: list[Row]) -> dict[str, Any]:
    """The rows of the comparison: the teacher at its most steps and at its best distance, the students at their fewest.

    Returns:
        "teacher" (most steps), "best" (least distance; the same where none was measured), "trajectory" and
        "distribution" (None where that stage has no row), "last" (the last of the students'), "speed_ratio" (of
        "last" to "teacher") and "best_speed_ratio" (to "best").

    Raises:
        UserError: if there is no teacher's row or no student's.
    """
    by_name: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.steps):
        by_name.setdefault(row.name, []).append(row)
    students = [by_name[stage][0] for stage in STAGES[1:] if stage in by_name]
    if "teacher" not in by_name or not students:
        missing = "teacher" if "teacher" not in by_name else "trajectory, distribution"
        raise UserError(f"the evaluation has no row for {missing}; train that stage, then evaluate again")
    teacher = by_name["teacher"][-1]
    measured = [row for row in by_name["teacher"] if row.fd is not None]
    best = min(measured, key=lambda row: row.fd or 0.0) if measured else teacher
    last = students[-1]
    return {
        "teacher": teacher,
        "best": best,
        "trajectory": by_name.get("trajectory", [None])[0],
        "distribution": by_name.get("distribution", [None])[0],
        "last": last,
        "speed_ratio": _ratio(last.images_per_second, teacher.images_per_second),
        "best_speed_ratio": _ratio(last.images_per_second, best.images_per_second),
    }


def warnings(rows: list[Row], summary: dict[str, Any], out: Path) -> list[str]:
    """A sentence for whatever makes the comparison worthless: a teacher far from the data, a stage that collapsed."""
    floor, best = rows[0], summary["best"]
    found = []
    if floor.fd is not None and best.fd is not None and best.fd > FAR * max(floor.fd, 1e-9):
        found.append(
            f"The teacher is far from the data: its best distance is {best.fd:.2f}, that of held-out real data "
            f"{floor.fd:.2f}. It needs more training before any figure below means something."
        )
    for stage in STAGES[1:]:
        row = summary[stage]
        if row is None or row.deviation is None or not floor.deviation:
            continue
        if row.deviation < LEAST_DEVIATION * floor.deviation:
            found.append(
                f"Stage {STAGES.index(stage)} ({stage}) has collapsed: its pixels vary {row.deviation:.2f} over the "
                f"samples, those of real images {floor.deviation:.2f}."
            )
    accuracy = final_accuracy(out / "distribution")
    if accuracy is not None and accuracy >= SATURATED:
        found.append(
            f"The discriminator is right in {accuracy:.1%} of the cases at the end of stage 2: it has won, and teaches "
            "the student nothing. Lower --distribution.discriminator.gan-weight or its learning rate."
        )
    return found


def final_accuracy(folder: Path) -> float | None:
    """Mean share of right answers of the discriminator over the last quarter of the training; None without one."""
    records = [upgrade_record(record) for record in read_records(folder / METRICS)]
    values = [record["discriminator_accuracy"] for record in records if "discriminator_accuracy" in record]
    last = values[-max(1, len(values) // 4) :]
    return sum(last) / len(last) if last else None


def _ratio(one: float | None, other: float | None) -> float:
    return (one or 0.0) / max(other or 0.0, 1e-9)
