"""The model card: README.md with the hub's YAML in front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from hd_trainer.context import Context
from hd_trainer.data import grid_conditions
from hd_trainer.evaluation import read_results
from hd_trainer.evaluation.rows import number
from hd_trainer.files import read_json
from hd_trainer.report.page import TITLES, score_columns, unit_of
from hd_trainer.report.pictures import FIRST_SEED, ROWS_OF_SAMPLES
from hd_trainer.report.summary import summarise, warnings
from hd_trainer.run_folder import SOURCES, brought
from hd_trainer.settings import Settings
from hd_trainer.stages import STAGES
from hd_trainer.version import __version__

URL = "https://github.com/hierarchical-distillation/hierarchical-distillation"
#: Names of classes that are listed.
NAMED = 20


def environment() -> jinja2.Environment:
    """Where the card's and the script's templates are found. They are no HTML: nothing is escaped."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("hd_trainer", "sharing"),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    found.filters["number"] = number
    return found


def write_card(
    settings: Settings,
    context: Context,
    run: Path,
    *,
    name: str,
    license: str | None,
    pipeline: str | None,
    **facts: Any,
) -> str:
    """The card's text.

    Args:
        pipeline: "dit" or "sana" where there is a folder for diffusers, else None.
        facts: "pictures", "classes" and "further", as the script has them.
    """
    rows, measured = read_results(run)
    summary = summarise(rows)
    data, last = context.data, summary["last"]
    unit = unit_of(measured, data.name)
    names = ", ".join(f"{index} {one}" if one != str(index) else one for index, one in enumerate(data.classes[:NAMED]))
    return (
        environment()
        .get_template("card.md.jinja")
        .render(
            **facts,
            name=name,
            license=license,
            pipeline=pipeline,
            url=URL,
            version=__version__,
            grid=_grid(context),
            shape=[str(side) for side in data.shape],
            class_names=names + (" ..." if len(data.classes) > NAMED else ""),
            examples=min(10, len(data.held_out)),
            unit=unit,
            columns=score_columns(rows, unit),
            extractor=_extractor(measured),
            titles=TITLES,
            rows=rows,
            last=last,
            facts=measured,
            data=f"`{data.name}`",
            samples=len(data.reference),
            recipe=Path(settings.recipe).name,
            stages=_stages(settings, measured["training_seconds"], last.name),
            sources=_sources(run, last.name),
            warnings=warnings(rows, summary, run),
        )
    )


def _extractor(facts: dict[str, Any]) -> str:
    """What the table's distance was measured with, in words; of an earlier version's table the name alone."""
    if not facts["extractors"]:
        return ""
    one = facts["extractors"][0]
    if "sha256" not in one:
        return str(one["name"])
    return f"{one['name']}, {one['width']} features, pictures {one['resize']}, sha256 {one['sha256'][:12]}"


def _grid(context: Context) -> str:
    """Arguments of the script that draw the card's picture."""
    labels = grid_conditions(context.data, 1).get("labels")
    count = ROWS_OF_SAMPLES * (10 if labels is None else len(labels))
    chosen = "" if labels is None else f" --labels {' '.join(map(str, labels.tolist()))}"
    return f"--seed {FIRST_SEED} --count {count}{chosen}"


def _stages(settings: Settings, seconds: dict[str, float], last: str) -> list[dict[str, Any]]:
    """The stages that were trained in this run, up to the exported one."""
    own = [stage for stage in STAGES[: STAGES.index(last) + 1] if stage in seconds]
    return [
        {
            "name": stage,
            "steps": f"{getattr(settings, stage).steps:,}",
            "batch": getattr(settings, stage).batch,
            "seconds": f"{seconds[stage]:,.0f}",
        }
        for stage in own
    ]


def _sources(run: Path, last: str) -> list[dict[str, str]]:
    """What the exported stage started from, by hash: of weights that were brought, the folder's last two names too."""
    path = run / last / SOURCES
    noted = read_json(path) if path.exists() else {}
    given = brought(run)
    found = []
    for name in ("teacher", "student"):
        if name in noted:
            place = f"`{'/'.join(Path(given[name]).parts[-2:])}`" if name in given else "trained in this run"
            what = "Teacher" if name == "teacher" else "The last stage started from"
            found.append({"what": what, "place": place, "sha256": str(noted[name].get("sha256"))})
    return found
