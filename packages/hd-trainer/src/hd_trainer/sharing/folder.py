"""A finished run as a folder to upload: weights, model card, recipe, samples and a script that draws them."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hd_zoo.pipelines
from hd_trainer.context import Context
from hd_trainer.data import pictures
from hd_trainer.engine.checkpoint import complete_checkpoints
from hd_trainer.engine.loop import DONE
from hd_trainer.errors import UserError
from hd_trainer.evaluation import read_results
from hd_trainer.files import folder_in_progress, make_folder, write_tensors, write_text
from hd_trainer.images import save_grid
from hd_trainer.networks import CONFIG, load_network
from hd_trainer.networks.folders import is_of_function
from hd_trainer.report.pictures import columns, samples
from hd_trainer.report.summary import summarise
from hd_trainer.run_folder import RECIPE, stage_folders
from hd_trainer.settings import Settings
from hd_trainer.sharing.card import environment, write_card
from hd_trainer.stages import STAGES

CARD, SAMPLES, SCRIPT, CONDITIONS, PIPELINE = (
    "README.md",
    "samples.png",
    "sample.py",
    "conditions.safetensors",
    "diffusers",
)
#: Examples of conditions other than labels that go with the weights.
EXAMPLES = 10


def export(
    settings: Settings,
    context: Context,
    run: Path,
    to: Path | None = None,
    *,
    name: str | None = None,
    license: str | None = None,
) -> Path:
    """Write a run's last student as a folder to upload, whole or not at all; what an earlier export wrote is replaced.

    Args:
        run: the run's folder.
        to: the folder to make; None: ``run/export``.
        name: the title of the model card; None: that of the run's folder.
        license: the hub's name of a licence, such as "apache-2.0"; None: the card leaves it open.

    Raises:
        UserError: if the run is not finished and evaluated, or ``to`` holds something else.
    """
    check_finished(settings, run)
    rows, _ = read_results(run)
    last = summarise(rows)["last"]
    place = stage_folders(run).get(last.name)
    if place is None:
        raise UserError(f"{run} was evaluated, but the weights of {last.name} are gone; train that stage again")
    folder = Path(place)
    if is_of_function(folder):
        raise UserError(
            f"the network of {run} is made by a function of yours, which hd-zoo alone cannot run; "
            f"share that file and {folder} yourself"
        )
    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license):
        raise UserError(f"--license must be one of the hub's names, such as apache-2.0; got {license[:60]!r}")
    to = to or run / "export"
    _check_place(to)
    student = load_network(folder, context.data, context.device)
    drawn = samples(context, student, 1, settings.evaluation.guidance)
    make_folder(to.resolve().parent)
    with folder_in_progress(to) as inside:
        for path in sorted([folder / CONFIG, *folder.glob("model*.safetensors*")]):
            shutil.copyfile(path, inside / path.name)
        shutil.copyfile(run / RECIPE, inside / RECIPE)
        save_grid(pictures(context.data, drawn), inside / SAMPLES, columns(context))
        further = _further(context)
        if further:
            write_tensors(inside / CONDITIONS, further)
        facts: dict[str, Any] = {
            "pictures": context.data.holds_images,
            "classes": len(context.data.classes),
            "further": sorted(further),
        }
        write_text(inside / SCRIPT, environment().get_template("sample.py.jinja").render(**facts))
        pipeline = _pipeline(student, inside / PIPELINE)
        title = " ".join((name or run.resolve().name).split())
        card = write_card(settings, context, run, name=title, license=license, pipeline=pipeline, **facts)
        write_text(inside / CARD, card)
        inside.chmod(0o755)
    return to


def check_finished(settings: Settings, run: Path) -> None:
    """Raises UserError for a run with a stage that was begun and is not done, or that is not evaluated."""
    for stage in STAGES:
        if complete_checkpoints(run / stage) and not (run / stage / DONE).exists():
            raise UserError(f"{run} is not finished ({stage}); go on with: hdistill run {settings.recipe} --out {run}")
    read_results(run)


def _check_place(to: Path) -> None:
    """Raises UserError if something else than an earlier export is there."""
    if not to.exists():
        return
    if not to.is_dir() or (any(to.iterdir()) and not all((to / name).is_file() for name in (CARD, SCRIPT, RECIPE))):
        raise UserError(f"{to} holds something else than an export; choose another --out")


def _further(context: Context) -> dict[str, Tensor]:
    """Examples of the conditions beside labels, from held-out samples."""
    split = context.data.held_out
    cond = split.cond(torch.arange(min(EXAMPLES, len(split))))
    return {name: value for name, value in cond.items() if name != "labels"}


def _pipeline(student: nn.Module, folder: Path) -> str | None:
    """Write diffusers' folder of a student of Sana or DiT; its kind, or None where there is none, which is said."""
    kind = hd_zoo.pipelines.pipeline_kind(student)
    if kind is None:
        return None
    needed = ["diffusers", "transformers"] if kind == "sana" else ["diffusers"]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    try:
        if missing:
            raise ValueError(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}")
        hd_zoo.pipelines.export_pipeline(student, folder)
    except ValueError as error:
        print(f"no folder for diffusers: {error}")
        return None
    return kind
