"""The distribution-matching gradient against closed forms."""

from __future__ import annotations

import pytest
import torch
from dmd_helpers import Gaussian
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hd_dmd import distribution_matching_gradient

level = st.floats(0.02, 0.98)


def draw_case() -> tuple[Tensor, Tensor, Tensor]:
    """x, x_t (32, 3) and t (32,) in float64: samples of the student's N(1.1, 0.6^2), noised."""
    x = Gaussian(1.1, 0.6).draw(32, 3)
    t = 0.02 + 0.96 * torch.rand(32, dtype=torch.float64)
    return x, (1 - t)[:, None] * x + t[:, None] * torch.randn_like(x), t


def gradient(x: Tensor, x_t: Tensor, t: Tensor, real: Gaussian, fake: Gaussian) -> Tensor:
    return distribution_matching_gradient(x, x_t, t, real(x_t, t), fake(x_t, t))


@given(mean=st.floats(-2, 2), std=st.floats(0.05, 3), t=level, x=st.floats(-5, 5))
def test_closed_forms_of_velocity_score_and_clean_sample_agree(mean: float, std: float, t: float, x: float) -> None:
    """Three separately derived formulas, tied by x_0 = x_t - t v and s = -(x_t + (1 - t) v) / t."""
    data = Gaussian(mean, std)
    t, x = torch.tensor(t, dtype=torch.float64), torch.tensor(x, dtype=torch.float64)
    v = data.velocity(x, t)
    torch.testing.assert_close(x - t * v, data.clean(x, t), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(-(x + (1 - t) * v) / t, data.score(x, t), atol=1e-9, rtol=1e-9)


def test_gradient_equals_both_written_forms() -> None:
    x, x_t, t = draw_case()
    real, fake, column = Gaussian(0.7, 0.4), Gaussian(1.1, 0.6), t[:, None]
    g = gradient(x, x_t, t, real, fake)
    x_real, x_fake = real.clean(x_t, column), fake.clean(x_t, column)
    scale = (x - x_real).abs().mean(dim=1, keepdim=True)
    torch.testing.assert_close(g, (x_fake - x_real) / scale, atol=1e-12, rtol=1e-10)
    v_gap = real.velocity(x_t, column) - fake.velocity(x_t, column)
    torch.testing.assert_close(g, column * v_gap / scale, atol=1e-12, rtol=1e-10)


def test_gradient_in_score_form() -> None:
    """s_real - s_fake = (1 - t) / t (v_fake - v_real), so g = -t^2 / (1 - t) (s_real - s_fake) / scale."""
    x, x_t, t = draw_case()
    real, fake, column = Gaussian(0.7, 0.4), Gaussian(1.1, 0.6), t[:, None]
    gap = real.score(x_t, column) - fake.score(x_t, column)
    v_gap = fake.velocity(x_t, column) - real.velocity(x_t, column)
    torch.testing.assert_close(gap, (1 - column) / column * v_gap, atol=1e-10, rtol=1e-10)
    scale = (x - real.clean(x_t, column)).abs().mean(dim=1, keepdim=True)
    g = gradient(x, x_t, t, real, fake)
    torch.testing.assert_close(g, -(column**2) / (1 - column) * gap / scale, atol=1e-10, rtol=1e-9)


def test_gradient_is_zero_where_the_distributions_agree() -> None:
    x, x_t, t = draw_case()
    assert gradient(x, x_t, t, Gaussian(0.7, 0.4), Gaussian(0.7, 0.4)).abs().max() == 0


@pytest.mark.parametrize("shift", [0.5, -0.5, 0.01])
def test_a_shifted_student_is_pushed_back_by_the_known_amount(shift: float) -> None:
    """Both N(., s^2), means apart by `shift`: g scale = shift t^2 / sigma_t^2, of the shift's own sign."""
    _, x_t, t = draw_case()
    real, fake, column = Gaussian(0.7, 0.4), Gaussian(0.7 + shift, 0.4), t[:, None]
    x = fake.draw(32, 3)
    x_t = (1 - column) * x + column * torch.randn_like(x)
    g = gradient(x, x_t, t, real, fake)
    assert (g.sign() == (1 if shift > 0 else -1)).all()
    scale = (x - real.clean(x_t, column)).abs().mean(dim=1, keepdim=True)
    want = shift * column**2 / real.variance(column) / scale
    torch.testing.assert_close(g, want.expand_as(g), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("mean", "std"), [(1.2, 0.4), (0.2, 0.4), (0.7, 0.8), (0.7, 0.2), (1.2, 0.8)])
def test_a_step_against_the_gradient_reduces_reverse_kl(mean: float, std: float) -> None:
    """Student samples moved to x - lr g: KL(student || real) falls, and rises for a step the other way.

    Samples have 16 elements: over a single one the normaliser comes close to zero, and g has heavy tails.
    """
    real, fake = Gaussian(0.7, 0.4), Gaussian(mean, std)
    x = fake.draw(4000, 16)
    t = 0.02 + 0.96 * torch.rand(4000, dtype=torch.float64)
    x_t = (1 - t)[:, None] * x + t[:, None] * torch.randn_like(x)
    g = gradient(x, x_t, t, real, fake)

    def kl(samples: Tensor) -> float:
        return real.kl_from(Gaussian(samples.mean().item(), samples.std().item()))

    assert kl(x - 0.02 * g) < kl(x) - 1e-3
    assert kl(x + 0.02 * g) > kl(x) + 1e-3


def test_every_sample_pulls_alike() -> None:
    """A fake score that sees through the noise, x_fake = x, gives mean |g| = 1 per sample at any scale."""
    x, x_t, t = draw_case()
    v_fake = (x_t - x) / t[:, None]
    v_real = v_fake + torch.logspace(-3, 3, 32, dtype=torch.float64)[:, None] * torch.randn_like(x)
    g = distribution_matching_gradient(x, x_t, t, v_real, v_fake)
    torch.testing.assert_close(g.abs().mean(dim=1), torch.ones(32, dtype=torch.float64))


def test_normalised_per_sample_and_over_all_its_elements() -> None:
    """Images: a sample's gradient is independent of its neighbours; its elements share one scale."""
    x, x_t, v_real, v_fake = torch.randn(4, 5, 2, 3, 3, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    together = distribution_matching_gradient(x, x_t, t, v_real, v_fake)
    for i in range(5):
        scale = (x[i] - (x_t[i] - t[i] * v_real[i])).abs().mean()
        torch.testing.assert_close(together[i], t[i] * (v_real[i] - v_fake[i]) / scale)


def test_floor_bounds_the_scale() -> None:
    """x_real = x exactly: the denominator is the floor, not zero."""
    x = torch.ones(2, 3, dtype=torch.float64)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    v_real, v_fake = torch.zeros_like(x), torch.ones_like(x)
    for floor in (1e-6, 0.1):
        g = distribution_matching_gradient(x, x, t, v_real, v_fake, floor=floor)
        torch.testing.assert_close(g, torch.full_like(x, -0.5 / floor))


def test_gradient_is_detached() -> None:
    x, x_t, t = draw_case()
    tensors = [value.clone().requires_grad_() for value in (x, x_t, x_t, x)]
    g = distribution_matching_gradient(*tensors[:2], t, *tensors[2:])
    assert not g.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_result_is_float32_or_better(dtype: torch.dtype) -> None:
    x, x_t, v_real, v_fake = torch.randn(4, 5, 3, dtype=dtype)
    t = torch.linspace(0.1, 0.9, 5)
    g = distribution_matching_gradient(x, x_t, t, v_real, v_fake)
    assert g.dtype == torch.promote_types(dtype, torch.float32)
    # The same rounded inputs, worked out in float64: all arithmetic beyond them is precise.
    exact = distribution_matching_gradient(*(a.double() for a in (x, x_t, t, v_real, v_fake)))
    torch.testing.assert_close(g.double(), exact, atol=1e-5, rtol=1e-5)


def test_shape_errors_name_the_argument() -> None:
    x, t = torch.randn(4, 2), torch.rand(4)
    for i, name in enumerate(["x_t", "v_real", "v_fake"]):
        values = [x, x, x]
        values[i] = x[:, :1]
        with pytest.raises(ValueError, match=rf"{name} must have sample's shape \(4, 2\); got \(4, 1\)"):
            distribution_matching_gradient(x, values[0], t, values[1], values[2])
    with pytest.raises(ValueError, match=r"times must have shape \(4,\), one per sample; got \(4, 1\)"):
        distribution_matching_gradient(x, x, t[:, None], x, x)
