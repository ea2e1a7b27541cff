"""What samples are held against: features of the training split, computed once and kept; its nearest pictures."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hd_trainer.data import Dataset, Split
from hd_trainer.data.source import cache_folder
from hd_trainer.evaluation.distances import (
    Moments,
    Within,
    compare,
    frechet_of_moments,
    inception_score,
    moments,
    square_root,
    within,
)
from hd_trainer.evaluation.extractors import Extractor, extract, extract_parts
from hd_trainer.evaluation.pixels import AT_ONCE, as_measured, key_of, split_digest
from hd_trainer.files import make_folder, read_tensors, write_tensors
from hd_trainer.progress import progress

#: Part of every key of kept features: another number when what is below changes them.
RULE = 1
#: Reference pictures, evenly spread over the training split, that neighbour distances and KID are computed with [ours].
MANIFOLD = 10_000
#: Training samples of which the nearest is looked for, and generated samples for which it is [ours].
NEAREST_OF, NEAREST_FOR = 50_000, 2_000


@dataclass(frozen=True)
class Reference:
    """A reference in one extractor's features."""

    extractor: Extractor
    moments: Moments
    """of the whole split"""
    features: Tensor | None
    """(M, F) of at most MANIFOLD of its pictures; None where statistics alone are known"""

    @functools.cached_property
    def root(self) -> Tensor:
        """Square root of the covariance."""
        return square_root(self.moments.covariance)

    @functools.cached_property
    def within(self) -> Within | None:
        """What the neighbour distances need; None without features."""
        return None if self.features is None else within(self.features)

    def scores(self, images: Iterable[Tensor], labels: Tensor | None) -> dict[str, float | None]:
        """Every measure of pictures in parts (B, C, H, W), rounded, in this extractor; None for what it cannot say.

        Raises:
            ValueError: if features are not finite.
        """
        features, logits = extract_parts(self.extractor, images)
        return {**self.distances(features), **self._by_logits(logits, labels)}

    def distances(self, features: Tensor) -> dict[str, float | None]:
        """The measures that need features (N, F) alone."""
        found: dict[str, float | None] = dict.fromkeys(("kid", "precision", "recall", "density", "coverage"))
        found["fd"] = frechet_of_moments(self.moments, moments([features]), self.root)
        if self.within is not None:
            # At most as many as the reference has: the cost is their product.
            some = features[spread(len(features), MANIFOLD)]
            found.update(vars(compare(self.within, within(some))))
        return found

    def _by_logits(self, logits: Tensor | None, labels: Tensor | None) -> dict[str, float | None]:
        found: dict[str, float | None] = {"inception_score": None, "accuracy": None}
        if logits is not None and bool(logits.any()):
            found["inception_score"] = inception_score(logits)
            if labels is not None and self.extractor.knows_classes:
                found["accuracy"] = float((logits.argmax(dim=1) == labels.cpu()).float().mean())
        return found


def reference_of(data: Dataset, split: Split, extractor: Extractor) -> Reference:
    """Moments and features of a split; out of the cache folder where the extractor's may be kept there."""
    if not extractor.keeps or data.decode is not None:  # no hash knows what a decoder does
        return _computed(data, split, extractor)
    key = key_of("features", RULE, MANIFOLD, split_digest(data, split), extractor.facts())
    path = cache_folder() / "features" / f"{key}.safetensors"
    if (kept := _kept(path, extractor)) is not None:
        return kept
    found = _computed(data, split, extractor)
    assert found.features is not None
    make_folder(path.parent)
    write_tensors(
        path,
        {
            "mean": found.moments.mean,
            "covariance": found.moments.covariance,
            "count": torch.tensor(found.moments.count),
            "features": found.features,
        },
    )
    return found


def _kept(path: Any, extractor: Extractor) -> Reference | None:
    """What was kept; None if nothing was, or it is damaged."""
    if not path.is_file():
        return None
    try:
        found = read_tensors(path)
        width = (extractor.width,)
        fits = found["mean"].shape == width and found["covariance"].shape == width * 2
        fits = fits and found["features"].shape[1:] == width and bool(torch.isfinite(found["features"]).all())
        count = int(found["count"])
    except (ValueError, KeyError, RuntimeError, SafetensorError):
        return None
    return Reference(extractor, Moments(found["mean"], found["covariance"], count), found["features"]) if fits else None


def _computed(data: Dataset, split: Split, extractor: Extractor) -> Reference:
    """Read and extracted part by part."""
    chosen = torch.zeros(len(split), dtype=torch.bool)
    chosen[spread(len(split), MANIFOLD)] = True
    some: list[Tensor] = []

    def parts() -> Iterator[Tensor]:
        for index in _bar(torch.arange(len(split)).split(AT_ONCE), f"features {extractor.name}"):
            features, _ = extract(extractor, as_measured(data, split.read(index).x))
            some.append(features[chosen[index]])
            yield features

    found = moments(parts())
    return Reference(extractor, found, torch.cat(some))


def _bar(parts: tuple[Tensor, ...], name: str) -> Any:
    """A progress bar where it takes long."""
    return progress(parts, desc=name, unit="part", leave=False, disable=len(parts) < 10)


def spread(number: int, most: int) -> Tensor:
    """Indices of at most ``most`` of ``number``, evenly spread, in order; all where there are no more."""
    return torch.arange(number) if number <= most else torch.arange(most) * number // most


def nearest_training(samples: Tensor, split: Split, limit: int = NEAREST_OF) -> tuple[Tensor, Tensor]:
    """(distance, index) of the nearest of a split's first ``limit`` samples, both (N,), read part by part.

    Args:
        samples: (N, C, H, W) float32.
    """
    flat = samples.flatten(1)
    distance, index = torch.full((len(flat),), torch.inf), torch.zeros(len(flat), dtype=torch.long)
    for rows in torch.arange(min(limit, len(split))).split(2_000):
        found, place = torch.cdist(flat, split.read(rows).x.flatten(1)).min(dim=1)
        closer = found < distance
        distance = torch.where(closer, found, distance)
        index = torch.where(closer, rows[place], index)
    return distance, index
