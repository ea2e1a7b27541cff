"""The report's pictures, as text that stands inside the page: PNG data addresses and SVG."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image
from torch import Tensor

from hd_trainer.earlier import upgrade_record
from hd_trainer.evaluation import Row
from hd_trainer.files import read_records
from hd_trainer.images import tile
from hd_trainer.stages import STAGES
from hd_trainer.writers import METRICS

matplotlib.use("Agg")
from matplotlib.figure import Figure

INK, ACCENTS = "#1f2933", ("#0b6e99", "#d9822b", "#5c8d3e", "#8e4b9e")

#: per stage: (panel title, {metrics.jsonl key: legend}, logarithmic)
CURVES: dict[str, list[tuple[str, dict[str, str], bool]]] = {
    "teacher": [("flow matching", {"loss": "squared error"}, False)],
    "trajectory": [
        ("MeanFlow error", {"error_r_below_t": "r < t", "error_r_equal_t": "r = t"}, True),
        ("du/dt", {"derivative_rms": "root mean square"}, False),
    ],
    "distribution": [
        ("distribution matching", {"velocity_gap": "mean |v real - v fake|"}, False),
        ("fake score", {"fake_score_loss": "squared error"}, False),
        ("adversarial losses", {"discriminator_loss": "discriminator", "gan_loss": "student"}, False),
        ("discriminator", {"discriminator_accuracy": "share of right answers"}, False),
    ],
}


def picture(images: Tensor, columns: int, scale: int = 4, gap: int = 1) -> str:
    """Images (N, C, H, W) in [-1, 1], tiled and enlarged blockwise, as a PNG data address."""
    return png(tile(images, columns, gap=gap, scale=scale))


def png(image: Image.Image) -> str:
    """A picture as a data address."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curves(folder: Path, stage: str) -> str:
    """The stage's loss curves as one SVG; empty text where it recorded nothing."""
    records = [upgrade_record(record) for record in read_records(folder / METRICS)]
    panels = [(title, names, log) for title, names, log in CURVES[stage] if _has(records, names)]
    if not panels:
        return ""
    figure = Figure(figsize=(3.4 * len(panels), 2.3), layout="constrained")
    for axes, (title, names, log) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for color, (name, legend) in zip(ACCENTS, names.items(), strict=False):
            points = [(record["step"], record[name]) for record in records if name in record]
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.4, label=legend)
        if log:
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9, color=INK, loc="left")
        axes.tick_params(labelsize=7, colors=INK)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
        axes.set_xlabel("step", fontsize=7, color=INK)
    return svg(figure)


def trade_off(rows: list[Row], unit: str) -> str:
    """Quality against speed: every row of the table but the data's, as an SVG; empty where no distance was measured."""
    floor = rows[0].fd
    if floor is None:
        return ""
    figure = Figure(figsize=(5.6, 3.1), layout="constrained")
    axes = figure.subplots()
    for name, color in zip(STAGES, ACCENTS, strict=False):
        points = [(row.images_per_second, row.fd, row.steps) for row in rows if row.name == name]
        if not points:
            continue
        speeds, distances, _ = zip(*points, strict=True)
        axes.plot(speeds, distances, color=color, marker="o", markersize=5, linewidth=1, label=name)
        for speed, distance, steps in points:
            at = (speed, distance)
            axes.annotate(f"{steps}", at, textcoords="offset points", xytext=(5, 4), fontsize=7, color=INK)
    axes.axhline(floor, color="#9aa5b1", linewidth=1, linestyle="--", label="held-out data")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("images per second (numbers: steps)", fontsize=8, color=INK)
    axes.set_ylabel(f"{unit}, lower is better", fontsize=8, color=INK)
    axes.tick_params(labelsize=7, colors=INK, which="both")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    return svg(figure)


def heatmaps(images: Tensor, weights: Tensor, enlarge: int = 6) -> str:
    """Images (N, C, H, W), each above its token weights (N, h, w), as a PNG data address.

    Colours run from 0 (dark) to four times the uniform weight (bright): a uniform map is even and dim.
    """
    count, size = len(images), images.shape[-1]
    height, width = weights.shape[1:]
    share = (weights * height * width / 4).clamp(0, 1)
    colored = matplotlib.colormaps["magma"](share.cpu().numpy())[..., :3]
    side = size * enlarge
    canvas = Image.new("RGB", (count * (side + 4) + 4, 2 * side + 12), "white")
    for index in range(count):
        left = 4 + index * (side + 4)
        one = tile(images[index : index + 1], 1, gap=0, scale=enlarge)
        canvas.paste(one, (left, 4))
        heat = Image.fromarray((colored[index] * 255).round().astype("uint8"))
        canvas.paste(heat.resize((side, side), Image.Resampling.NEAREST), (left, side + 8))
    return png(canvas)


def svg(figure: Figure) -> str:
    """A figure as an SVG element, without the XML prologue."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _has(records: list[dict[str, Any]], names: dict[str, str]) -> bool:
    return any(name in record for record in records for name in names)
