"""Several runs side by side on one page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hd_trainer.context import Context
from hd_trainer.data import pictures
from hd_trainer.errors import UserError
from hd_trainer.evaluation import Row, read_results
from hd_trainer.files import write_text
from hd_trainer.networks import load_network
from hd_trainer.report import figures
from hd_trainer.report.page import TITLES, environment, score_columns, unit_of
from hd_trainer.report.pictures import columns, samples
from hd_trainer.report.summary import summarise, warnings
from hd_trainer.run_folder import brought, stage_folders
from hd_trainer.settings import Settings, to_json
from hd_trainer.stages import STAGES
from hd_trainer.version import __version__


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    name: str
    folder: Path
    settings: Settings
    context: Context


def write_comparison(runs: Sequence[Run], to: Path) -> Path:
    """Write one page about several runs: their samples from one noise, rows, settings that differ, curves overlaid.

    Raises:
        UserError: for a run that is not finished and evaluated.
    """
    results = {run.name: read_results(run.folder) for run in runs}
    shown = [_shown(run, *results[run.name]) for run in runs]
    units = sorted({one["unit"] for one in shown})
    every_row = [row for rows, _ in results.values() for row in rows]
    page = (
        environment()
        .get_template("compare.html")
        .render(
            version=__version__,
            names=[run.name for run in runs],
            runs=shown,
            titles=TITLES,
            units=units,
            columns=score_columns(every_row, units[0] if len(units) == 1 else "FD"),
            one_noise=len({run.context.data.shape for run in runs}) == 1,
            differing=differing({run.name: _settings(run) for run in runs}),
            curves={stage: figures.curves({run.name: run.folder / stage for run in runs}, stage) for stage in STAGES},
        )
    )
    write_text(to, page)
    return to


def run_names(folders: Sequence[Path]) -> list[str]:
    """A short name for each run's folder: what is left of its path without the folders that all have in common.

    Raises:
        UserError: for a folder that is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    for path, folder in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{folder} is given twice; name each run once")
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return [str(path.relative_to(common)) for path in paths]


def differing(settings: dict[str, dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run as text) for every setting that is not the same in all of them."""
    flat = {name: _leaves(values) for name, values in settings.items()}
    known = dict.fromkeys(key for values in flat.values() for key in values)
    found = [(key, [flat[name].get(key, "") for name in flat]) for key in known]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return found


def _settings(run: Run) -> dict[str, Any]:
    """A run's settings, and the weights that were brought to it."""
    return {**to_json(run.settings), **{f"{name}_weights": str(path) for name, path in brought(run.folder).items()}}


def _shown(run: Run, rows: list[Row], facts: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a run."""
    summary, folders = summarise(rows), stage_folders(run.folder)
    last = summary["last"]
    if last.name not in folders:
        raise UserError(f"{run.folder} was evaluated, but the weights of {last.name} are gone; train that stage again")
    network = load_network(folders[last.name], run.context.data, run.context.device)
    drawn = samples(run.context, network, 1, run.settings.evaluation.guidance)
    return {
        "name": run.name,
        "rows": rows,
        "last": last,
        "stage": last.name,
        "unit": unit_of(facts, run.context.data.name),
        "data": run.context.data.name,
        "seconds": sum(facts["training_seconds"].values()),
        "picture": figures.picture(pictures(run.context.data, drawn), columns(run.context)),
        "warnings": warnings(rows, summary, run.folder),
    }
