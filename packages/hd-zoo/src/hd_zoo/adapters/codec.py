"""Pictures to latents and back: one small contract, the identity for pixels, and the autoencoders of diffusers."""

from __future__ import annotations

import os
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
        scale, shift: None takes ``scaling_factor`` and ``shift_factor`` of its configuration (0 without the latter).
    """

    autoencoder: Any

    def __init__(self, autoencoder: nn.Module, scale: float | None = None, shift: float | None = None) -> None:
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        config = self.autoencoder.config
        self.scale = float(config.scaling_factor if scale is None else scale)
        self.shift = float((getattr(config, "shift_factor", None) or 0.0) if shift is None else shift)
        if not self.scale > 0:
            raise ValueError(f"scale must be > 0; got {self.scale}")

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, c, h, w)."""
        encoded = self.autoencoder.encode(images)
        z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        return (z - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, 3, H, W), about [-1, 1]."""
        images: Tensor = self.autoencoder.decode(latents / self.scale + self.shift).sample
        return images


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
