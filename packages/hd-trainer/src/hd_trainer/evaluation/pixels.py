"""Samples as they are measured: decoded, rounded to storable levels; and the hash of a whole split of them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from hd_trainer.data import Dataset, Split, pictures
from hd_trainer.images import from_levels, quantise, to_levels

#: Samples read at a time.
AT_ONCE = 500


def as_measured(data: Dataset, samples: Tensor) -> Tensor:
    """What extractors see: pictures in [-1, 1] rounded as a file would; samples that are no pictures, as they are."""
    if data.holds_images:
        return quantise(samples, data.grey_levels)
    return samples if data.decode is None else quantise(pictures(data, samples), 256)


def stored(data: Dataset, samples: Tensor) -> Tensor:
    """Samples on the CPU, as small as they are kept without loss: images as uint8 levels, others in float32."""
    small = data.holds_images and data.grey_levels <= 256
    return to_levels(samples, data.grey_levels).cpu() if small else samples.float().cpu()


def restored(data: Dataset, samples: Tensor) -> Tensor:
    """Samples as float32 out of :func:`stored`."""
    return from_levels(samples, data.grey_levels) if samples.dtype == torch.uint8 else samples


def split_digest(data: Dataset, split: Split) -> str:
    """SHA-256 over samples and conditions of a split, read in parts."""
    found = hashlib.sha256(json.dumps([data.grey_levels, list(data.shape), len(split)]).encode())
    for index in torch.arange(len(split)).split(AT_ONCE):
        batch = split.read(index)
        found.update(stored(data, batch.x).contiguous().numpy().tobytes())
        for name in sorted(batch.cond):
            found.update(name.encode() + batch.cond[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def key_of(*parts: Any) -> str:
    """A short hash of plain JSON values, for a name in the cache folder."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
