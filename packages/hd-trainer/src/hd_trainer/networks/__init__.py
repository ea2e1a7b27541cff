"""The one place that knows what a network is: teachers and students are made, loaded, guided, sampled, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hd_trainer.data import Dataset
from hd_trainer.networks.fields import (
    cost_of,
    counted_multiply_adds,
    fresh_network,
    guided,
    inner_layers,
    is_student,
    sampler,
)
from hd_trainer.networks.folders import CONFIG, WEIGHTS, check_fits, load_vision_model, save_network, weights_digest
from hd_trainer.networks.settings import GuidanceSettings, ModelSettings
from hd_trainer.networks.sources import TEACHERS, is_folder_of_ours, load_teacher, read_network, resolve, source_digest
from hd_trainer.networks.students import check_student, make_student

__all__ = [
    "CONFIG",
    "TEACHERS",
    "WEIGHTS",
    "GuidanceSettings",
    "ModelSettings",
    "check_student",
    "cost_of",
    "counted_multiply_adds",
    "fresh_network",
    "guided",
    "inner_layers",
    "is_folder_of_ours",
    "is_student",
    "load_network",
    "load_teacher",
    "load_vision_model",
    "make_student",
    "read_network",
    "resolve",
    "sampler",
    "save_network",
    "source_digest",
    "weights_digest",
]


def load_network(source: str | Path, data: Dataset, device: torch.device) -> nn.Module:
    """As :func:`read_network`, checked against the data: a student or a teacher.

    Raises:
        UserError: also if it was made for other samples.
    """
    network: Any = read_network(source, device)
    check_fits(network, str(source), data, device)
    return network
