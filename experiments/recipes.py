"""Recipes of the experiments: laws of the noise level, which no flag of ``hdistill`` can choose, and other data."""

from __future__ import annotations

import dataclasses

from hd_dmd import KarrasLevels, UniformLevels
from hd_trainer import Settings, load_recipe, rules

#: DMD2's fake score is trained on all levels, its student is updated at 2 % to 98 % of them.
ALL_LEVELS = KarrasLevels(min_step_share=0.0, max_step_share=1.0)


def dmd2_levels() -> Settings:
    """The digits recipe with DMD2's law of the noise level, for the student and for the fake score."""
    return _with(noise_levels=KarrasLevels(), fake_score_noise_levels=ALL_LEVELS)


def wide_fake_score() -> Settings:
    """The digits recipe with the fake score trained on all of [0, 1], the student updated on [0.02, 0.98]."""
    return _with(fake_score_noise_levels=UniformLevels(low=0.0, high=1.0))


def emoji() -> Settings:
    """What ``hdistill new`` writes for the emoji set on two cores."""
    facts = rules.Facts(shape=(3, 32, 32), samples=7_413, classes=9, bf16=True)
    return rules.settings_of(facts, "emoji", "emoji")


def shapes() -> Settings:
    """What ``hdistill new`` writes for the pictures of examples/draw_shapes.py on two cores."""
    facts = rules.Facts(shape=(3, 32, 32), samples=1_800, classes=8, bf16=True)
    return rules.settings_of(facts, "folder:runs/shapes", "shapes")


def _with(**changes: object) -> Settings:
    digits = load_recipe("digits")
    return dataclasses.replace(digits, distribution=dataclasses.replace(digits.distribution, **changes))
