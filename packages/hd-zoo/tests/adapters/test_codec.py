"""Autoencoders of diffusers as codecs, and the identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hd_zoo.adapters import AutoencoderCodec, Codec, IdentityCodec, load_codec


@pytest.fixture
def make_kl(diffusers: Any) -> Any:
    def make(**settings: Any) -> Any:
        torch.manual_seed(0)
        blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
        sizes = {"block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
        return diffusers.AutoencoderKL(**{**blocks, **sizes, **settings}).eval()

    return make


def test_identity() -> None:
    images = torch.randn(2, 3, 4, 4)
    codec = IdentityCodec()
    assert isinstance(codec, Codec)
    assert codec.decode(codec.encode(images)) is images


@pytest.mark.parametrize("shift", [None, 0.3])
def test_scale_and_shift(make_kl: Any, shift: float | None) -> None:
    autoencoder = make_kl(scaling_factor=0.4, shift_factor=shift)
    codec = AutoencoderCodec(autoencoder)
    assert isinstance(codec, Codec)
    images = torch.randn(2, 3, 16, 16)
    z = autoencoder.encode(images).latent_dist.mean
    latents = codec.encode(images)
    torch.testing.assert_close(latents, (z - (shift or 0)) * 0.4)
    torch.testing.assert_close(codec.decode(latents), autoencoder.decode(z).sample, atol=1e-4, rtol=1e-4)


def test_gradients_reach_latents_and_not_the_weights(make_kl: Any) -> None:
    codec = AutoencoderCodec(make_kl())
    latents = torch.randn(1, 4, 16, 16, requires_grad=True)
    codec.decode(latents).square().sum().backward()
    assert latents.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def test_from_a_folder(make_kl: Any, tmp_path: Path) -> None:
    autoencoder = make_kl(scaling_factor=0.5)
    autoencoder.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(load_codec(tmp_path).encode(images), AutoencoderCodec(autoencoder).encode(images))
    with pytest.raises(ValueError, match="kind must be AutoencoderKL or AutoencoderDC; got 'VQModel'"):
        load_codec(tmp_path, kind="VQModel")
    with pytest.raises(ValueError, match=r"scale must be > 0; got 0\.0"):
        AutoencoderCodec(autoencoder, scale=0.0)
