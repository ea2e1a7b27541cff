"""The picture of attention-pool: a panel per shape, a bar per case, forward and backward as multiples of the copy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WIDE, NARROW = "#41658a", "#a3b8cc"
OURS, OURS_NARROW = "#c8384c", "#e59aa5"
AUTOGRAD, OTHER = "#dda23a", "#9a9a9a"
BARS = {  # from top to bottom: label and colour
    "mha": ("nn.MultiheadAttention", WIDE),
    "naive": ("plain", WIDE),
    "sdpa": ("SDPA", WIDE),
    "naive_d64": ("plain, d = 64", NARROW),
    "sdpa_d64": ("SDPA, d = 64", NARROW),
    "autograd": ("folded, autograd", AUTOGRAD),
    "torch": ("attention_pool", OURS),
    "torch_d64": ("attention_pool, d = 64", OURS_NARROW),
    "triton": ("attention_pool, Triton", OURS),
    "triton_d64": ("attention_pool, Triton, d = 64", OURS_NARROW),
    "mean": ("mean (GAP)", OTHER),
}
LEGEND = (
    (WIDE, "keys and values of every token, d = C"),
    (NARROW, "the same, d = 64"),
    (AUTOGRAD, "folded queries, backward by autograd, d = C"),
    (OURS, "hd_awd.attention_pool, d = C"),
    (OURS_NARROW, "the same, d = 64, the package's default"),
    (OTHER, "mean over tokens, d = C: another function"),
)
INK, PALE = "#222222", "#d9d9d9"


def draw(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Rows of one run, as attention-pool writes them, to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["pass"] == "forward+backward"]
    shapes = list(dict.fromkeys(str(row["shape"]) for row in rows))
    names = [name for name in BARS if any(row["case"] == name for row in rows)]
    lines = (len(shapes) + 2) // 2  # one cell more than shapes, for the legend
    figure = Figure(figsize=(9, 0.9 + lines * (0.7 + 0.2 * len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, 2, sharex=True, squeeze=False).flatten()
    ratios = [number(row["ratio_to_copy"]) for row in rows]
    limits = (0.8 * min(1.0, *ratios), 30 * max(ratios))  # on the right there is room for the numbers
    for i, (axis, shape) in enumerate(zip(axes, shapes, strict=False)):
        found = {str(row["case"]): row for row in rows if row["shape"] == shape}
        panel(axis, shape, found, names, limits)
        if i % 2:
            axis.set_yticklabels([])
    for axis in axes[len(shapes) :]:
        axis.set_axis_off()
    for axis in axes[max(len(shapes) - 2, 0) : len(shapes)]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("time as a multiple of the copy (log scale)", fontsize=8, color=INK)
    legend(axes[len(shapes)])
    facts = rows[0]
    place = (
        facts.get("accelerator") or f"{facts.get('processor', facts['device'])}, {facts.get('threads', '?')} threads"
    )
    figure.suptitle(
        f"Attention pooling of tokens, forward + backward, {facts['dtype']}, M = {facts['queries']}\n{place}",
        fontsize=11,
        color=INK,
    )
    figure.savefig(path, dpi=150)


def panel(
    axis: Any, shape: str, found: Mapping[str, Mapping[str, object]], names: list[str], limits: tuple[float, float]
) -> None:
    """One shape's bars, each with its milliseconds and its multiple."""
    places = [name for name in names if name in found]
    heights = [names.index(name) for name in places]
    values = [number(found[name]["ratio_to_copy"]) for name in places]
    axis.barh(heights, [value - 1 for value in values], left=1, height=0.72,
              color=[BARS[name][1] for name in places])  # fmt: skip
    for height, name, value in zip(heights, places, values, strict=True):
        milliseconds = number(found[name]["median_ms"])
        text = f"{three_digits(value)}x   {three_digits(milliseconds)} ms"
        axis.text(max(value, 1) * 1.1, height, text, va="center", fontsize=7.5, color=INK)
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.set_xlim(limits)
    axis.set_ylim(len(names) - 0.45, -0.55)
    axis.set_yticks(range(len(names)), [BARS[name][0] for name in names], fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=PALE, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    any_row = found["copy"]
    size = " x ".join(str(any_row[key]) for key in ("batch", "tokens", "width"))
    copy = three_digits(number(any_row["median_ms"]))
    axis.set_title(f"{shape}: {size}, copy {copy} ms", fontsize=9, loc="left", color=INK)


def legend(axis: Any) -> None:
    """What the colours mean, in a cell of its own."""
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for colour, label in LEGEND]
    axis.legend(handles=handles, loc="center left", frameon=False, fontsize=8.5, labelcolor=INK)


def number(value: object) -> float:
    """A cell of a row, which is text when it was read from a CSV."""
    return float(str(value))


def three_digits(value: float) -> str:
    """1.36, 27.8, 438."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if 0 < value < 1000 else f"{value:.0f}"
