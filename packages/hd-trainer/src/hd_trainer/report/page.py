"""Gathers a run's samples, numbers and curves and fills ``page.html``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor, nn

from hd_trainer.context import Context
from hd_trainer.data import Batch, grid_conditions, pictures
from hd_trainer.errors import UserError
from hd_trainer.evaluation import Row, nearest_training, read_results, title
from hd_trainer.evaluation.rows import SCORES, number
from hd_trainer.files import write_text
from hd_trainer.networks import load_network, sampler
from hd_trainer.recipes import load_recipe
from hd_trainer.report import attention, figures
from hd_trainer.report.summary import summarise, warnings
from hd_trainer.run_folder import brought, make_run_folder, stage_folders
from hd_trainer.settings import KIND, Settings, to_json
from hd_trainer.stages import STAGES
from hd_trainer.version import __version__

REPORT = "report.html"
ROWS_OF_SAMPLES = 8
#: The seeds of the page's pictures are none of the measured ones.
FIRST_SEED = 10**9
TITLES = {"teacher": "teacher", "trajectory": "stage 1, trajectory", "distribution": "stage 2, distribution"}


def write_report(settings: Settings, context: Context, out: Path) -> Path:
    """Write ``out/report.html``: pictures from the same noise and class, the table, curves, token weights.

    Raises:
        UserError: if the run is not finished and evaluated.
    """
    rows, facts = read_results(out)
    summary = summarise(rows)
    make_run_folder(out)
    folders = stage_folders(out)
    lost = [stage for stage in STAGES if summary[stage] is not None and stage not in folders]
    if lost:
        raise UserError(
            f"{out} was evaluated with stages whose weights are gone ({', '.join(lost)}); "
            f"train them, or run: hdistill evaluate {out}"
        )
    networks = {stage: load_network(folder, context.data, context.device) for stage, folder in folders.items()}
    samples = _samples(settings, context, networks, summary["teacher"])
    last = summary["last"].name
    real = _held_out(context)
    names = [one["name"] for one in facts["extractors"]]
    unit = title(names[0]) if names else f"FD-{context.data.name}"
    page = (
        _environment()
        .get_template("page.html")
        .render(
            version=__version__,
            recipe=settings.recipe,
            unit=unit,
            columns=_columns_of(rows, unit),
            further={title(name): (name, _columns_of(rows, title(name), name)) for name in names[1:]},
            facts=facts,
            total_seconds=sum(facts["training_seconds"].values()),
            rows=rows,
            titles=TITLES,
            summary=summary,
            warnings=warnings(rows, summary, out),
            samples={
                name: figures.picture(pictures(context.data, x), _columns(context)) for name, x in samples.items()
            },
            neighbours=figures.picture(_with_neighbours(samples[last][:10], context), 10),
            curves={stage: figures.curves(out / stage, stage) for stage in STAGES},
            trade_off=figures.trade_off(rows, unit),
            weights=attention.token_weights(
                context, networks["teacher"], real, samples[last][: len(real)], out / "distribution"
            ),
            command=command_line(settings, brought(out)),
            settings=to_json(settings),
            weight_level=attention.LEVEL,
        )
    )
    write_text(out / REPORT, page)
    return out / REPORT


def command_line(settings: Settings, weights: dict[str, str]) -> str:
    """The command that makes this run: the recipe, the weights brought to it, a flag for every setting that differs."""
    flags_of = {"teacher": "--teacher", "student": "--student-weights"}
    sources = [f"{flags_of[name]} {shlex.quote(place)}" for name, place in weights.items()]
    candidates: list[list[str]] = []
    for smoke in (False, True):
        try:
            recipe = to_json(load_recipe(settings.recipe, smoke=smoke))
        except ValueError:  # a user's file may have no short form, or be gone
            continue
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in _changed(to_json(settings), recipe)]
        candidates.append(["hdistill run", settings.recipe, *["--smoke"] * smoke, *sources, *flags])
    if not candidates:
        return f"hdistill run {settings.recipe}"
    _, shortest = min((len(words), words) for words in candidates)
    return " ".join(shortest)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hd_trainer", "report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = number
    return environment


def _changed(ours: dict[str, Any], recipe: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in ours.items():
        if isinstance(value, dict):
            # The discriminator's network has its flags beside the discriminator's own.
            below = prefix if (prefix, name) == ("distribution.discriminator.", "network") else f"{prefix}{name}."
            other = recipe[name] if isinstance(recipe[name], dict) else {}
            # One of several classes of settings is the recipe's choice: no flag changes it.
            found += _changed(value, other, below) if value.get(KIND) == other.get(KIND) else []
        elif value != recipe.get(name) and prefix + name not in ("recipe", "teacher_source"):
            found.append((prefix + name, " ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return found


def _columns_of(rows: list[Row], unit: str, extractor: str | None = None) -> dict[str, tuple[str, int]]:
    """(header, digits) of each score that the table shows: the usual ones, and others where they were measured."""
    usual = ("fd", "kid", "precision", "recall", *(["accuracy"] if extractor is None else []))
    spelled = {"prec.": "precision", "dens.": "density", "cover.": "coverage", "acc.": "accuracy", "FD": unit}
    return {
        name: (spelled.get(header, header), digits)
        for name, (header, digits) in SCORES.items()
        if name in usual or any(row.score(name, extractor) is not None for row in rows)
    }


def _columns(context: Context) -> int:
    return min(10, len(context.data.classes) or 10)


def _samples(settings: Settings, context: Context, networks: dict[str, nn.Module], teacher: Row) -> dict[str, Tensor]:
    """Every stage's samples from the same noise and conditions, the teacher's in the steps of its row ``teacher``."""
    noise, cond = context.grid_inputs(ROWS_OF_SAMPLES, FIRST_SEED)
    found = {}
    for stage, network in networks.items():
        draw, _ = sampler(
            network, teacher.steps if stage == "teacher" else 1, settings.evaluation.guidance, context.data.null
        )
        found[stage] = draw(noise, cond)
    return found


def _with_neighbours(samples: Tensor, context: Context) -> Tensor:
    """Pictures of the samples, and of the training sample nearest to each below it."""
    _, index = nearest_training(samples.cpu(), context.data.reference)
    return pictures(context.data, torch.cat([samples.cpu(), context.data.reference.read(index).x]))


def _held_out(context: Context) -> Batch:
    """A held-out sample for each column of the page's pictures, on the device."""
    split = context.data.held_out
    if not context.data.classes:
        return split.read(torch.arange(min(10, len(split)))).to(context.device)
    labels = split.cond(torch.arange(len(split)))["labels"]
    wanted = grid_conditions(context.data, 1)["labels"]
    first = [(labels == label).nonzero() for label in wanted]
    # A class without a held-out sample shows the first of all.
    return split.read(torch.tensor([int(one[0, 0]) if len(one) else 0 for one in first])).to(context.device)
