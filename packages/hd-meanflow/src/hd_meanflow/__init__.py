"""Stage 1, trajectory distillation: mean-velocity targets and loss (arXiv 2511.08930, 2505.13447)."""

from hd_meanflow.derivative import total_derivative
from hd_meanflow.field import Field
from hd_meanflow.guidance import MeanFlowGuidance, guidance_mixture
from hd_meanflow.loss import MeanFlowLoss, MeanFlowOutput, adaptive_weight, mean_velocity_target
from hd_meanflow.path import conditional_velocity, interpolate, jump
from hd_meanflow.times import LogitNormalTimes, TimeSampler, UniformTimes

__version__ = "0.1.0"

__all__ = [
    "Field",
    "LogitNormalTimes",
    "MeanFlowGuidance",
    "MeanFlowLoss",
    "MeanFlowOutput",
    "TimeSampler",
    "UniformTimes",
    "adaptive_weight",
    "conditional_velocity",
    "guidance_mixture",
    "interpolate",
    "jump",
    "mean_velocity_target",
    "total_derivative",
]
