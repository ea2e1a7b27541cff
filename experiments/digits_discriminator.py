"""What the discriminator adds in stage 2: none, GAP and AWD from the same teacher and the same stage 1.

    hatch run experiment digits-discriminator

Needs the runs of digits-seeds (AWD's rows are theirs). Trains stage 2 once more per seed and variant, with all other
settings alike, into runs/discriminator/<variant>-<seed>, and writes results/digits_discriminator.csv.
"""

from __future__ import annotations

from experiments.stage_two import compare

VARIANTS = {
    "none": ["digits", "--distribution.discriminator.gan-weight", "0"],
    "gap": ["digits", "--distribution.discriminator.pooling", "mean"],
}


def main(arguments: list[str]) -> None:
    compare("discriminator", VARIANTS, "awd", arguments)
