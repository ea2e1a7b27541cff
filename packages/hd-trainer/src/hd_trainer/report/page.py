"""Gathers a run's samples, numbers and curves and fills ``page.html``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor, nn

from hd_trainer.context import Context
from hd_trainer.data import pictures
from hd_trainer.errors import UserError
from hd_trainer.evaluation import Row, read_results, title
from hd_trainer.evaluation.rows import SCORES, number
from hd_trainer.files import write_text
from hd_trainer.networks import load_network
from hd_trainer.recipes import load_recipe
from hd_trainer.report import attention, figures, film
from hd_trainer.report.per_class import per_class
from hd_trainer.report.pictures import between, columns, held_out, nearest, samples
from hd_trainer.report.summary import summarise, warnings
from hd_trainer.run_folder import brought, make_run_folder, stage_folders
from hd_trainer.settings import KIND, Settings, to_json
from hd_trainer.stages import STAGES
from hd_trainer.version import __version__

REPORT = "report.html"
TITLES = {"teacher": "teacher", "trajectory": "stage 1, trajectory", "distribution": "stage 2, distribution"}


def write_report(settings: Settings, context: Context, out: Path, to: Path | None = None) -> Path:
    """Write a run's page: samples from one noise, the table, what helps to judge them, the training, the settings.

    Args:
        out: the run's folder.
        to: the file; None: ``out/report.html``.

    Raises:
        UserError: if the run is not finished and evaluated.
    """
    rows, facts = read_results(out)
    summary = summarise(rows)
    if to is None:
        make_run_folder(out)
    networks = _networks(out, context, [stage for stage in STAGES if summary[stage] is not None])
    guidance = settings.evaluation.guidance
    drawn = {
        stage: samples(context, network, summary["teacher"].steps if stage == "teacher" else 1, guidance)
        for stage, network in networks.items()
    }
    last, real = summary["last"].name, held_out(context)
    copies = torch.cat([drawn[last][:10].cpu(), nearest(drawn[last][:10], context.data.reference)])
    names = [one["name"] for one in facts["extractors"]]
    unit = unit_of(facts, context.data.name)
    page = (
        environment()
        .get_template("page.html")
        .render(
            version=__version__,
            recipe=settings.recipe,
            unit=unit,
            columns=score_columns(rows, unit),
            further={title(name): (name, score_columns(rows, title(name), name)) for name in names[1:]},
            facts=facts,
            total_seconds=sum(facts["training_seconds"].values()),
            rows=rows,
            titles=TITLES,
            summary=summary,
            warnings=warnings(rows, summary, out),
            samples={name: _picture(context, x, columns(context)) for name, x in drawn.items()},
            classes=context.data.classes,
            per_class=per_class(context, settings.evaluation, networks[last]),
            between=_picture(context, between(context, networks[last]), 9),
            neighbours=_picture(context, copies, 10),
            films={stage: found for stage in STAGES if (found := film.frames(out / stage))},
            curves={stage: figures.curves({"": out / stage}, stage) for stage in STAGES},
            trade_off=figures.trade_off(rows, unit),
            weights=attention.token_weights(
                context, networks["teacher"], real, drawn[last][: len(real)], out / "distribution"
            ),
            command=command_line(settings, brought(out)),
            settings=to_json(settings),
            weight_level=attention.LEVEL,
        )
    )
    write_text(to or out / REPORT, page)
    return to or out / REPORT


def _networks(out: Path, context: Context, measured: list[str]) -> dict[str, nn.Module]:
    """A run's networks by stage; those that were measured must be there."""
    folders = stage_folders(out)
    lost = [stage for stage in measured if stage not in folders]
    if lost:
        raise UserError(
            f"{out} was evaluated with stages whose weights are gone ({', '.join(lost)}); "
            f"train them, or run: hdistill evaluate {out}"
        )
    return {stage: load_network(folder, context.data, context.device) for stage, folder in folders.items()}


def unit_of(facts: dict[str, Any], data: str) -> str:
    """What the distance is called: by the first extractor."""
    names = [one["name"] for one in facts["extractors"]]
    return title(names[0]) if names else f"FD-{data}"


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


def environment() -> jinja2.Environment:
    """Where the pages' templates are found."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("hd_trainer", "report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    found.filters["number"] = number
    found.globals["most_frames"] = film.MOST_FRAMES
    return found


def _picture(context: Context, x: Tensor, columns: int) -> str:
    """Samples as one picture."""
    return figures.picture(pictures(context.data, x), columns)


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


def score_columns(rows: list[Row], unit: str, extractor: str | None = None) -> dict[str, tuple[str, int]]:
    """(header, digits) of each score that the table shows: the usual ones, and others where they were measured."""
    usual = ("fd", "kid", "precision", "recall", *(["accuracy"] if extractor is None else []))
    spelled = {"prec.": "precision", "dens.": "density", "cover.": "coverage", "acc.": "accuracy", "FD": unit}
    return {
        name: (spelled.get(header, header), digits)
        for name, (header, digits) in SCORES.items()
        if name in usual or any(row.score(name, extractor) is not None for row in rows)
    }
