"""Pictures to latents and back: one small contract, the identity for pixels, and the autoencoders of diffusers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Codec(Protocol):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, c, h, w) of about unit variance, what a field works on."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class IdentityCodec:
    """For networks that work on pixels."""

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class AutoencoderCodec(nn.Module):
    """An autoencoder of diffusers (``AutoencoderKL``, ``AutoencoderDC``), frozen, with its latents' scale and shift.

        latents = (z - shift) * scale

    A KL autoencoder encodes to the mean of its distribution. Gradients flow through to images and latents.

    Args:
        autoencoder: the network.
        scale, shift: a number, or one for every latent channel. None takes them from the configuration: scale =
            ``scaling_factor`` / ``latents_std``, shift = ``latents_mean``, or ``shift_factor``, or 0, as far as they
            are there.

    Raises:
        ValueError: for a scale that is not finite and > 0, a shift that is not finite, or another number of channels.
    """

    autoencoder: Any

    def __init__(
        self,
        autoencoder: nn.Module,
        scale: float | Sequence[float] | None = None,
        shift: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        config = self.autoencoder.config
        if scale is None:
            spread = getattr(config, "latents_std", None)
            if spread is not None and not all(one > 0 for one in spread):
                raise ValueError(f"latents_std of the configuration must be > 0; got {spread}")
            scale = config.scaling_factor if spread is None else [config.scaling_factor / one for one in spread]
        if shift is None:
            mean = getattr(config, "latents_mean", None)
            shift = (getattr(config, "shift_factor", None) or 0.0) if mean is None else mean
        self.scale, self.shift = _per_channel("scale", scale, config), _per_channel("shift", shift, config)
        if not all(one > 0 for one in self.scale):
            raise ValueError(f"scale must be > 0; got {scale}")

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, c, h, w)."""
        encoded = self.autoencoder.encode(images)
        z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        latents: Tensor = (z - _along_channels(self.shift, z)) * _along_channels(self.scale, z)
        return latents.to(z.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, 3, H, W), about [-1, 1]."""
        z = latents / _along_channels(self.scale, latents) + _along_channels(self.shift, latents)
        images: Tensor = self.autoencoder.decode(z.to(latents.dtype)).sample
        return images


def _per_channel(name: str, value: float | Sequence[float], config: Any) -> tuple[float, ...]:
    """One number, or one per latent channel, as a tuple."""
    numbers = tuple(torch.as_tensor(value, dtype=torch.float64).flatten().tolist())
    channels = config.latent_channels
    if len(numbers) not in (1, channels) or not all(math.isfinite(one) for one in numbers):
        raise ValueError(f"{name} must be a finite number, or {channels}, one per latent channel; got {value}")
    return numbers


def _along_channels(numbers: tuple[float, ...], z: Tensor) -> float | Tensor:
    """For arithmetic with z (B, c, h, w): a plain number, or numbers per channel in float32 or better."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    return numbers[0] if len(numbers) == 1 else z.new_tensor(numbers, dtype=dtype)[:, None, None]


def load_codec(
    source: str | os.PathLike[str], *, kind: str = "AutoencoderKL", dtype: torch.dtype | None = None, **options: Any
) -> AutoencoderCodec:
    """A codec from a local folder or an id on the hub.

    Args:
        source: ``stabilityai/sd-vae-ft-ema`` for DiT and SiT, ``mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers`` for Sana.
        kind: "AutoencoderKL" or "AutoencoderDC".
        dtype: of its weights.
        options: of diffusers' ``from_pretrained`` (``subfolder="vae"``, ``revision`` ...).

    Raises:
        ValueError: for another kind.
        ModuleNotFoundError: without diffusers.
    """
    import diffusers

    if kind not in ("AutoencoderKL", "AutoencoderDC"):
        raise ValueError(f"kind must be AutoencoderKL or AutoencoderDC; got {kind!r}")
    autoencoder = getattr(diffusers, kind).from_pretrained(os.fspath(source), torch_dtype=dtype, **options)
    return AutoencoderCodec(autoencoder)
