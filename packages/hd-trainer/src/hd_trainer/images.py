"""Pictures of tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hd_trainer.files import write_atomically


def quantise(images: Tensor, levels: int) -> Tensor:
    """Round images in [-1, 1] to the ``levels`` values a stored pixel can take, out-of-range ones clipped."""
    top = levels - 1
    return ((images + 1) / 2 * top).round().clamp(0, top) / top * 2 - 1


def tile(images: Tensor, columns: int, *, gap: int = 1, scale: int = 1) -> Image.Image:
    """Images (N, 1 or 3, H, W) in [-1, 1] as one picture, row by row, ``gap`` grey pixels apart, enlarged blockwise."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 128, dtype=np.uint8)
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for index, pixel in enumerate(pixels.expand(-1, 3, -1, -1) if channels == 1 else pixels):
        top, left = (index // columns) * (height + gap) + gap, (index % columns) * (width + gap) + gap
        canvas[top : top + height, left : left + width] = pixel.permute(1, 2, 0).numpy()
    picture = Image.fromarray(canvas)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_grid(images: Tensor, path: Path, columns: int = 10) -> None:
    """Write :func:`tile` as PNG, small images enlarged to about 32 pixels a side."""
    scale = max(1, 32 // images.shape[-1])
    picture = tile(images, columns, scale=scale)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
