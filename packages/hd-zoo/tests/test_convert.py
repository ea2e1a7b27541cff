"""The converters against the Gaussian's conditional means and against its own time-reversed flow.

Also students behind converters, and converters on disk.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_helpers import GAUSSIAN, Gaussian, Recorder, draw_batch, randomised

from hd_zoo import (
    DataPrediction,
    DiffusedNoise,
    EDMDenoiser,
    Guidance,
    NoisePrediction,
    ReversedTime,
    create_model,
    from_pretrained,
    layer_name,
    network_inside,
    read_config,
    sample_jumps,
    sample_ode,
    save_pretrained,
    seeded_noise,
    to_student,
)


@pytest.fixture
def points() -> tuple[Tensor, Tensor, Tensor]:
    """x (32, 2, 3), t and r (32,) in the interior, float64."""
    t = 0.1 + 0.85 * torch.rand(32, dtype=torch.float64)
    return torch.randn(32, 2, 3, dtype=torch.float64), t, t * torch.rand(32, dtype=torch.float64)


def test_data_prediction_recovers_the_velocity(points: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, _ = points
    field = DataPrediction(GAUSSIAN.data_prediction)
    torch.testing.assert_close(field(x, t), GAUSSIAN.teacher(x, t), atol=1e-12, rtol=1e-12)


def test_noise_prediction_recovers_the_velocity(points: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, _ = points
    field = NoisePrediction(GAUSSIAN.noise_prediction)
    torch.testing.assert_close(field(x, t), GAUSSIAN.teacher(x, t), atol=1e-12, rtol=1e-12)


def test_the_quotients_are_bounded_at_their_bad_end() -> None:
    x, ends = torch.ones(2, 1, dtype=torch.float64), torch.tensor([0.0, 0.005]).double()
    data = DataPrediction(lambda x, t: 0 * x, t_min=0.01)(x, ends)
    noise = NoisePrediction(lambda x, t: 0 * x, gap=0.01)(x, 1 - ends)
    torch.testing.assert_close(data, torch.full_like(x, 100.0))
    torch.testing.assert_close(noise, torch.full_like(x, -100.0))


def test_reversed_time_of_a_velocity(points: tuple[Tensor, Tensor, Tensor]) -> None:
    """The other convention's own closed form: y_s = s x + (1 - s) eps, noise at s = 0, w = dy/ds."""
    y, s, _ = points
    var = (s**2 * GAUSSIAN.std**2 + (1 - s) ** 2)[:, None, None]
    at = s[:, None, None]
    gain = (at * GAUSSIAN.std**2 - (1 - at)) / var
    w = GAUSSIAN.mean + gain * (y - at * GAUSSIAN.mean)  # E[x - eps | y_s]

    def other(x: Tensor, time: Tensor) -> Tensor:
        torch.testing.assert_close(time, s)
        return w

    torch.testing.assert_close(ReversedTime(other)(y, 1 - s), GAUSSIAN.teacher(y, 1 - s), atol=1e-12, rtol=1e-12)


def test_reversed_time_of_a_mean_velocity(points: tuple[Tensor, Tensor, Tensor]) -> None:
    """The other field averages over its [low, high]; the state stands at low, where noise is, and comes first."""
    x, t, r = points

    def other(y: Tensor, low: Tensor, high: Tensor) -> Tensor:
        assert torch.all((low >= 0) & (low <= high) & (high <= 1))
        low, high = (s[:, None, None] for s in (low, high))
        end = GAUSSIAN.position(y, 1 - low, 1 - high)  # our clock reads 1 - s
        return (end - y) / (high - low)

    other.takes_r = True  # type: ignore[attr-defined]
    torch.testing.assert_close(ReversedTime(other)(x, t, r), GAUSSIAN.student(x, t, r), atol=1e-11, rtol=1e-10)


def test_reversing_twice_changes_nothing() -> None:
    network = randomised(create_model("mlp_2d", classes=3, r_embedding="added").double())
    twice = ReversedTime(ReversedTime(network))
    x, t, r, labels = draw_batch(network, dtype=torch.float64)
    for second in (None, r):
        torch.testing.assert_close(twice(x, t, second, labels=labels), network(x, t, second, labels=labels))
    assert {id(p) for p in twice.parameters()} == {id(p) for p in network.parameters()}


@pytest.mark.parametrize("wrapper", [ReversedTime, DataPrediction, NoisePrediction])
def test_conditions_are_passed_on(wrapper: type[nn.Module]) -> None:
    field = Recorder(lambda x, t, r=None, **cond: x)
    labels = torch.arange(3)
    wrapper(field)(torch.randn(3, 2), torch.rand(3), labels=labels)
    assert field.calls[0]["cond"] == {"labels": labels}


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, float("nan")])
def test_impossible_clamps(value: float) -> None:
    with pytest.raises(ValueError, match=r"t_min must lie in \(0, 1\)"):
        DataPrediction(lambda x, t: x, t_min=value)
    with pytest.raises(ValueError, match=r"gap must lie in \(0, 1\)"):
        NoisePrediction(lambda x, t: x, gap=value)


def test_one_time_per_sample_is_needed() -> None:
    with pytest.raises(ValueError, match=r"times must have shape \(3,\), one per sample; got \(1,\)"):
        DataPrediction(lambda x, t: x)(torch.randn(3, 2), torch.rand(1))


def linear_schedule(steps: int, start: float, end: float) -> list[float]:
    """abar of every step, in plain floats: the product of 1 - beta up to it."""
    signals, product = [], 1.0
    for i in range(steps):
        product *= 1 - (start + (end - start) * i / (steps - 1))
        signals.append(product)
    return signals


def step_times(steps: int, start: float, end: float) -> Tensor:
    """Where on the linear path noise and data have the ratio of each step: t = sigma / (alpha + sigma)."""
    signals = linear_schedule(steps, start, end)
    return torch.tensor([math.sqrt(1 - a) / (math.sqrt(a) + math.sqrt(1 - a)) for a in signals], dtype=torch.float64)


SCHEDULES = [(1000, 1e-4, 2e-2), (50, 1e-3, 0.3), (2, 0.1, 0.5)]


class ExactNoise:
    """E[eps | z] of a variance-preserving diffusion of Gaussian data, as a network of (z, i / S)."""

    def __init__(self, schedule: tuple[int, float, float]) -> None:
        self.steps = schedule[0]
        self.log_ratios = [0.5 * math.log((1 - a) / a) for a in linear_schedule(*schedule)]
        self.seen: list[Tensor] = []

    def __call__(self, z: Tensor, share: Tensor, **cond: Any) -> Tensor:
        self.seen.append(share)
        levels = []
        for index in (share * self.steps).tolist():
            low = min(int(index), self.steps - 2)
            pair = self.log_ratios[low : low + 2]
            levels.append(math.exp(pair[0] + (index - low) * (pair[1] - pair[0])))
        ratio = torch.tensor(levels, dtype=z.dtype).view(-1, *[1] * (z.ndim - 1))
        alpha, sigma = 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
        gain = sigma / (alpha**2 * GAUSSIAN.std**2 + sigma**2)
        return gain * (z - alpha * GAUSSIAN.mean)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_diffused_noise_recovers_the_velocity(schedule: tuple[int, float, float]) -> None:
    """Everywhere between the first and the last step: t of the steps themselves and between them."""
    steps = step_times(*schedule)
    t = torch.cat([steps[0] + (steps[-1] - steps[0]) * torch.rand(40).double(), steps[:3], steps[-3:]])
    x = torch.randn(len(t), 2, 3, dtype=torch.float64)
    field = DiffusedNoise(ExactNoise(schedule), *schedule)
    torch.testing.assert_close(field(x, t), GAUSSIAN.teacher(x, t), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_index_at_a_step_is_the_step(schedule: tuple[int, float, float]) -> None:
    field = DiffusedNoise(GAUSSIAN.noise_prediction, *schedule)
    steps = step_times(*schedule)
    whole = torch.arange(schedule[0], dtype=torch.float64)
    torch.testing.assert_close(field.index(steps), whole, atol=1e-7, rtol=0)
    torch.testing.assert_close(field.index(steps.float()), whole.float(), atol=5e-3, rtol=0)
    assert field.t_end == pytest.approx(steps[-1].item(), rel=1e-12)
    assert field.index(torch.tensor([0.0, 1.0]).double()).tolist() == [0, schedule[0] - 1]
    grid = field.index(torch.linspace(0, 1, 2001, dtype=torch.float64))
    assert torch.all(grid.diff() >= 0)
    inside = torch.linspace(steps[0].item(), steps[-1].item(), 501, dtype=torch.float64)
    assert torch.all(field.index(inside).diff() > 0)


def test_dits_schedule_ends_where_data_is_weighed_by_less_than_a_hundredth() -> None:
    field = DiffusedNoise(GAUSSIAN.noise_prediction)
    assert field.steps == 1000
    assert field.t_end == pytest.approx(0.9937, abs=5e-5)


def test_the_index_has_its_derivative_between_two_steps() -> None:
    field = DiffusedNoise(GAUSSIAN.noise_prediction)
    steps = step_times(*SCHEDULES[0])
    t, h = (steps[:-1] + steps[1:]) / 2, 1e-8
    _, slope = torch.func.jvp(field.index, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(slope, (field.index(t + h) - field.index(t - h)) / (2 * h), atol=1e-2, rtol=1e-5)
    assert torch.all(slope > 0)
    leaf = t.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(field.index(leaf).sum(), leaf)[0], slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [DiffusedNoise, EDMDenoiser, lambda n: EDMDenoiser(n, sigma_data=0.5)])
def test_the_ends_of_time_are_finite(kind: Callable[..., Any], dtype: torch.dtype) -> None:
    network = randomised(create_model("mlp_2d", width=8, r_embedding="added").to(dtype))
    field = kind(network)
    x, t = torch.randn(2, 2, dtype=dtype), torch.tensor([0.0, 1.0], dtype=dtype)
    for r in (None, t, torch.zeros_like(t)):
        assert field(x, t, r).isfinite().all()
        assert field(x, t, r).dtype == dtype


@pytest.mark.parametrize("kind", [DiffusedNoise, EDMDenoiser, lambda n: EDMDenoiser(n, sigma_data=0.5, sigma_max=9.0)])
def test_past_its_end_the_field_is_the_one_there(kind: Callable[..., Any]) -> None:
    network = randomised(create_model("mlp_2d", width=8, r_embedding="decoupled").double())
    field = kind(network)
    x = torch.randn(3, 2, dtype=torch.float64)
    end = torch.full((3,), field.t_end, dtype=torch.float64)
    past = torch.tensor([field.t_end, 0.999, 1.0], dtype=torch.float64)
    assert torch.equal(field(x, past), field(x, end))
    assert torch.equal(field(x, past, past), field(x, end, end))
    assert not torch.allclose(field(x, end - 0.01), field(x, end))


def test_before_its_first_step_a_diffusion_is_shown_that_step() -> None:
    inner = ExactNoise(SCHEDULES[0])
    field, early = DiffusedNoise(inner), torch.tensor([0.0, 1e-4, 5e-3]).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    found = field(x, early)
    assert inner.seen[0].tolist() == [0, 0, 0]
    torch.testing.assert_close(found, GAUSSIAN.teacher(x, early), atol=0.2, rtol=0)  # eps is all but unknown there


@pytest.mark.parametrize("keywords", [{"steps": 1}, {"beta_start": 0.0}, {"beta_end": 1.0}, {"beta_start": 0.5}])
def test_impossible_schedules(keywords: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps must be >= 2 and 0 < beta_start <= beta_end < 1; got"):
        DiffusedNoise(lambda x, t: x, **keywords)


@pytest.mark.parametrize("sigma_data", [None, 0.5, 2.0])
def test_edm_recovers_the_velocity(points: Any, sigma_data: float | None) -> None:
    """D(y, sigma) = E[data | y] for y = data + sigma eps; F is what is left of D in EDM's table 1."""
    x, t, _ = points

    def denoiser(y: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma[:, None, None]
        return GAUSSIAN.mean + GAUSSIAN.std**2 / (GAUSSIAN.std**2 + sigma**2) * (y - GAUSSIAN.mean)

    def inner(scaled: Tensor, noise_level: Tensor) -> Tensor:
        sigma = (4 * noise_level).exp()
        at = sigma[:, None, None]
        y = scaled * (at**2 + sigma_data**2).sqrt()
        skip = sigma_data**2 / (at**2 + sigma_data**2)
        out = at * sigma_data / (at**2 + sigma_data**2).sqrt()
        return (denoiser(y, sigma) - skip * y) / out

    field = EDMDenoiser(denoiser if sigma_data is None else inner, sigma_data)
    torch.testing.assert_close(field(x, t), GAUSSIAN.teacher(x, t), atol=1e-11, rtol=1e-10)


def test_edm_of_centred_data_of_its_own_spread_needs_no_network(points: Any) -> None:
    """Then c_skip y is E[data | y] already: F = 0."""
    x, t, _ = points
    centred = Gaussian(mean=0.0, std=0.5)
    field = EDMDenoiser(lambda y, level: torch.zeros_like(y), sigma_data=0.5)
    torch.testing.assert_close(field(x, t), centred.teacher(x, t), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "keywords", [{"sigma_data": 0.0}, {"sigma_data": -1.0}, {"sigma_max": 0.0}, {"t_min": 0.0}, {"t_min": 1.0}]
)
def test_impossible_noise_levels(keywords: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sigma_data and sigma_max must be > 0 and t_min lie in \(0, 1\); got"):
        EDMDenoiser(lambda x, t: x, **keywords)


CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "reversed_time": ReversedTime,
    "data_prediction": lambda network: DataPrediction(network, t_min=0.02),
    "noise_prediction": lambda network: NoisePrediction(network, gap=0.03),
    "diffused_noise": lambda network: DiffusedNoise(network, 100, 1e-3, 0.1),
    "edm_denoiser": EDMDenoiser,
    "edm_inner": lambda network: EDMDenoiser(network, sigma_data=0.5, sigma_max=40.0),
}
NESTED = {**CONVERTERS, "nested": lambda network: ReversedTime(DataPrediction(ReversedTime(network), t_min=0.05))}


@pytest.fixture
def teacher() -> Any:
    return randomised(create_model("dit_nano_2", classes=3, width=16, depth=2, num_heads=2).double(), std=0.1)


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("r_embedding", ["added", "decoupled"])
def test_a_student_behind_a_converter_starts_as_the_teacher(r_embedding: str, kind: str, teacher: Any) -> None:
    field = NESTED[kind](teacher).requires_grad_(False).eval()
    student = to_student(field, r_embedding)
    assert type(student) is type(field)
    assert student.arguments == field.arguments
    assert not student.training
    x, t, r, labels = draw_batch(teacher, dtype=torch.float64)
    expected = field(x, t, labels=labels)
    assert expected.isfinite().all()
    for second in (None, t) if r_embedding == "decoupled" else (None, t, r, torch.zeros_like(t)):
        torch.testing.assert_close(student(x, t, second, labels=labels), expected, atol=1e-13, rtol=1e-13)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in field.parameters())
    mine = {tensor.data_ptr() for tensor in student.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in field.state_dict().values()}
    randomised(student)
    assert not torch.allclose(student(x, t, r, labels=labels), student(x, t, t, labels=labels))
    assert torch.equal(field(x, t, labels=labels), expected)


@pytest.mark.parametrize("kind", CONVERTERS)
@pytest.mark.parametrize("takes_r", [False, True])
def test_r_reaches_a_network_that_takes_it_and_no_other(takes_r: bool, kind: str) -> None:
    inner = Recorder(lambda x, t, r=None: x, takes_r=takes_r)
    field = CONVERTERS[kind](inner)
    x, t = torch.randn(3, 2), torch.rand(3) * 0.8 + 0.1
    field(x, t, t / 2)
    field(x, t, t)
    field(x, t)
    whole, none, absent = inner.calls
    assert absent["r"] is None
    if not takes_r:
        assert whole["r"] is None
    else:
        assert torch.equal(none["r"], none["t"])  # r passes through the same clock as t
        assert torch.all((whole["r"] > whole["t"]) if kind == "reversed_time" else (whole["r"] < whole["t"]))
        # ... and it is the clock: what a call at that time shows the network.
        field(x, t / 2)
        torch.testing.assert_close(whole["r"], inner.calls[-1]["t"])


@pytest.mark.parametrize("kind", NESTED)
def test_a_network_that_does_not_say_whether_it_takes_r(kind: str) -> None:
    """Without r it is a teacher like any other. With r, leaving r out or passing it on could both be wrong."""

    class Silent(nn.Module):
        def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
            return x

    field, x, t = NESTED[kind](Silent()), torch.randn(3, 2), torch.rand(3)
    assert field(x, t).shape == x.shape
    assert not hasattr(field, "takes_r")
    message = "r was given for a Silent that does not say whether it takes r: set takes_r = True on it"
    with pytest.raises(ValueError, match=message):
        field(x, t, t / 2)
    with pytest.raises(ValueError, match="r was given for a function that does not say"):
        NESTED[kind](lambda x, t, r=None: x)(x, t, t / 2)


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("student", [False, True])
def test_a_converter_says_what_its_network_says(student: bool, kind: str, teacher: Any) -> None:
    network = to_student(teacher) if student else teacher
    field = NESTED[kind](network)
    for one in (field, Guidance(field, 2.0, null={"labels": 3}), NESTED[kind](Guidance(network, 2.0, null={"a": 0}))):
        assert one.sample_shape == (1, 8, 8)
        assert one.classes == one.null_label == 3
        assert one.takes_r is student
        assert network_inside(one) is network
        assert network_inside(one).architecture == "transformer"
        modules = dict(one.named_modules())
        assert modules[layer_name(one, "blocks.1")] is network.blocks[1]
        assert layer_name(one, layer_name(one, "blocks.1")) == layer_name(one, "blocks.1")
    assert network_inside(network) is network
    assert layer_name(network, "blocks.1") == "blocks.1"
    assert layer_name(ReversedTime(network), "blocks.1") == "network.blocks.1"


def test_what_a_network_does_not_say_a_converter_does_not_say_either() -> None:
    field = NoisePrediction(nn.Linear(2, 2))
    for name in ("sample_shape", "classes", "null_label", "takes_r"):
        with pytest.raises(AttributeError, match=name):
            getattr(field, name)


def test_a_noise_predicting_network_goes_all_the_way_of_a_teacher(teacher: Any, tmp_path: Path) -> None:
    """As DiT does: a field, guided by the null label, sampled; its student saved, loaded and sampled."""
    field = DiffusedNoise(teacher, 100, 1e-3, 0.1).eval()
    labels, seeds = torch.tensor([0, 2]), [5, 6]
    noise = seeded_noise(field.sample_shape, seeds).double()
    guided = Guidance(field, 2.0, null={"labels": field.null_label})
    ode = sample_ode(guided, noise, 4, labels=labels)
    by_hand = noise
    for now in (1.0, 0.75, 0.5, 0.25):
        time = torch.full((2,), now, dtype=torch.float64)
        plain = field(by_hand, time)  # no labels: the null class
        by_hand = by_hand - 0.25 * (plain + 2 * (field(by_hand, time, labels=labels) - plain))
    torch.testing.assert_close(ode, by_hand)
    student = randomised(to_student(field))
    found: Any = from_pretrained(save_pretrained(student, tmp_path))
    assert (found.sample_shape, found.classes, found.takes_r) == ((1, 8, 8), 3, True)
    samples = sample_jumps(found, noise, (1.0, 0.4, 0.0), labels=labels)
    assert torch.equal(samples, sample_jumps(student, noise, (1.0, 0.4, 0.0), labels=labels))
    assert not torch.allclose(samples, sample_jumps(student, noise, labels=labels))


@pytest.mark.parametrize("kind", ["reversed_time", "diffused_noise", "edm_inner"])
def test_a_converted_student_compiles_to_one_graph(kind: str, teacher: Any) -> None:
    student = CONVERTERS[kind](randomised(to_student(teacher)))
    x, t, r, labels = draw_batch(student, dtype=torch.float64)
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, r, labels=labels), student(x, t, r, labels=labels))


def test_the_derivative_of_a_converted_field(teacher: Any) -> None:
    """Along x, t and r together, against central differences."""
    for kind, r_embedding in itertools.product(NESTED, ("added", "decoupled")):
        field = NESTED[kind](to_student(teacher, r_embedding))
        x, t, r, labels = draw_batch(teacher, count=2, dtype=torch.float64)
        tangents = (torch.randn_like(x), torch.ones_like(t), 0.3 * torch.ones_like(r))

        def u(x: Tensor, t: Tensor, r: Tensor, field: Any = field, labels: Any = labels) -> Tensor:
            return field(x, t, r, labels=labels)

        _, found = torch.func.jvp(u, (x, t, r), tangents)
        with torch.no_grad():
            ahead, behind = (u(*(a + s * d for a, d in zip((x, t, r), tangents, strict=True))) for s in (1e-6, -1e-6))
        torch.testing.assert_close(found, (ahead - behind) / 2e-6, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", NESTED)
def test_a_converted_network_on_disk(kind: str, teacher: Any, tmp_path: Path) -> None:
    field = NESTED[kind](to_student(teacher))
    save_pretrained(field, tmp_path, metadata={"step": 3})
    found = from_pretrained(tmp_path)
    assert not found.training
    x, t, r, labels = draw_batch(teacher, dtype=torch.float64)
    assert torch.equal(found(x, t, r, labels=labels), field.eval()(x, t, r, labels=labels))
    assert found.state_dict().keys() == field.state_dict().keys()
    config = read_config(tmp_path)
    assert config["format"] == "hd-zoo/3"
    assert config["metadata"] == {"step": 3}
    one, other = field, found
    for entry in config["converters"]:
        assert type(one) is type(other)
        assert one.arguments == other.arguments == entry["arguments"]
        one, other = one.network, other.network
    assert len(config["converters"]) == (3 if kind == "nested" else 1)
    assert other.arguments == one.arguments


def test_without_a_converter_none_is_written(teacher: Any, tmp_path: Path) -> None:
    config = read_config(save_pretrained(teacher, tmp_path))
    assert "converters" not in config
    save_pretrained(ReversedTime(teacher), tmp_path)
    save_pretrained(teacher, tmp_path)
    assert read_config(tmp_path) == config
    assert type(from_pretrained(tmp_path)) is type(teacher)


def test_converters_of_the_second_format_are_read(teacher: Any, tmp_path: Path) -> None:
    save_pretrained(ReversedTime(teacher), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format": "hd-zoo/2"}))
    assert type(from_pretrained(tmp_path)) is ReversedTime


def test_a_converter_of_somebody_elses_is_not_written(teacher: Any, tmp_path: Path) -> None:
    class Mine(ReversedTime):
        pass

    with pytest.raises(ValueError, match="a converter of this package is needed; got Mine"):
        save_pretrained(Mine(teacher), tmp_path)
    with pytest.raises(ValueError, match="is needed; got Linear"):
        save_pretrained(ReversedTime(nn.Linear(2, 2)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("converters", "message"),
    [
        ([{"name": "os.system", "arguments": {}}], "a converter that this package does not know"),
        ([{"name": "Converter", "arguments": {}}], "a converter that this package does not know"),
        ([{"name": ["reversed_time"], "arguments": {}}], "a converter that this package does not know"),
        ([{"name": "reversed_time"}], "does not know: 'arguments'"),
        ([{"name": "reversed_time", "arguments": [1]}], "a converter that this package does not know"),
        ([{"name": "data_prediction", "arguments": {"gap": 0.1}}], "does not know: .*gap"),
        ([{"name": "data_prediction", "arguments": {"network": 1}}], "does not know: .*network"),
        ([{"name": "data_prediction", "arguments": {"t_min": 2.0}}], r"does not know: t_min must lie in \(0, 1\)"),
        ([{"name": "data_prediction", "arguments": {"t_min": "0.1"}}], "a converter that this package does not know"),
        ([{"name": "diffused_noise", "arguments": {"steps": [3]}}], "a converter that this package does not know"),
        ([{"name": "diffused_noise", "arguments": {"steps": 2**60}}], "a converter that this package does not know"),
        ([{"name": "edm_denoiser", "arguments": {"sigma_max": None}}], "a converter that this package does not know"),
        (["reversed_time"], "a converter that this package does not know"),
        ([None], "a converter that this package does not know"),
        ({"name": "reversed_time", "arguments": {}}, "has converters that are no list"),
        ("reversed_time", "has converters that are no list"),
        (None, "has converters that are no list"),
    ],
)
def test_hostile_converters(converters: Any, message: str, teacher: Any, tmp_path: Path) -> None:
    path = save_pretrained(ReversedTime(teacher), tmp_path) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "converters": converters}))
    with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
        from_pretrained(tmp_path)
