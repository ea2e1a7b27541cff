"""Pictures of tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hd_trainer.files import write_atomically


def to_levels(images: Tensor, grey_levels: int) -> Tensor:
    """Images in [-1, 1], finite, as the numbers 0 .. grey_levels - 1 of stored pixels, out-of-range ones clipped.

    uint8, or int64 where there are more than 256 levels.
    """
    top = grey_levels - 1
    levels = ((images + 1) / 2 * top).round().clamp(0, top)
    return levels.to(torch.uint8 if grey_levels <= 256 else torch.int64)


def from_levels(levels: Tensor, grey_levels: int) -> Tensor:
    """Images in [-1, 1], float32, of what :func:`to_levels` gave."""
    return levels.float() / (grey_levels - 1) * 2 - 1


def quantise(images: Tensor, grey_levels: int) -> Tensor:
    """Round images in [-1, 1] to the ``grey_levels`` values a stored pixel can take, out-of-range ones clipped."""
    return from_levels(to_levels(images, grey_levels), grey_levels)


def as_rgb(images: Tensor) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] -> (N, 3, H, W).

    Grey ones are repeated. Of any other number of channels (latents without a decoder) the first three are shown (the
    last is repeated where there are two), divided by three standard deviations.
    """
    channels = images.shape[1]
    if channels == 1:
        return images.expand(-1, 3, -1, -1)
    if channels == 3:
        return images
    first = images[:, [0, min(1, channels - 1), min(2, channels - 1)]].float()
    return first / (3 * first.std().clamp(min=1e-6))


def tile(images: Tensor, columns: int, *, gap: int = 1, scale: int = 1) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1] as one picture, row by row, ``gap`` grey pixels apart, enlarged blockwise."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 128, dtype=np.uint8)
    pixels = ((as_rgb(images.detach().float().cpu()).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for index, pixel in enumerate(pixels):
        top, left = (index // columns) * (height + gap) + gap, (index % columns) * (width + gap) + gap
        canvas[top : top + height, left : left + width] = pixel.permute(1, 2, 0).numpy()
    picture = Image.fromarray(canvas)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_grid(images: Tensor, path: Path, columns: int = 10) -> None:
    """Write :func:`tile` as PNG, small images enlarged to about 32 pixels a side."""
    scale = max(1, 32 // images.shape[-1])
    picture = tile(images, columns, scale=scale)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
