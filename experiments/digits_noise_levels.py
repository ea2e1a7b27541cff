"""Which noise levels for distribution matching: U[0.02, 0.98] in t, or DMD2's law, from the same stage 1.

    hatch run experiment digits-noise-levels

Needs the runs of digits-seeds ("uniform" rows are theirs). Trains stage 2 once more per seed and law, with all other
settings alike, into runs/noise_levels/<law>-<seed>, and writes results/digits_noise_levels.csv.
"""

from __future__ import annotations

from pathlib import Path

from experiments.stage_two import compare

RECIPES = Path(__file__).parent / "recipes.py"
VARIANTS = {"dmd2": [f"{RECIPES}:dmd2_levels"], "wide-fake-score": [f"{RECIPES}:wide_fake_score"]}


def main(arguments: list[str]) -> None:
    compare("noise_levels", VARIANTS, "uniform", arguments)
