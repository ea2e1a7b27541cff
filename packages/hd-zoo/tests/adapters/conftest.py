"""Tiny random networks of diffusers; skipped where it is not installed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch


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
