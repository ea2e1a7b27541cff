"""The whole way, data to report. Each part reads the one before from disk: nothing is passed on in memory."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hd_trainer import evaluation, loop
from hd_trainer.context import fresh_network, make_context
from hd_trainer.errors import UserError
from hd_trainer.files import make_folder, read_json, write_json
from hd_trainer.report import write_report
from hd_trainer.settings import Settings, differences, from_json, to_json
from hd_trainer.stages import STAGES, distribution, teacher, trajectory
from hd_trainer.stages.common import Context, load_network
from hd_trainer.stages.critic import check_layers

RECIPE, SOURCES = "recipe.json", "sources.json"


def run(settings: Settings, out: Path) -> None:
    """Train what is not trained yet, evaluate, report. The same call goes on where a stopped one left off.

    Raises:
        UserError: for a folder that cannot be written or was made with other settings; see also each part.
    """
    check(settings)
    began = time.perf_counter()
    for stage in STAGES:
        train_stage(stage, settings, out)
    evaluate(settings, out)
    report = write_report(settings, out)
    print(f"{time.perf_counter() - began:.0f} s in all. Open {report}")


def check(settings: Settings) -> None:
    """Find out what the settings' own checks cannot know, before anything is written or trained.

    Raises:
        UserError: for an unknown data set, a device that is not there, an impossible network, or discriminator
            layers that the network lacks.
    """
    context = make_context(settings)
    check_layers(settings.distribution.adversary, fresh_network(settings, context))


def claim(settings: Settings, out: Path) -> None:
    """Note the settings in the run's folder; refuse a folder that holds a run with others."""
    make_folder(out)
    path, ours = out / RECIPE, to_json(settings)
    if path.exists():
        # As this version reads them: a setting that is younger than the run has its default.
        found = differences(ours, to_json(read_settings(out)))
        # Where a run computes does not change what it is; nor do evaluation settings change what was trained.
        found = [line for line in found if not line.startswith(("device", "evaluation."))]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UserError(
                f"{out} holds a run with other settings ({'; '.join(found[:3])}{more}); "
                "choose another --out or remove it"
            )
    write_json(path, ours)


def train_stage(
    stage: str,
    settings: Settings,
    out: Path,
    *,
    teacher_folder: Path | None = None,
    student_folder: Path | None = None,
) -> None:
    """Train one stage into ``out/<stage>``.

    Args:
        stage: "teacher", "trajectory" or "distribution".
        teacher_folder: weights of the teacher; None: ``out/teacher``.
        student_folder: weights that stage "distribution" starts from; None: ``out/trajectory``.

    Nothing is written before the weights it needs are read and the folder is found to be this run's.

    Raises:
        UserError: for an unknown stage, missing weights, or what :func:`claim` refuses.
    """
    context = make_context(settings)
    teacher_folder, student_folder = teacher_folder or out / "teacher", student_folder or out / "trajectory"
    read_teacher, read_student = _reader(teacher_folder, context), _reader(student_folder, context)
    prepare: dict[str, Callable[[], loop.Task]] = {
        "teacher": lambda: teacher.prepare(settings.teacher, context, fresh_network(settings, context)),
        "trajectory": lambda: trajectory.prepare(settings.trajectory, context, read_teacher()),
        "distribution": lambda: distribution.prepare(settings.distribution, context, read_teacher(), read_student()),
    }
    if stage not in prepare:
        raise UserError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}")
    task = prepare[stage]()
    claim(settings, out)
    needs: dict[str, dict[str, Path]] = {
        "teacher": {},
        "trajectory": {"teacher": teacher_folder},
        "distribution": {"teacher": teacher_folder, "student": student_folder},
    }
    note_sources(make_folder(out / stage), needs[stage])
    loop.train(task, out / stage, settings.loop)


def note_sources(folder: Path, sources: dict[str, Path]) -> None:
    """Note which weights a stage starts from, by their hash, in ``folder/sources.json``.

    Raises:
        UserError: if the stage was begun from other weights: going on would mix two runs.
    """
    found = {
        name: {"folder": str(source), "sha256": hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()}
        for name, source in sources.items()
    }
    path = folder / SOURCES
    noted = read_json(path) if path.exists() else {}
    for name in found.keys() & noted.keys():
        if noted[name].get("sha256") != found[name]["sha256"]:
            raise UserError(
                f"{folder} was begun from another {name} than the one in {found[name]['folder']}; "
                "choose another --out or remove it"
            )
    if not path.exists():
        write_json(path, found)


def evaluate(settings: Settings, out: Path) -> list[evaluation.Row]:
    """Measure the stages found in ``out``; print the table and write ``out/evaluation.json``.

    Raises:
        UserError: if no stage is there.
    """
    context = make_context(settings)
    networks = read_stages(out, context)
    make_folder(out)
    rows = evaluation.evaluate(settings.evaluation, context.data, networks, context.device, settings.seed)
    seconds = {
        stage: read_json(out / stage / loop.DONE)["seconds"] for stage in networks if (out / stage / loop.DONE).exists()
    }
    facts: dict[str, Any] = {
        "recipe": settings.recipe,
        "seed": settings.seed,
        "data": context.data.name,
        "training_seconds": seconds,
        "torch": torch.__version__,
        "device": context.device.type,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "guidance_scale": settings.evaluation.guidance_scale,
    }
    evaluation.save_rows(rows, out, facts)
    print(evaluation.format_rows(rows, context.data.name))
    return rows


def read_stages(out: Path, context: Context) -> dict[str, nn.Module]:
    """The finished networks of a run's folder, by stage.

    Raises:
        UserError: if there is none.
    """
    found = {
        stage: load_network(out / stage, context.data, context.device)
        for stage in STAGES
        if (out / stage / "config.json").exists()
    }
    if not found:
        raise UserError(f"no trained stage in {out}; make one with: hdistill run digits --out {out}")
    return found


def _reader(folder: Path, context: Context) -> Callable[[], nn.Module]:
    return lambda: load_network(folder, context.data, context.device)


def read_settings(out: Path) -> Settings:
    """The settings noted in a run's folder, for evaluating or reporting it again.

    Raises:
        UserError: if there is no run, or its settings are not this version's.
    """
    if not (out / RECIPE).exists():
        raise UserError(f"{out} is not a run's folder (no {RECIPE}); make one with: hdistill run digits --out {out}")
    return from_json(Settings, read_json(out / RECIPE), str(out / RECIPE))
