"""Distances against closed forms, brute force and scipy; the extractor as it is shipped."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hd_trainer.data import InMemory, load_digits, read_all
from hd_trainer.evaluation import distances
from hd_trainer.evaluation.distances import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
)
from hd_trainer.evaluation.extractors import default_names, digits, extract, packages
from hd_trainer.evaluation.extractors.digits import digits_extractor, load_digits_classifier
from hd_trainer.images import quantise


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(count: int, width: int, seed: int) -> Tensor:
    """Correlated features with a mean of their own."""
    return normal(count, width, seed) @ normal(width, width, seed + 1) + normal(1, width, seed + 2)


@pytest.mark.parametrize(("n", "m", "width"), [(50, 70, 5), (200, 90, 12), (20, 30, 40)])
def test_frechet_distance_is_scipys(n: int, m: int, width: int) -> None:
    a, b = mixed(n, width, 0), mixed(m, width, 10)
    root = scipy.linalg.sqrtm(np.cov(a.numpy(), rowvar=False) @ np.cov(b.numpy(), rowvar=False)).real
    mean = a.mean(0) - b.mean(0)
    expected = float(mean @ mean) + np.trace(np.cov(a.numpy().T) + np.cov(b.numpy().T) - 2 * root)
    # With fewer samples than features scipy's root of a singular product is good to 1e-4 at best.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8 if width < n else 1e-3)


def test_frechet_distance_of_moved_and_stretched_data() -> None:
    a = normal(400, 6, 0)
    shift = torch.arange(6.0)
    assert frechet_distance(a, a + shift) == pytest.approx(55.0, abs=1e-8)  # 0 + 1 + 4 + 9 + 16 + 25
    # Same axes: tr(C + s^2 C - 2 s C) = (s - 1)^2 tr C.
    centred = a - a.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * float(a.T.cov().trace()), rel=1e-9)


def test_frechet_distance_tends_to_the_gaussian_closed_form() -> None:
    a, b = normal(100_000, 2, 0), 0.5 * normal(100_000, 2, 1) + 1
    assert frechet_distance(a, b) == pytest.approx(2 * 1 + 2 * (1 - 0.5) ** 2, rel=0.02)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_it_is_symmetric() -> None:
    a, b = mixed(80, 10, 0), mixed(80, 10, 5)
    assert abs(frechet_distance(a, a[torch.randperm(80)])) < 1e-7
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    constant = torch.ones(20, 10)
    assert abs(frechet_distance(constant, constant)) < 1e-12


def brute_kernel_distance(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    between = sum(kernel(x, y) for x in a for y in b) / (n * m)
    return within_a + within_b - 2 * between


def test_kernel_distance_is_the_double_loop() -> None:
    a, b = mixed(13, 4, 0), mixed(9, 4, 7)
    assert kernel_distance(a, b) == pytest.approx(brute_kernel_distance(a, b), rel=1e-10)


def test_kernel_distance_is_unbiased() -> None:
    pool = mixed(4_000, 4, 0)
    pool = pool / pool.std()
    values = torch.tensor([kernel_distance(*part.split(20)) for part in pool.split(40)])
    standard_error = values.std() / math.sqrt(len(values))
    assert abs(values.mean()) < 3 * standard_error  # keeping the diagonals would add about 2 k(x, x) / 20
    assert values.min() < 0 < values.max()
    assert kernel_distance(pool[:200], pool[200:400] + 1) > 3 * values.std()


def brute_precision_recall(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radii = []
        for i, centre in enumerate(centres):
            others = sorted(np.linalg.norm(centre - o) for j, o in enumerate(centres) if j != i)
            radii.append(others[k - 1])
        inside = [any(np.linalg.norm(p - c) <= r + 1e-12 for c, r in zip(centres, radii, strict=True)) for p in points]
        return sum(inside) / len(points)

    return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_the_loops(k: int) -> None:
    real, fake = normal(30, 2, 0), 0.6 * normal(24, 2, 1) + 1.5
    expected = brute_precision_recall(real.numpy(), fake.numpy(), k)
    assert precision_recall(real, fake, k) == pytest.approx(expected, abs=1e-12)
    assert expected[0] != expected[1]
    assert all(0 < value < 1 for value in expected)


def test_precision_and_recall_at_their_ends() -> None:
    real = normal(40, 3, 0)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1_000) == (0.0, 0.0)
    # One mode kept, and it well: all that is made is right, half of what exists is missing.
    modes = torch.cat([real, real + 1_000])
    assert precision_recall(modes, real + 1e-3) == (1.0, 0.5)
    assert precision_recall(real + 1e-3, modes) == (0.5, 1.0)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(5, 20), m=st.integers(5, 20), seed=st.integers(0, 99), scale=st.floats(0.1, 10))
def test_shares_do_not_change_with_scale_or_order(n: int, m: int, seed: int, scale: float) -> None:
    a, b = normal(n, 3, seed), normal(m, 3, seed + 100)
    here = precision_recall(a, b)
    assert precision_recall(a.flip(0) * scale, b.flip(0) * scale) == pytest.approx(here, abs=1e-12)
    assert frechet_distance(a, b) >= -1e-9


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, precision_recall, density_coverage])
def test_impossible_features_are_refused(distance: Any) -> None:
    good = normal(20, 4, 0)
    for bad in (good[0], good[:1], normal(20, 5, 0), good[None]):
        with pytest.raises(ValueError, match=r"\(N, F\)"):
            distance(good, bad)
    broken = good.clone()
    broken[3, 1] = math.nan
    with pytest.raises(ValueError, match="finite"):
        distance(good, broken)


def brute_density_coverage(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    """The definitions' loops (arXiv 2002.09797)."""
    balls = []
    for i, centre in enumerate(real):
        balls.append(sorted(np.linalg.norm(centre - o) for j, o in enumerate(real) if j != i)[k - 1])
    inside = [[np.linalg.norm(f - c) < r for c, r in zip(real, balls, strict=True)] for f in fake]
    density = sum(sum(one) for one in inside) / (k * len(fake))
    return density, sum(any(one[i] for one in inside) for i in range(len(real))) / len(real)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_density_and_coverage_are_the_loops(k: int) -> None:
    real, fake = normal(30, 2, 0), 0.6 * normal(24, 2, 1) + 0.5
    expected = brute_density_coverage(real.numpy(), fake.numpy(), k)
    assert density_coverage(real, fake, k) == pytest.approx(expected, abs=1e-12)
    assert expected[0] > 0
    assert 0 < expected[1] < 1


def test_density_and_coverage_at_their_ends() -> None:
    real = normal(40, 3, 0)
    assert density_coverage(real, real + 1_000) == (0.0, 0.0)
    # All on one sample: dense, and nothing else is covered.
    one = real[real.norm(dim=1).argmin()].expand(30, -1)
    density, coverage = density_coverage(real, one)
    assert density >= 1
    assert coverage < 0.5
    with pytest.raises(ValueError, match="k = 5"):
        density_coverage(real[:5], real)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = mixed(53, 4, 0), mixed(41, 4, 9)
    measures: list[Any] = [frechet_distance, kernel_distance, precision_recall, density_coverage]
    whole = [measure(real, fake) for measure in measures]
    monkeypatch.setattr(distances, "ROWS", 7)
    for measure, expected in zip(measures, whole, strict=True):
        assert measure(real, fake) == pytest.approx(expected, rel=1e-9)


def test_moments_in_parts_are_those_of_the_whole() -> None:
    features = mixed(300, 6, 0) + 1_000  # a mean far from zero must not cost digits
    found = moments(features.split(37))
    torch.testing.assert_close(found.mean, features.mean(dim=0))
    torch.testing.assert_close(found.covariance, features.T.cov(), rtol=1e-9, atol=1e-9)
    assert found.count == 300


def test_the_inception_score_at_its_ends() -> None:
    sure = 1_000.0 * torch.eye(7)[torch.arange(70) % 7]
    assert inception_score(sure) == pytest.approx(7)  # sure, and every class as often
    assert inception_score(sure[:1].expand(20, -1)) == pytest.approx(1)  # sure of one class
    assert inception_score(torch.zeros(20, 7)) == pytest.approx(1)  # not sure of any
    logits = normal(40, 5, 0)
    p = logits.softmax(dim=1).numpy()
    divergence = [sum(one * np.log(one / marginal) for one, marginal in zip(row, p.mean(0), strict=True)) for row in p]
    assert inception_score(logits) == pytest.approx(np.exp(np.mean(divergence)))


def test_precision_needs_more_than_k_samples() -> None:
    with pytest.raises(ValueError, match="k = 3"):
        precision_recall(normal(20, 2, 0), normal(3, 2, 1))


def test_the_extractor_knows_the_held_out_digits() -> None:
    network, held_out = load_digits_classifier(), read_all(load_digits().held_out)
    extractor = dataclasses.replace(digits_extractor(torch.device("cpu")), batch=37)
    features, logits = extract(extractor, held_out.x)
    assert logits is not None
    accuracy = (logits.argmax(1) == held_out.cond["labels"]).float().mean().item()
    assert accuracy > 0.98
    noted = json.loads((resources.files("hd_trainer") / "weights/digits_metric.json").read_text())
    assert accuracy == pytest.approx(noted["accuracy"]["held_out"], abs=3e-3)
    assert features.shape == (360, digits.FEATURES)
    whole = network(held_out.x)[0]
    torch.testing.assert_close(features, whole, rtol=1e-4, atol=1e-4)


def test_the_extractor_is_small_frozen_and_shipped() -> None:
    weights = resources.files("hd_trainer") / "weights/digits_metric.safetensors"
    assert len(weights.read_bytes()) < 1_000_000
    network = load_digits_classifier()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_extractors_are_chosen_by_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_digits()
    train, held_out = (InMemory(x=read_all(split).x) for split in (data.train, data.held_out))
    plain = dataclasses.replace(data, name="other", classes=(), null={}, train=train, held_out=held_out)
    assert default_names(data) == ("digits",)
    assert default_names(dataclasses.replace(data, name="other")) == ("classifier",)
    for installed in ((), ("efficientnet",), ("efficientnet", "mobilenet")):
        monkeypatch.setattr(packages, "is_installed", installed.__contains__)
        assert default_names(plain) == installed[-1:]


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_weights_of_the_extractor_are_refused(
    damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped = resources.files("hd_trainer") / "weights"
    (tmp_path / "weights").mkdir()
    content = bytearray((shipped / "digits_metric.safetensors").read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    else:
        del content[-1]
    (tmp_path / "weights/digits_metric.safetensors").write_bytes(content)
    facts = (shipped / "digits_metric.json").read_bytes()
    (tmp_path / "weights/digits_metric.json").write_bytes(facts)
    monkeypatch.setattr(digits, "resources", SimpleNamespace(files=lambda _: tmp_path))
    with pytest.raises(RuntimeError, match=r"damaged.*reinstall"):
        load_digits_classifier()


def test_pixels_are_rounded_to_storable_levels() -> None:
    train = read_all(load_digits().train).x
    assert torch.equal(quantise(train, 17), train)
    values = quantise(torch.linspace(-3, 3, 5_001), 17)
    assert torch.equal(values.unique(), torch.linspace(-1, 1, 17))
    assert quantise(torch.tensor([0.06, 0.07]), 17).tolist() == [0.0, 0.125]
    assert quantise(torch.tensor([-5.0, 5.0]), 2).tolist() == [-1.0, 1.0]
