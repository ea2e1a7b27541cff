"""Distances between two sets of feature vectors. All in float64, in blocks of rows; all pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Rows of a block: of 10,000 others its distances take 160 MB.
ROWS = 2_000


@dataclass(frozen=True)
class Moments:
    """Mean (F,) and covariance (F, F) of feature vectors, float64, and how many there were."""

    mean: Tensor
    covariance: Tensor
    count: int


def moments(parts: Iterable[Tensor]) -> Moments:
    """Moments of features that come in parts (B, F): no more than one part is held at a time.

    Raises:
        ValueError: for fewer than two vectors in all, or values that are not finite.
    """
    count, origin, total, products = 0, torch.zeros(0), torch.zeros(0), torch.zeros(0)
    for part in parts:
        part = part.double()
        if not count:  # Sums around a typical vector: the mean's square must not drown the variance.
            origin = part.mean(dim=0)
            total, products = torch.zeros_like(origin), origin.new_zeros(len(origin), len(origin))
        for block in part.split(ROWS):
            centred = block - origin
            total += centred.sum(dim=0)
            products += centred.T @ centred
        count += len(part)
    if count < 2:
        raise ValueError(f"features must be (N, F) with N >= 2; got {count}")
    if not bool(torch.isfinite(products).all()):
        raise ValueError("features must be finite: a network or its samples have diverged")
    mean = total / count
    return Moments(origin + mean, (products - count * mean[:, None] * mean) / (count - 1), count)


def square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric positive semi-definite matrix, by its eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_of_moments(a: Moments, b: Moments, root: Tensor | None = None) -> float:
    """:func:`frechet_distance` of sets known by their moments; ``root`` is the square root of a's covariance."""
    root = square_root(a.covariance) if root is None else root
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2): two symmetric problems in place of a general one.
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the distance of FID (arXiv 1706.08500).

    Args:
        a, b: features (N, F) and (M, F), N and M >= 2. Falls like 1/N with the number of samples: compare only at
            equal N, beside the real-against-real floor.
    """
    a, b = _features(a, b)
    return frechet_of_moments(moments([a]), moments([b]))


@dataclass(frozen=True)
class Within:
    """What a set of features has by itself: computed once for a reference that many sets are held against."""

    features: Tensor
    """(N, F) float64"""
    kernel: float
    """sum of k(x, y) over all pairs of two different samples"""
    radii: dict[int, Tensor]
    """by k: each sample's distance to its k-th nearest neighbour (N,); inf where there are no more than k samples"""


def within(features: Tensor, ks: tuple[int, ...] = (3, 5)) -> Within:
    """Kernel sum and neighbour radii of features (N, F), block by block.

    Raises:
        ValueError: for another shape, or values that are not finite.
    """
    features, _ = _features(features, features)
    # The nearest neighbour of a sample in its own set is itself: hence k + 1.
    most, kernel, found = min(max(ks) + 1, len(features)), 0.0, []
    for block in features.split(ROWS):
        products = block @ features.T
        kernel += float(_kernel(products, features.shape[1]).sum())
        found.append(_distances(block, features, products).topk(most, dim=1, largest=False).values)
    nearest = torch.cat(found)
    own = _kernel(features.square().sum(dim=1), features.shape[1]).sum()
    never = torch.full((len(features),), torch.inf, dtype=torch.float64)
    return Within(features, kernel - float(own), {k: nearest[:, k] if k < most else never for k in ks})


@dataclass(frozen=True)
class Comparison:
    """Scores of a set against a reference; None where one of the two has too few samples."""

    kid: float
    precision: float | None
    recall: float | None
    density: float | None
    coverage: float | None


def compare(real: Within, fake: Within, k: int = 3, density_k: int = 5) -> Comparison:
    """All that the distances between two sets tell, in one pass over them.

    * KID: the unbiased squared MMD with k(x, y) = (x . y / F + 1)^3 (arXiv 1801.01401). It may be < 0.
    * Precision and recall (arXiv 1904.06991): the share of fake samples inside some real sample's ball, whose radius
      is the distance to its k-th nearest real neighbour; recall is the same with the roles exchanged.
    * Density and coverage (arXiv 2002.09797, equations 3 and 4): the number of real balls a fake sample lies in, over
      k, averaged; the share of real samples with a fake one in their ball. ``density_k`` is that paper's choice.
    """
    n, m, width = len(real.features), len(fake.features), real.features.shape[1]
    if fake.features.shape[1] != width:
        raise ValueError(f"features must be (N, F) with one F; got {width} and {fake.features.shape[1]}")
    between, dense = 0.0, 0
    precise = torch.zeros(m, dtype=torch.bool)
    recalled, covered = [], []
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        products = real.features[rows] @ fake.features.T
        between += float(_kernel(products, width).sum())
        distances = _distances(real.features[rows], fake.features, products)
        precise |= (distances <= real.radii[k][rows, None]).any(dim=0)
        recalled.append((distances <= fake.radii[k]).any(dim=1))
        # Strictly less: as the paper's equations have it.
        inside = distances < real.radii[density_k][rows, None]
        dense += int(inside.sum())
        covered.append(inside.any(dim=1))
    return Comparison(
        kid=fake.kernel / (m * (m - 1)) + real.kernel / (n * (n - 1)) - 2 * between / (n * m),
        precision=_share(precise) if n > k else None,
        recall=_share(torch.cat(recalled)) if m > k else None,
        density=dense / (density_k * m) if n > density_k else None,
        coverage=_share(torch.cat(covered)) if n > density_k else None,
    )


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID of features (N, F) and (M, F), N and M >= 2, over all samples at once; see :func:`compare`."""
    a, b = _features(a, b)
    return compare(within(b), within(a)).kid


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of features (N, F) and (M, F), more than k of each; see :func:`compare`."""
    real, fake = _features(real, fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"more than k = {k} samples are needed on both sides; got {len(real)} and {len(fake)}")
    found = compare(within(real, (k, 5)), within(fake, (k, 5)), k)
    assert found.precision is not None
    assert found.recall is not None
    return found.precision, found.recall


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage of features (N, F) and (M, F), more than k real ones; see :func:`compare`."""
    real, fake = _features(real, fake)
    if len(real) <= k:
        raise ValueError(f"more than k = {k} real samples are needed; got {len(real)}")
    found = compare(within(real, (3, k)), within(fake, (3, k)), density_k=k)
    assert found.density is not None
    assert found.coverage is not None
    return found.density, found.coverage


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)) (arXiv 1606.03498), over all samples at once: no splits [ours].

    Args:
        logits: (N, classes).
    """
    log_p = logits.double().log_softmax(dim=1)
    marginal = log_p.logsumexp(dim=0) - torch.tensor(float(len(log_p)), dtype=torch.float64).log()
    return float((log_p.exp() * (log_p - marginal)).sum(dim=1).mean().exp())


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1) ** 3


def _distances(a: Tensor, b: Tensor, products: Tensor) -> Tensor:
    """|x - y| from the inner products, which the kernel needs as well."""
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * products
    return squares.clamp_(min=0).sqrt_()


def _share(which: Tensor) -> float:
    return float(which.double().mean())


def _features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for features in (a, b):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != a.shape[1]:
            raise ValueError(f"features must be (N, F) with N >= 2 and one F; got {tuple(a.shape)}, {tuple(b.shape)}")
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("features must be finite: a network or its samples have diverged")
    return a.double(), b.double()
