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

INK, ACCENTS = "#1f2933", ("#0b6e99", "#d9822b", "#5c8d3e", "#8e4b9e", "#b0413e", "#4b5d67")
#: Pixels: no picture of the page is wider.
WIDEST = 1400

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


def picture(images: Tensor, columns: int, gap: int = 1) -> str:
    """Images (N, C, H, W) in [-1, 1], tiled, small ones enlarged to about 32 pixels a side, as a data address."""
    return address(tile(images, columns, gap=gap, scale=max(1, 32 // images.shape[-1])))


def address(image: Image.Image) -> str:
    """A picture as a data address: PNG, or where it is wider than ``WIDEST`` made smaller, and JPEG."""
    if image.width <= WIDEST:
        return _data(image, "PNG", optimize=True)
    height = max(1, round(image.height * WIDEST / image.width))
    return _data(image.convert("RGB").resize((WIDEST, height), Image.Resampling.LANCZOS), "JPEG", quality=88)


def _data(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def curves(folders: dict[str, Path], stage: str) -> str:
    """A stage's loss curves as one SVG, of several runs by name one over the other; empty text without a record.

    A run has its colour where there are several; then the second curve of a panel is dashed.
    """
    found = {
        name: [upgrade_record(record) for record in read_records(path / METRICS)] for name, path in folders.items()
    }
    panels = [panel for panel in CURVES[stage] if any(_has(records, panel[1]) for records in found.values())]
    if not panels:
        return ""
    figure = Figure(figsize=(3.4 * len(panels), 2.3), layout="constrained")
    for axes, (title, names, log) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for run, (label, records) in enumerate(found.items()):
            for curve, (name, legend) in enumerate(names.items()):
                points = [(record["step"], record[name]) for record in records if name in record]
                if not points:
                    continue
                words = ", ".join(word for word in (label, legend if len(names) > 1 or not label else "") if word)
                color = ACCENTS[(run if label else curve) % len(ACCENTS)]
                style = "--" if label and curve else "-"
                axes.plot(*zip(*points, strict=True), style, color=color, linewidth=1.4, label=words)
        if log:
            axes.set_yscale("log")
        only = "" if len(found) == 1 or len(names) > 1 else f": {next(iter(names.values()))}"
        axes.set_title(title + only, fontsize=9, color=INK, loc="left")
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
    return address(canvas)


def svg(figure: Figure) -> str:
    """A figure as an SVG element, without the XML prologue."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _has(records: list[dict[str, Any]], names: dict[str, str]) -> bool:
    return any(name in record for record in records for name in names)
