"""The adaptive integrator against scipy's, of the same pair and step control: steps, calls and results."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from zoo_helpers import GAUSSIAN, Recorder

from hd_zoo import create_model, sample_ode, seeded_noise
from hd_zoo.sampling import integrate_dopri5
from hd_zoo.sampling.dopri5 import ERROR, NODES, STAGES, _step


def swirl(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """A field that mixes coordinates and time, and is stiffer for larger x."""
    a, b = x.unbind(1)
    return torch.stack([(5 * b * t).sin() + a * b, a.cos() * (1 + a**2) - t * a * b], dim=1)


def swirl_numpy(t: float, state: Any) -> list[float]:
    a, b = state
    return [math.sin(5 * b * t) + a * b, math.cos(a) * (1 + a**2) - t * a * b]


STARTS = [[0.3, -0.5], [-0.8, 0.4], [2.0, 0.9], [0.0, 0.0]]


@pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 1e-6), (1e-6, 1e-9), (1e-9, 1e-9)])
@pytest.mark.parametrize("start", STARTS)
def test_the_same_steps_as_scipys(start: list[float], rtol: float, atol: float) -> None:
    noise = torch.tensor([start], dtype=torch.float64)
    found, calls = integrate_dopri5(swirl, noise, rtol=rtol, atol=atol)
    expected = solve_ivp(swirl_numpy, (1, 0), start, method="RK45", rtol=rtol, atol=atol)
    assert calls == expected.nfev
    torch.testing.assert_close(found[0], torch.from_numpy(expected.y[:, -1].copy()), atol=1e-10, rtol=1e-10)


def test_rejected_steps_too() -> None:
    """A velocity with a bump: steps that fall into it are taken back, as often as scipy takes them back."""

    def bump(t: Any, exp: Any) -> Any:
        return 40 * exp(-(((t - 0.5) / 0.1) ** 2))

    seen = Recorder(lambda x, t, r=None: torch.ones_like(x) * bump(t, torch.exp)[:, None])
    found, calls = integrate_dopri5(seen, torch.zeros(1, 1).double())
    expected = solve_ivp(lambda t, y: [bump(t, np.exp)], (1, 0), [0.0], method="RK45", rtol=1e-3, atol=1e-6)
    assert calls == len(seen.calls) == expected.nfev
    times = [call["t"].item() for call in seen.calls[7::6]]  # the ends of the steps
    assert any(later > earlier for earlier, later in itertools.pairwise(times))
    torch.testing.assert_close(found[0, 0].item(), expected.y[0, -1], atol=1e-10, rtol=1e-10)


def test_each_sample_takes_its_own_steps() -> None:
    noise = torch.tensor(STARTS, dtype=torch.float64)
    together, calls = integrate_dopri5(swirl, noise)
    alone = [integrate_dopri5(swirl, noise[b : b + 1]) for b in range(len(noise))]
    assert torch.equal(together, torch.cat([sample for sample, _ in alone]))
    assert calls == max(count for _, count in alone) > min(count for _, count in alone)


def test_the_error_follows_the_tolerance() -> None:
    noise = torch.randn(8, 3, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    exact = GAUSSIAN.position(noise, one, 0 * one)
    errors, counts = [], []
    for rtol in (1e-3, 1e-6, 1e-9):
        found, calls = integrate_dopri5(GAUSSIAN.teacher, noise, rtol=rtol, atol=1e-12)
        errors.append((found - exact).abs().max().item())
        counts.append(calls)
    assert errors[0] < 1e-2
    assert errors[1] < 1e-5
    assert errors[2] < 1e-8
    assert counts[0] < counts[1] < counts[2]


def test_a_step_of_order_five() -> None:
    """One step of size h on dx/dt = x cos(5 t): the error falls as h^6, that of the embedded solution as h^5."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        return x * (5 * t).cos()[:, None]

    x, t = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    fifth, fourth = [], []
    for h in (0.03, 0.015):
        ahead, _, error = _step(field, x, t, torch.full_like(t, h), field(x, t))
        exact = math.exp((math.sin(5 * (1 - h)) - math.sin(5)) / 5)
        fifth.append(abs(ahead.item() - exact))
        fourth.append(abs(ahead.item() + error.item() - exact))
    assert math.log2(fifth[0] / fifth[1]) == pytest.approx(6, abs=0.4)
    assert math.log2(fourth[0] / fourth[1]) == pytest.approx(5, abs=0.4)


def test_the_pairs_coefficients_are_consistent() -> None:
    for node, weights in zip(NODES, STAGES, strict=True):
        assert sum(weights) == pytest.approx(node, abs=1e-14)
    assert sum(ERROR) == pytest.approx(0, abs=1e-15)
    for power in range(1, 5):  # quadrature of order five
        assert sum(w * c**power for w, c in zip(STAGES[-1], NODES, strict=False)) == pytest.approx(1 / (power + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_sample_ode(dtype: torch.dtype) -> None:
    noise, labels, field = torch.randn(2, 3).to(dtype), torch.tensor([1, 2]), Recorder(GAUSSIAN.teacher)
    before = noise.clone()
    found = sample_ode(field, noise, method="dopri5", rtol=1e-2, atol=1e-3, labels=labels)
    assert (found.shape, found.dtype, found.requires_grad) == (noise.shape, dtype, False)
    assert torch.equal(noise, before)
    one = torch.ones(())
    exact = GAUSSIAN.position(noise.float(), one, 0 * one)
    torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0.03)
    for call in field.calls:
        assert call["x"].dtype == dtype
        assert call["t"].dtype == torch.float32
        assert torch.all((call["t"] >= 0) & (call["t"] <= 1))
        assert call["r"] is None
        assert call["cond"]["labels"] is labels
        assert not call["grad"]
    assert field.calls[-1]["t"].tolist() == [0.0, 0.0]


def test_a_network_that_predicts_zero_moves_nothing() -> None:
    network = create_model("dit_nano_2")
    noise = seeded_noise(network.sample_shape, [1, 2])
    assert torch.equal(sample_ode(network, noise, method="dopri5"), noise)


def test_what_cannot_be_integrated() -> None:
    noise = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"rtol and atol must be > 0; got 0 and 0.001"):
        integrate_dopri5(GAUSSIAN.teacher, noise, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"the field is not finite between t = .* and 0"):
        integrate_dopri5(lambda x, t: x + torch.where(t < 0.5, math.nan, 0.0)[:, None], noise)
    # Noise of its own at every call: no step is small enough.
    with pytest.raises(ValueError, match=r"dopri5 cannot meet rtol 0.001 and atol 1e-06 in torch.float64"):
        integrate_dopri5(lambda x, t: 1e15 * torch.randn_like(x), noise)
    with pytest.raises(ValueError, match=r"with 100 calls; it stands at t = 0\.\d+: take larger"):
        integrate_dopri5(lambda x, t: torch.randn_like(x), noise, max_calls=100)
    with pytest.raises(ValueError, match="dopri5 chooses its own steps: leave out steps and times; got 5 and None"):
        sample_ode(GAUSSIAN.teacher, noise, 5, "dopri5")
