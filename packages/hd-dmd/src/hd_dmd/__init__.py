"""Stage 2, distribution matching: gradient, loss and fake score (arXiv 2511.08930, 2405.14867)."""

from hd_dmd.fake_score import FakeScoreOutput, fake_score_loss
from hd_dmd.field import Field
from hd_dmd.levels import KarrasLevels, LevelSampler, LogitNormalLevels, UniformLevels, shift_levels
from hd_dmd.matching import (
    DistributionMatchingLoss,
    DistributionMatchingOutput,
    distribution_matching_gradient,
    noised,
)

__version__ = "0.1.0"

__all__ = [
    "DistributionMatchingLoss",
    "DistributionMatchingOutput",
    "FakeScoreOutput",
    "Field",
    "KarrasLevels",
    "LevelSampler",
    "LogitNormalLevels",
    "UniformLevels",
    "distribution_matching_gradient",
    "fake_score_loss",
    "noised",
    "shift_levels",
]
