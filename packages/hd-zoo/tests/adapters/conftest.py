"""Tiny random networks of diffusers; skipped where it is not installed."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def diffusers() -> Any:
    """The library; its own import warnings are no concern of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


@pytest.fixture
def make_dit(diffusers: Any) -> Any:
    """A DiTTransformer2DModel as official weights are converted: one embedding, copied into every block."""

    def make(head_width: int = 8, **settings: Any) -> Any:
        torch.manual_seed(0)
        sizes = {"num_attention_heads": 2, "in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8}
        settings = {**sizes, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_eps": 1e-6, **settings}
        model = diffusers.DiTTransformer2DModel(attention_head_dim=head_width, **settings).eval()
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
        return model

    return make


@pytest.fixture
def make_sana(diffusers: Any) -> Any:
    def make(**settings: Any) -> Any:
        torch.manual_seed(0)
        sizes = {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
        }
        cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
        rest = {"caption_channels": 12, "sample_size": 8}
        return diffusers.SanaTransformer2DModel(**{**sizes, **cross, **rest, **settings}).eval()

    return make


@pytest.fixture
def all_double(diffusers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers makes its sinusoids and Sana's attention in float32 whatever the dtype.

    Here both are in float64, so that tolerances can be tight and difference quotients are smooth.
    """

    def sinusoids(
        timesteps: Tensor,
        embedding_dim: int,
        flip_sin_to_cos: bool = False,
        downscale_freq_shift: float = 1,
        scale: float = 1,
        max_period: int = 10_000,
    ) -> Tensor:
        half = embedding_dim // 2
        exponents = torch.arange(half, dtype=torch.float64) / (half - downscale_freq_shift)
        angles = scale * timesteps.double()[:, None] * torch.exp(-math.log(max_period) * exponents)
        waves = [angles.sin(), angles.cos()]
        return torch.cat(waves[::-1] if flip_sin_to_cos else waves, dim=-1)

    from diffusers.models import embeddings

    monkeypatch.setattr(embeddings, "get_timestep_embedding", sinusoids)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def make_dc(diffusers: Any) -> Any:
    """An AutoencoderDC that halves the sides."""

    def make(**settings: Any) -> Any:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"latent_channels": 4, "attention_head_dim": 4}
        for part in ("encoder", "decoder"):
            sizes |= {
                f"{part}_block_types": "ResBlock",
                f"{part}_block_out_channels": (8, 16),
                f"{part}_layers_per_block": (1, 1),
                f"{part}_qkv_multiscales": ((), ()),
            }
        return diffusers.AutoencoderDC(**{**sizes, "scaling_factor": 0.41, **settings}).eval()

    return make


@pytest.fixture
def trained(make_sana: Any) -> Any:
    """A student of Sana whose interval matters; settings are the network's."""
    from hd_zoo.adapters import SanaField, to_sana_student

    def make(**settings: Any) -> Any:
        student = to_sana_student(SanaField(make_sana(**settings)))
        with torch.no_grad():
            for parameter in student.model.time_embed.interval.mlp[2].parameters():
                parameter.normal_(std=0.5)
        return student

    return make
