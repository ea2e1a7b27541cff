"""Networks, guidance, samplers and checkpoints for Hierarchical Distillation (arXiv 2511.08930)."""

from hd_zoo.checkpoint import from_pretrained, read_config, save_pretrained
from hd_zoo.convert import DataPrediction, NoisePrediction, ReversedTime
from hd_zoo.field import Field
from hd_zoo.guidance import Guidance
from hd_zoo.mlp import MLPField
from hd_zoo.registry import create_model, list_models
from hd_zoo.sampling import sample_jumps, sample_ode, seeded_noise, uniform_times
from hd_zoo.student import to_student
from hd_zoo.transformer import DiffusionTransformer

__version__ = "0.1.0"

__all__ = [
    "DataPrediction",
    "DiffusionTransformer",
    "Field",
    "Guidance",
    "MLPField",
    "NoisePrediction",
    "ReversedTime",
    "create_model",
    "from_pretrained",
    "list_models",
    "read_config",
    "sample_jumps",
    "sample_ode",
    "save_pretrained",
    "seeded_noise",
    "to_student",
    "uniform_times",
]
