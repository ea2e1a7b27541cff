"""Networks, guidance, samplers and checkpoints for Hierarchical Distillation (arXiv 2511.08930)."""

from hd_zoo.field import Described, Field
from hd_zoo.networks.attention import attention_backend, set_attention_backend, why_not_xformers
from hd_zoo.networks.cost import Cost, model_cost
from hd_zoo.networks.mlp import MLPField
from hd_zoo.networks.transformer import DiffusionTransformer
from hd_zoo.registry import create_model, list_models
from hd_zoo.sampling import (
    integrate_dopri5,
    renoised_times,
    restarted_times,
    sample_ancestral,
    sample_jumps,
    sample_ode,
    sample_sde,
    seeded_noise,
    shift_times,
    uniform_times,
)
from hd_zoo.student import add_interval, to_student
from hd_zoo.teacher import check_teacher
from hd_zoo.weights.folders import from_pretrained, read_config, save_pretrained
from hd_zoo.weights.published import load_published
from hd_zoo.wrappers.convert import DataPrediction, DiffusedNoise, EDMDenoiser, NoisePrediction, ReversedTime
from hd_zoo.wrappers.guidance import Guidance
from hd_zoo.wrappers.wrapper import layer_name, network_inside

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "DataPrediction",
    "Described",
    "DiffusedNoise",
    "DiffusionTransformer",
    "EDMDenoiser",
    "Field",
    "Guidance",
    "MLPField",
    "NoisePrediction",
    "ReversedTime",
    "add_interval",
    "attention_backend",
    "check_teacher",
    "create_model",
    "from_pretrained",
    "integrate_dopri5",
    "layer_name",
    "list_models",
    "load_published",
    "model_cost",
    "network_inside",
    "read_config",
    "renoised_times",
    "restarted_times",
    "sample_ancestral",
    "sample_jumps",
    "sample_ode",
    "sample_sde",
    "save_pretrained",
    "seeded_noise",
    "set_attention_backend",
    "shift_times",
    "to_student",
    "uniform_times",
    "why_not_xformers",
]
