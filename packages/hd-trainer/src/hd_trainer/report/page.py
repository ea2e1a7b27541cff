"""Gathers a run's samples, numbers and curves and fills ``page.html``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor, nn

import hd_trainer
import hd_zoo
from hd_awd import FeatureTap
from hd_meanflow import interpolate
from hd_trainer.context import make_context
from hd_trainer.data import ImageData
from hd_trainer.errors import UserError
from hd_trainer.evaluation import RESULTS, sampler
from hd_trainer.files import make_folder, read_json, write_atomically
from hd_trainer.recipes import load_recipe
from hd_trainer.report import figures
from hd_trainer.settings import Settings, to_json
from hd_trainer.stages import STAGES
from hd_trainer.stages.common import Context, load_network
from hd_trainer.stages.critic import load_discriminator

REPORT = "report.html"
ROWS_OF_SAMPLES = 8
TEACHER_STEPS = 50
WEIGHT_LEVEL = 0.3


def write_report(settings: Settings, out: Path) -> Path:
    """Write ``out/report.html``: pictures from the same noise and class, the table, curves, token weights.

    Raises:
        UserError: if the run is not finished and evaluated.
    """
    if not (out / RESULTS).exists():
        raise UserError(f"{out} is not evaluated yet; run: hdistill evaluate {out}")
    results = read_json(out / RESULTS)
    if not {"rows", "training_seconds"} <= results.keys():
        raise UserError(f"{out / RESULTS} is damaged; run: hdistill evaluate {out}")
    make_folder(out)
    context = make_context(settings)
    networks = {stage: load_network(out / stage, context.data, context.device) for stage in STAGES}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hd_trainer", "report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    rows = results["rows"]
    samples = _samples(settings, context, networks)
    page = environment.get_template("page.html").render(
        version=hd_trainer.__version__,
        recipe=settings.recipe,
        unit=f"FD-{context.data.name}",
        facts=results,
        total_seconds=sum(results["training_seconds"].values()),
        rows=rows,
        summary=summarise(rows),
        samples={name: figures.picture(images, 10) for name, images in samples.items()},
        neighbours=figures.picture(_with_neighbours(samples["distribution"][:10], context.data), 10),
        curves={stage: figures.curves(out / stage, stage) for stage in STAGES},
        trade_off=figures.trade_off(rows, f"FD-{context.data.name}", rows[0]["fd"]),
        weights=_token_weights(context, networks["teacher"], samples["distribution"], out),
        command=command_line(settings),
        settings=to_json(settings),
        teacher_steps=TEACHER_STEPS,
        weight_level=WEIGHT_LEVEL,
    )
    write_atomically(out / REPORT, lambda path: path.write_text(page, encoding="utf-8"))
    return out / REPORT


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The comparison the page opens with: the teacher at its most steps, both students at their fewest.

    Raises:
        UserError: if one of the three has no row.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["steps"]):
        by_name.setdefault(row["name"], []).append(row)
    missing = [name for name in STAGES if name not in by_name]
    if missing:
        raise UserError(f"the evaluation has no row for {', '.join(missing)}; train that stage, then evaluate again")
    teacher, first, second = by_name["teacher"][-1], by_name["trajectory"][0], by_name["distribution"][0]
    return {
        "teacher": teacher,
        "trajectory": first,
        "distribution": second,
        "recall_ratio": second["recall"] / max(teacher["recall"], 1e-9),
        "speed_ratio": second["images_per_second"] / teacher["images_per_second"],
    }


def command_line(settings: Settings) -> str:
    """The command that makes this run: the recipe, and a flag for every setting that differs from it."""
    candidates: list[list[str]] = []
    for smoke in (False, True):
        recipe = to_json(load_recipe(settings.recipe, smoke=smoke))
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in _changed(to_json(settings), recipe)]
        candidates.append(["hdistill run", settings.recipe, *["--smoke"] * smoke, *flags])
    shortest = min(candidates, key=lambda words: len(words))
    return " ".join(shortest)


def _changed(ours: dict[str, Any], recipe: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in ours.items():
        if isinstance(value, dict):
            found += _changed(value, recipe[name], f"{prefix}{name}.")
        elif value != recipe[name]:
            found.append((prefix + name, " ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return found


def _samples(settings: Settings, context: Context, networks: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Every stage's images from the same noise and labels: a column for each class."""
    labels = torch.arange(len(context.data.classes)).repeat(ROWS_OF_SAMPLES).to(context.device)
    # Seeds of their own: these pictures are none of the measured ones, and were not picked.
    noise = hd_zoo.seeded_noise(context.data.shape, range(10**9, 10**9 + len(labels)), device=context.device)
    plan = {"teacher": TEACHER_STEPS, "trajectory": 1, "distribution": 1}
    return {
        stage: sampler(stage, networks[stage], steps, settings.evaluation)[0](noise, labels)
        for stage, steps in plan.items()
    }


def _with_neighbours(images: Tensor, data: ImageData) -> Tensor:
    """The images, and below each the training image nearest to it in pixel space."""
    nearest = torch.cdist(images.cpu().flatten(1), data.train.flatten(1)).argmin(dim=1)
    return torch.cat([images.cpu(), data.train[nearest]])


@torch.no_grad()
def _token_weights(context: Context, teacher: nn.Module, fake: Tensor, out: Path) -> list[dict[str, Any]]:
    """Per layer, where attention falls on real and on generated images (mean over queries); empty without AWD."""
    folder = out / "distribution"
    if not (folder / "discriminator.json").exists():
        return []
    discriminator, layers, _ = load_discriminator(folder)
    tap = FeatureTap(teacher, layers)
    classes = torch.arange(len(context.data.classes))
    firsts = torch.stack([(context.data.held_out_labels == label).nonzero()[0, 0] for label in classes])
    labels = classes.to(context.device)
    noise = hd_zoo.seeded_noise(context.data.shape, range(len(labels)), device=context.device)
    images = {"real": context.data.held_out[firsts].to(context.device), "fake": fake[: len(labels)]}
    t = torch.full((len(labels),), WEIGHT_LEVEL, device=context.device)
    discriminator.to(context.device)
    found = {
        kind: discriminator.token_weights(tap(interpolate(one, noise, t), t, labels=labels))
        for kind, one in images.items()
    }
    shown = []
    for index, layer in enumerate(layers):
        entry: dict[str, Any] = {"layer": layer}
        for kind, one in images.items():
            weights = found[kind][index].mean(dim=1).cpu()
            side = round(weights.shape[1] ** 0.5)
            entry[kind] = figures.heatmaps(one, weights.reshape(len(weights), side, side))
            # 1 is uniform; the number of tokens is all weight on one.
            entry[f"{kind}_peak"] = float(weights.amax(dim=1).mean() * weights.shape[1])
        shown.append(entry)
    return shown
