"""Converters at the door: other predictions, noise schedules and time directions, made into our velocity field.

Ours is the linear path x_t = (1 - t) x + t eps with t = 0 data and t = 1 noise, v = eps - x. A converter shows the
network what it was trained on and turns its answer into v. Time r goes through the same clock as t to a network that
says ``takes_r = True`` (a student of :func:`hd_zoo.to_student`, which starts as the teacher behind the same converter);
one that says ``takes_r = False`` ignores r and is not shown it; one that says neither cannot be called with r.
"""

from hd_zoo.wrappers.convert.base import Converter
from hd_zoo.wrappers.convert.diffused import DiffusedNoise
from hd_zoo.wrappers.convert.paths import DataPrediction, EDMDenoiser, NoisePrediction, ReversedTime
from hd_zoo.wrappers.convert.schedules import SCHEDULES, alphas_cumprod

__all__ = [
    "CONVERTERS",
    "SCHEDULES",
    "Converter",
    "DataPrediction",
    "DiffusedNoise",
    "EDMDenoiser",
    "NoisePrediction",
    "ReversedTime",
    "alphas_cumprod",
]

#: What a ``config.json`` may name; nothing else is ever constructed from a file.
CONVERTERS: dict[str, type[Converter]] = {
    "reversed_time": ReversedTime,
    "data_prediction": DataPrediction,
    "noise_prediction": NoisePrediction,
    "diffused_noise": DiffusedNoise,
    "edm_denoiser": EDMDenoiser,
}
