"""The whole way, data to report. Each part reads the one before from disk: nothing is passed on in memory."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hd_trainer import evaluation
from hd_trainer.context import Context, make_context
from hd_trainer.engine import loop
from hd_trainer.errors import UserError
from hd_trainer.files import is_number, make_folder, read_json
from hd_trainer.memory import check_memory
from hd_trainer.networks import check_student, fresh_network, guided, load_network, load_teacher
from hd_trainer.report import Run, run_names, write_comparison, write_report
from hd_trainer.run_folder import check_sources, claim, make_run_folder, note_sources, read_settings, stage_folders
from hd_trainer.settings import Settings, to_json
from hd_trainer.sharing import check_finished, export
from hd_trainer.stages import STAGES, distribution, teacher, trajectory
from hd_trainer.stages.alarms import alarms_of
from hd_trainer.stages.discriminator import check_layers, tap_layers
from hd_trainer.writers import check_installed, make_writers


def run(
    settings: Settings, out: Path, *, teacher_weights: Path | None = None, student_weights: Path | None = None
) -> None:
    """Train what is not trained yet, evaluate, report. The same call goes on where a stopped one left off.

    With ``settings.teacher_source`` stage "teacher" is left out.

    Args:
        teacher_weights: a folder, in place of ``settings.teacher_source``.
        student_weights: folder of a student that stage "distribution" starts from; stage "trajectory" is then left out.

    Raises:
        UserError: for a folder that cannot be written or was made with other settings; see also each part.
    """
    began = time.perf_counter()
    if teacher_weights is not None:
        settings = dataclasses.replace(settings, teacher_source=str(teacher_weights))
    context = context_of(settings)
    check(settings, context, student_weights)
    given = {"teacher": settings.teacher_source, "trajectory": student_weights}
    for stage in STAGES:
        if given.get(stage) is None:
            train_stage(stage, settings, context, out, student_weights=student_weights)
    evaluate(settings, context, out)
    report = write_report(settings, context, out)
    for stage in STAGES:
        for alarm in alarms_of(stage, out / stage):
            print(f"Warning: {stage}: {alarm}")
    print(f"{time.perf_counter() - began:.0f} s in all. Open {report}")


def context_of(settings: Settings) -> Context:
    """The surroundings of a command, made from its settings; see :func:`hd_trainer.context.make_context`."""
    return make_context(
        settings.data,
        device=settings.device,
        precision=settings.precision,
        seed=settings.seed,
        writers=make_writers(settings.writers, to_json(settings)),
    )


def check(settings: Settings, context: Context, student_weights: Path | None = None) -> None:
    """Find out what the settings' own checks cannot know, before anything is written or trained.

    Raises:
        UserError: for an impossible network, one that does not fit into the memory, a teacher or weights that are
            missing or do not fit the data, a teacher of which no student can be made, guidance that it cannot give,
            discriminator layers that it lacks, or a writer whose package is not installed.
    """
    check_installed(settings.writers)
    check_memory(settings, context)
    if settings.teacher_source is None:
        network = fresh_network(settings.model, context)
        tap_layers(settings.distribution.discriminator, network)
    else:
        network = load_teacher(settings.teacher_source, context.data, context.device)
        check_layers(settings.distribution.discriminator, context, network)
        stage = settings.trajectory
        check_student(network, context, stage.interval_at, stage.meanflow.derivative)
        for guidance in (stage.guidance, settings.distribution.guidance, settings.evaluation.guidance):
            guided(network, guidance, context.data.null)
    evaluation.check_extractors(settings.evaluation.extractors, context.data)
    if student_weights is not None:
        load_network(student_weights, context.data, context.device)


def train_stage(
    stage: str, settings: Settings, context: Context, out: Path, *, student_weights: Path | None = None
) -> None:
    """Train one stage into ``out/<stage>``.

    Nothing is written before the weights it needs are read and the folder is found to be this run's. The teacher is
    ``settings.teacher_source``; None: ``out/teacher``.

    Args:
        stage: "teacher", "trajectory" or "distribution".
        student_weights: folder of what stage "distribution" starts from; None: ``out/trajectory``.

    Raises:
        UserError: for an unknown stage, missing weights, a teacher to be trained though one is given, or a folder that
            holds another run.
    """
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}")
    if stage == "teacher" and settings.teacher_source is not None:
        raise UserError(f"a teacher is given ({settings.teacher_source}): there is none to train; leave --teacher out")
    given: dict[str, str | Path | None] = {"teacher": settings.teacher_source, "student": student_weights}
    needed = {"teacher": (), "trajectory": ("teacher",), "distribution": ("teacher", "student")}[stage]
    own = {"teacher": out / "teacher", "student": out / "trajectory"}
    sources = {name: given[name] or own[name] for name in needed}

    def read(name: str) -> nn.Module:
        load = load_teacher if name == "teacher" and given[name] else load_network
        return load(sources[name], context.data, context.device)

    task = prepare(stage, settings, context, read)
    brought = {name: place for name in needed if (place := given[name]) is not None}
    check_sources(out, brought)
    check_sources(out / stage, sources)
    claim(settings, out)
    if brought:
        note_sources(out, brought)
    note_sources(make_folder(out / stage), sources)
    loop.train(task, out / stage, settings.loop, context.writers)


def prepare(stage: str, settings: Settings, context: Context, read: Callable[[str], nn.Module]) -> loop.Task:
    """The stage's task; ``read`` gives the networks it starts from, "teacher" and "student"."""
    if stage == "teacher":
        return teacher.prepare(settings.teacher, context, fresh_network(settings.model, context))
    if stage == "trajectory":
        return trajectory.prepare(settings.trajectory, context, read("teacher"))
    return distribution.prepare(settings.distribution, context, read("teacher"), read("student"))


def evaluate(settings: Settings, context: Context, out: Path) -> list[evaluation.Row]:
    """Measure the stages found in ``out``; print the table and write ``out/evaluation.json``.

    Raises:
        UserError: if no stage is there.
    """
    folders = stage_folders(out)
    networks = {stage: load_network(folder, context.data, context.device) for stage, folder in folders.items()}
    make_run_folder(out)
    began = time.perf_counter()
    extractors = evaluation.load_extractors(settings.evaluation.extractors, context.data, context.device)
    rows = evaluation.evaluate(settings.evaluation, context, networks, extractors)
    facts: dict[str, Any] = {
        "recipe": settings.recipe,
        "seed": settings.seed,
        "data": context.data.name,
        "training_seconds": {
            stage: seconds for stage in networks if (seconds := _training_seconds(out / stage)) is not None
        },
        "torch": torch.__version__,
        "device": context.device.type,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        **evaluation.facts_of(settings.evaluation, context.data, extractors),
        "evaluation_seconds": round(time.perf_counter() - began, 1),
    }
    evaluation.save_rows(rows, out, facts)
    print(evaluation.format_rows(rows, [one.name for one in extractors]))
    return rows


def evaluate_folder(out: Path, extractors: tuple[str, ...] = ()) -> None:
    """:func:`evaluate` with the settings noted in a run's folder; ``extractors``, where given, in place of its own."""
    settings = read_settings(out)
    if extractors:
        chosen = dataclasses.replace(settings.evaluation, extractors=extractors)
        settings = dataclasses.replace(settings, evaluation=chosen)
    evaluate(settings, context_of(settings), out)


def report_folders(folders: Sequence[Path], to: Path | None = None) -> Path:
    """Write a run's page again, or one page about several, with the settings noted in their folders.

    Args:
        to: the page's file; None: ``report.html`` in the folder, of several runs ``compare.html``.

    Raises:
        UserError: for no folder, one that is given twice or is no finished run, or a place that cannot be written.
    """
    if not folders:
        raise UserError("hdistill report needs a run's folder, e.g. hdistill report runs/digits")
    if to is not None and to.is_dir():
        raise UserError(f"{to} is a folder; give --out the name of a page, e.g. {to / 'report.html'}")
    if len(folders) == 1:
        settings = read_settings(folders[0])
        context = context_of(settings)
        if to is not None:
            make_folder(to.parent)
        return write_report(settings, context, folders[0], to)
    names = run_names(folders)
    settings_of = [read_settings(folder) for folder in folders]
    datasets: dict[str, Context] = {}
    runs = []
    for name, folder, settings in zip(names, folders, settings_of, strict=True):
        # Runs on the same data share it: it is read once.
        context = datasets.get(settings.data) or context_of(settings)
        datasets[settings.data] = context
        runs.append(Run(name=name, folder=folder, settings=settings, context=context))
    to = to or Path("compare.html")
    make_folder(to.parent)
    return write_comparison(runs, to)


def export_folder(run: Path, to: Path | None = None, *, name: str | None = None, license: str | None = None) -> Path:
    """Write a finished run as a folder to upload; see :func:`hd_trainer.sharing.export`."""
    settings = read_settings(run)
    check_finished(settings, run)
    return export(settings, context_of(settings), run, to, name=name, license=license)


def _training_seconds(folder: Path) -> float | None:
    """Of a stage that was trained here, what its loop noted."""
    if not (folder / loop.DONE).exists():
        return None
    seconds = read_json(folder / loop.DONE).get("seconds")
    return float(seconds) if is_number(seconds) else None
