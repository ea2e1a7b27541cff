"""Distances between two sets of feature vectors. All in float64; all pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the distance of FID (arXiv 1706.08500).

    Args:
        a, b: features (N, F) and (M, F), N and M >= 2. Falls like 1/N with the number of samples: compare only at
            equal N, beside the real-against-real floor.
    """
    a, b = _features(a, b)
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    cov_a, cov_b = a.T.cov(), b.T.cov()
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2): two symmetric problems in place of a general one.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID: the unbiased squared MMD with k(x, y) = (x . y / F + 1)^3 (arXiv 1801.01401), over all samples at once.

    Args:
        a, b: features (N, F) and (M, F), N and M >= 2. Its expectation does not depend on N or M; it may be < 0.
    """
    a, b = _features(a, b)
    n, m = len(a), len(b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    within_a, within_b = kernel(a, a), kernel(b, b)
    return float(
        (within_a.sum() - within_a.trace()) / (n * (n - 1))
        + (within_b.sum() - within_b.trace()) / (m * (m - 1))
        - 2 * kernel(a, b).mean()
    )


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991).

    Precision is the share of fake samples inside some real sample's ball, whose radius is the distance to that
    sample's k-th nearest real neighbour; recall is the same with the roles exchanged.

    Args:
        real, fake: features (N, F) and (M, F), more than k of each.
    """
    real, fake = _features(real, fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"more than k = {k} samples are needed on both sides; got {len(real)} and {len(fake)}")
    between = torch.cdist(real, fake)
    # The nearest neighbour of a sample in its own set is itself: hence k + 1.
    radius_real = torch.cdist(real, real).kthvalue(k + 1, dim=1).values
    radius_fake = torch.cdist(fake, fake).kthvalue(k + 1, dim=1).values
    precision = (between <= radius_real[:, None]).any(dim=0).double().mean()
    recall = (between <= radius_fake[None]).any(dim=1).double().mean()
    return float(precision), float(recall)


def _features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for features in (a, b):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != a.shape[1]:
            raise ValueError(f"features must be (N, F) with N >= 2 and one F; got {tuple(a.shape)}, {tuple(b.shape)}")
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("features must be finite: a network or its samples have diverged")
    return a.double(), b.double()
