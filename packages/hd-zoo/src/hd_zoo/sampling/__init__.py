"""Samplers as plain functions: they go from noise at t = 1 to data at t = 0 and know nothing of networks."""

from hd_zoo.sampling.ancestral import sample_ancestral
from hd_zoo.sampling.dopri5 import integrate_dopri5
from hd_zoo.sampling.jumps import sample_jumps
from hd_zoo.sampling.noise import NoiseStreams, seeded_noise
from hd_zoo.sampling.ode import sample_ode
from hd_zoo.sampling.sde import sample_sde
from hd_zoo.sampling.times import renoised_times, restarted_times, shift_times, uniform_times

__all__ = [
    "NoiseStreams",
    "integrate_dopri5",
    "renoised_times",
    "restarted_times",
    "sample_ancestral",
    "sample_jumps",
    "sample_ode",
    "sample_sde",
    "seeded_noise",
    "shift_times",
    "uniform_times",
]
