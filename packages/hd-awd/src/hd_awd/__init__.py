"""Stage 2, the adversarial part: the Adaptive Weighted Discriminator and its pooling (arXiv 2511.08930)."""

from hd_awd.config import DiscriminatorConfig
from hd_awd.discriminator import Discriminator
from hd_awd.features import FeatureTap, as_tokens
from hd_awd.heads import PoolingHead
from hd_awd.layers import default_layers
from hd_awd.losses import approximate_r1, discriminator_loss, generator_loss
from hd_awd.pooling import attention_pool, why_not_triton

__version__ = "0.1.0"

__all__ = [
    "Discriminator",
    "DiscriminatorConfig",
    "FeatureTap",
    "PoolingHead",
    "approximate_r1",
    "as_tokens",
    "attention_pool",
    "default_layers",
    "discriminator_loss",
    "generator_loss",
    "why_not_triton",
]
