"""DDPM's ancestral sampling: the moments of its scheme in closed form, its steps, the learned variance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn
from zoo_helpers import GAUSSIAN, Recorder, randomised

from hd_zoo import DiffusedNoise, Guidance, NoisePrediction, create_model, sample_ancestral, seeded_noise
from hd_zoo.sampling.ancestral import respaced_signals

SEEDS = range(3000)


def signals(steps: int, total: int, start: float, end: float) -> list[float]:
    """abar of the chosen steps, in plain floats."""
    every, product = [], 1.0
    for i in range(total):
        product *= 1 - (start + (end - start) * i / (total - 1))
        every.append(product)
    return [every[round(i * (total - 1) / (steps - 1))] for i in range(steps)]


def test_respaced_steps_are_dits() -> None:
    """250 of 1,000: strides of 999 / 249, from the first to the last."""
    found = respaced_signals(250, 1000, 1e-4, 2e-2)
    assert found == pytest.approx(signals(250, 1000, 1e-4, 2e-2), rel=1e-12)
    assert found[0] == pytest.approx(1 - 1e-4)
    assert found[-1] == pytest.approx(4.036e-5, rel=1e-3)
    assert len(respaced_signals(1000, 1000, 1e-4, 2e-2)) == 1000


def moments(steps: int, variance: str, schedule: tuple[int, float, float]) -> tuple[float, float]:
    """Mean and variance that the scheme gives a Gaussian, from the posterior of z' given z and E[x | z]."""
    mean, spread = 0.0, 1.0
    grid = signals(steps, *schedule)
    m, s = GAUSSIAN.mean, GAUSSIAN.std
    for i in reversed(range(steps)):
        signal, before = grid[i], grid[i - 1] if i else 1.0
        alpha = signal / before
        # q(z' | z, x): equations 6 and 7 of the paper
        on_x = math.sqrt(before) * (1 - alpha) / (1 - signal)
        on_z = math.sqrt(alpha) * (1 - before) / (1 - signal)
        # E[x | z] of the Gaussian, affine in z
        gain = math.sqrt(signal) * s**2 / (signal * s**2 + 1 - signal)
        offset = m - gain * math.sqrt(signal) * m
        slope = on_x * gain + on_z
        mean = slope * mean + on_x * offset
        added = 0.0
        if i:
            added = 1 - alpha if variance == "large" else (1 - alpha) * (1 - before) / (1 - signal)
        spread = slope**2 * spread + added
    return mean, spread


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("schedule", [(1000, 1e-4, 2e-2), (40, 1e-3, 0.4)])
@pytest.mark.parametrize("steps", [8, 40])
def test_the_moments_of_the_scheme(steps: int, schedule: tuple[int, float, float], variance: str) -> None:
    total, start, end = schedule
    noise = seeded_noise((1,), SEEDS).double()
    found = sample_ancestral(
        GAUSSIAN.teacher,
        noise,
        steps,
        seeds=SEEDS,
        variance=variance,
        diffusion_steps=total,
        beta_start=start,
        beta_end=end,
    )[:, 0]
    mean, spread = moments(steps, variance, schedule)
    count = len(found)
    assert abs(found.mean().item() - mean) < 4.5 * (spread / count) ** 0.5
    assert abs(found.var().item() / spread - 1) < 4.5 * (2 / count) ** 0.5
    assert kstest(((found - found.mean()) / found.std()).numpy(), "norm").pvalue > 1e-3


def test_250_steps_come_close_to_the_data() -> None:
    """The smaller variance gives a little less spread than the data has."""
    mean, spread = moments(250, "small", (1000, 1e-4, 2e-2))
    assert mean == pytest.approx(GAUSSIAN.mean, rel=0.01)
    assert math.sqrt(spread) == pytest.approx(GAUSSIAN.std, rel=0.05)
    noise = seeded_noise((1,), range(800)).double()
    found = sample_ancestral(GAUSSIAN.teacher, noise, seeds=range(800))
    assert kstest(((found[:, 0] - mean) / spread**0.5).numpy(), "norm").pvalue > 1e-3


def test_the_network_sees_the_diffusions_own_states_at_its_own_steps() -> None:
    """Behind DiffusedNoise every step is a whole one, and z comes through unchanged."""
    inner = Recorder(lambda z, t, r=None, **cond: 0.3 * z)
    field, labels, noise = DiffusedNoise(inner), torch.tensor([1, 2]), torch.randn(2, 3).double()
    sample_ancestral(field, noise, 5, seeds=[0, 1], labels=labels)
    indices = [1000 * call["t"][0].item() for call in inner.calls]
    assert indices == pytest.approx([999, 749, 500, 250, 0], abs=2e-2)
    torch.testing.assert_close(inner.calls[0]["x"], noise, atol=1e-12, rtol=1e-12)
    for call in inner.calls:
        assert call["cond"]["labels"] is labels
        assert call["r"] is None
        assert not call["grad"]


def test_what_is_added_goes_on_in_each_samples_stream() -> None:
    """With eps = 0 the mean is a multiple of z, so that increments can be read off."""
    seeds = [0, 1502]
    noise = seeded_noise((20,), seeds).double()
    field = NoisePrediction(lambda x, t: torch.zeros_like(x), gap=1e-9)
    high, low = (0.05, 0.9)
    beta_start, beta_end = 1 - low, 1 - high / low  # two steps with abar = low, then high
    found = sample_ancestral(
        field, noise, 2, seeds=seeds, variance="large", diffusion_steps=2, beta_start=beta_start, beta_end=beta_end
    )
    added = (found * math.sqrt(low) - noise / math.sqrt(high / low)) / math.sqrt(1 - high / low)
    for b, seed in enumerate(seeds):
        stream = torch.Generator().manual_seed(seed)
        torch.randn(20, generator=stream)
        torch.testing.assert_close(added[b], torch.randn(20, generator=stream).double(), atol=1e-6, rtol=1e-6)


class KnownVariance(nn.Module):
    """E[eps | x_t] as a network that also answers with a constant for its variance."""

    def __init__(self, raw: float) -> None:
        super().__init__()
        self.raw = raw

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        return GAUSSIAN.teacher(x, t)

    def with_variance(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        return self(x, t), torch.full_like(x, self.raw)


@pytest.mark.parametrize(("raw", "variance"), [(-1.0, "small"), (1.0, "large")])
def test_a_learned_variance_lies_between_the_two(raw: float, variance: str) -> None:
    noise = seeded_noise((3,), range(4)).double()
    found = sample_ancestral(KnownVariance(raw), noise, 12, seeds=range(4), variance="learned")
    expected = sample_ancestral(KnownVariance(raw), noise, 12, seeds=range(4), variance=variance)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    between = sample_ancestral(KnownVariance(0.0), noise, 12, seeds=range(4), variance="learned")
    assert not torch.isclose(between, found).any()


@pytest.fixture
def dit() -> Any:
    """A small DiT that predicts a variance too."""
    network = create_model("dit_nano_2", classes=3, width=16, depth=1, num_heads=2, learned_variance=True)
    return randomised(network, std=0.1).double()


def test_dits_second_half_of_channels_is_its_variance(dit: Any) -> None:
    x, t, labels = torch.randn(2, 1, 8, 8).double(), torch.tensor([0.2, 0.7]).double(), torch.tensor([0, 2])
    noise, raw = dit.with_variance(x, t, labels=labels)
    assert torch.equal(noise, dit(x, t, labels=labels))
    state = {name: value.clone() for name, value in dit.state_dict().items()}
    halves = state["head.linear.weight"].unflatten(0, (4, 2)), state["head.linear.bias"].unflatten(0, (4, 2))
    swapped = {
        "head.linear.weight": halves[0].flip(1).flatten(0, 1),
        "head.linear.bias": halves[1].flip(1).flatten(0, 1),
    }
    dit.load_state_dict({**state, **swapped})
    torch.testing.assert_close(dit(x, t, labels=labels), raw)


def test_the_learned_variance_through_guidance_and_a_converter(dit: Any) -> None:
    """Guided, it is the conditional part's."""
    x, t, labels = torch.randn(2, 1, 8, 8).double(), torch.tensor([0.2, 0.7]).double(), torch.tensor([0, 2])
    field = DiffusedNoise(dit)
    velocity, raw = field.with_variance(x, t, labels=labels)
    torch.testing.assert_close(velocity, field(x, t, labels=labels))
    scale = ((1 - t) ** 2 + t**2).sqrt()[:, None, None, None]
    torch.testing.assert_close(raw, dit.with_variance(x / scale, field.index(t) / 1000, labels=labels)[1])
    for guidance_scale in (1.0, 3.0):
        guided = Guidance(field, guidance_scale, null={"labels": 3})
        both = guided.with_variance(x, t, labels=labels)
        torch.testing.assert_close(both[0], guided(x, t, labels=labels))
        torch.testing.assert_close(both[1], raw)
    noise, settings = seeded_noise((1, 8, 8), [4, 5]).double(), {"steps": 3, "seeds": [4, 5], "labels": labels}
    learned = sample_ancestral(Guidance(field, 3.0, null={"labels": 3}), noise, variance="learned", **settings)
    small = sample_ancestral(Guidance(field, 3.0, null={"labels": 3}), noise, **settings)
    assert learned.isfinite().all()
    assert not torch.allclose(learned, small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_graph_and_the_noise_itself(dtype: torch.dtype) -> None:
    noise = torch.randn(2, 3).to(dtype).requires_grad_()
    before, field = noise.detach().clone(), Recorder(GAUSSIAN.teacher)
    found = sample_ancestral(field, noise, 4, seeds=[0, 1])
    assert (found.shape, found.dtype, found.requires_grad) == (noise.shape, dtype, False)
    assert torch.equal(noise.detach(), before)
    assert len(field.calls) == 4
    assert all(call["x"].dtype == dtype and call["t"].dtype == torch.float32 for call in field.calls)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1}, r"steps must lie in \[2, diffusion_steps\]; got 1 of 1000"),
        ({"steps": 1001}, "got 1001 of 1000"),
        ({"variance": "fixed"}, "variance must be one of learned, small, large; got 'fixed'"),
        ({"beta_start": 0.0}, "0 < beta_start <= beta_end < 1 is needed; got 0.0 and 0.02"),
        ({"beta_end": 1.0}, "0 < beta_start <= beta_end < 1 is needed"),
        ({"seeds": [1]}, "seeds must be one per sample, 2; got 1"),
        ({"variance": "learned"}, "needs with_variance, which a function does not have"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_ancestral(lambda x, t: x, torch.randn(2, 3), **{"steps": 4, "seeds": [0, 1], **arguments})


def test_a_field_without_a_variance_inside_of_others(dit: Any) -> None:
    noise = torch.randn(2, 1, 8, 8)
    silent = Guidance(NoisePrediction(dit), 2.0, null={"labels": 3})
    with pytest.raises(ValueError, match="needs with_variance, which a NoisePrediction does not have"):
        sample_ancestral(silent, noise, seeds=[0, 1], variance="learned")
    plain = DiffusedNoise(create_model("dit_nano_2"))
    with pytest.raises(ValueError, match="this network has no variance: learned_variance is False"):
        sample_ancestral(plain, noise, seeds=[0, 1], variance="learned")
