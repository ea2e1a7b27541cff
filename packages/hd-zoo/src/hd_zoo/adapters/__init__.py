"""Networks and autoencoders of the diffusers library behind this package's contracts (extra ``[diffusers]``).

Importing this needs diffusers only where a function builds something of it.
"""

from hd_zoo.adapters.codec import AutoencoderCodec, Codec, IdentityCodec, load_codec
from hd_zoo.adapters.diffusers_field import DiffusersField
from hd_zoo.adapters.dit import DiTNoise, from_diffusers_dit, load_diffusers_dit
from hd_zoo.adapters.load import from_diffusers, velocity_field
from hd_zoo.adapters.sana import SanaField, export_sana_pipeline, load_sana, to_sana_student

__all__ = [
    "AutoencoderCodec",
    "Codec",
    "DiTNoise",
    "DiffusersField",
    "IdentityCodec",
    "SanaField",
    "export_sana_pipeline",
    "from_diffusers",
    "from_diffusers_dit",
    "load_codec",
    "load_diffusers_dit",
    "load_sana",
    "to_sana_student",
    "velocity_field",
]
