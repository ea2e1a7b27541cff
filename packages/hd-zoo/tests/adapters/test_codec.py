"""Autoencoders of diffusers as codecs, and the identity."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize("options", [{}, {"scale": 2.0, "shift": -0.1}])
def test_deep_compression(make_dc: Any, options: dict[str, float]) -> None:
    autoencoder = make_dc()
    codec = AutoencoderCodec(autoencoder, **options)
    assert isinstance(codec, Codec)
    scale, shift = options.get("scale", 0.41), options.get("shift", 0.0)
    images = torch.randn(2, 3, 16, 16)
    latents = codec.encode(images)
    assert latents.shape == (2, 4, 8, 8)
    torch.testing.assert_close(latents, (autoencoder.encode(images).latent - shift) * scale)
    torch.testing.assert_close(codec.decode(latents), autoencoder.decode(latents / scale + shift).sample)


def test_given_scale_and_shift_come_first(make_kl: Any) -> None:
    autoencoder = make_kl(scaling_factor=0.4, shift_factor=0.3)
    images = torch.randn(2, 3, 16, 16)
    z = autoencoder.encode(images).latent_dist.mean
    torch.testing.assert_close(AutoencoderCodec(autoencoder, scale=2.0, shift=0.0).encode(images), 2 * z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_every_channel(make_kl: Any, dtype: torch.dtype) -> None:
    """As diffusers' own pipelines take them: latents of mean 0 and of spread 1, times scaling_factor."""
    mean, std = [0.5, -1.0, 0.25, 2.0], [2.0, 0.5, 1.5, 3.0]
    autoencoder = make_kl(scaling_factor=0.4, latents_mean=mean, latents_std=std).to(dtype)
    codec, images = AutoencoderCodec(autoencoder), torch.randn(2, 3, 16, 16).to(dtype)
    z = autoencoder.encode(images).latent_dist.mean
    latents = codec.encode(images)
    assert latents.dtype == dtype
    by_channel = [(z[:, c] - mean[c]) / std[c] * 0.4 for c in range(4)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(latents, torch.stack(by_channel, dim=1), atol=tolerance, rtol=tolerance)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(codec.decode(latents), autoencoder.decode(z).sample, atol=tolerance, rtol=tolerance)
    scaled = AutoencoderCodec(autoencoder, scale=std, shift=0.0).encode(images)
    torch.testing.assert_close(scaled, (z.float() * torch.tensor(std)[:, None, None]).to(dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("inf")}, "scale must be a finite number, or 4, one per latent channel; got inf"),
        ({"scale": [1.0, 2.0]}, "scale must be a finite number, or 4, one per latent channel; got [1.0, 2.0]"),
        ({"shift": float("nan")}, "shift must be a finite number, or 4, one per latent channel; got nan"),
        ({"scale": [1.0, 1.0, -1.0, 1.0]}, "scale must be > 0; got [1.0, 1.0, -1.0, 1.0]"),
    ],
    ids=str,
)
def test_impossible_scales(make_kl: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AutoencoderCodec(make_kl(), **options)


def test_a_spread_of_zero_and_numbers_of_other_kinds(make_kl: Any) -> None:
    with pytest.raises(ValueError, match="latents_std of the configuration must be > 0"):
        AutoencoderCodec(make_kl(latents_mean=[0.0] * 4, latents_std=[1.0, 0.0, 1.0, 1.0]))
    assert AutoencoderCodec(make_kl(), scale=torch.tensor(0.5)).scale == (0.5,)


@pytest.mark.parametrize("kind", ["kl", "dc"])
def test_gradients_reach_images_and_latents_but_not_the_weights(kind: str, make_kl: Any, make_dc: Any) -> None:
    codec = AutoencoderCodec((make_kl if kind == "kl" else make_dc)().train())
    assert not codec.autoencoder.training
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    latents = codec.encode(images)
    codec.decode(latents).square().sum().backward()
    assert images.grad.abs().sum() > 0
    latents = latents.detach().requires_grad_()
    codec.decode(latents).square().sum().backward()
    assert latents.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in codec.parameters())


def test_from_a_folder(make_kl: Any, tmp_path: Path) -> None:
    autoencoder = make_kl(scaling_factor=0.5)
    autoencoder.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(load_codec(tmp_path).encode(images), AutoencoderCodec(autoencoder).encode(images))
    with pytest.raises(ValueError, match="kind must be AutoencoderKL or AutoencoderDC; got 'VQModel'"):
        load_codec(tmp_path, kind="VQModel")
    with pytest.raises(ValueError, match=r"scale must be > 0; got 0\.0"):
        AutoencoderCodec(autoencoder, scale=0.0)


def test_deep_compression_from_a_folder_in_half_precision(make_dc: Any, tmp_path: Path) -> None:
    autoencoder = make_dc()
    autoencoder.save_pretrained(tmp_path / "vae")
    codec = load_codec(tmp_path, kind="AutoencoderDC", dtype=torch.bfloat16, subfolder="vae")
    assert {parameter.dtype for parameter in codec.parameters()} == {torch.bfloat16}
    assert codec.scale == (0.41,)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    latents = codec.encode(images.bfloat16())
    assert latents.dtype == codec.decode(latents).dtype == torch.bfloat16
    expected = AutoencoderCodec(autoencoder).encode(images)
    assert (latents.float() - expected).abs().max() < 0.05 * expected.abs().max()
