"""Gradient routing of the real stages: who is changed by which loss, and who never."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_helpers import changed, prepare_task, same, snapshot

import hd_zoo
from hd_dmd import UniformLevels
from hd_meanflow import LogitNormalTimes, MeanFlowLoss
from hd_trainer import Settings, UserError
from hd_trainer.context import Context
from hd_trainer.data import Dataset, InMemory
from hd_trainer.engine.loop import Task
from hd_trainer.engine.optimizer import Optimizer, OptimizerSettings, turn_of
from hd_trainer.networks import GuidanceSettings, guided, load_network
from hd_trainer.stages import STAGES
from hd_trainer.stages.discriminator import (
    DiscriminatorSettings,
    load_discriminator,
    prepare_judge,
    save_discriminator,
)
from hd_trainer.stages.distribution import Networks, student_step
from hd_trainer.stages.teacher import without

BOTH = ("blocks.0", "blocks.1")
OFF = DiscriminatorSettings(layers=("blocks.0",), gan_weight=0.0)


def at_update(
    monkeypatch: pytest.MonkeyPatch, task: Task, look: Callable[[str, Tensor, Callable[[], Any]], Any]
) -> None:
    """Call ``look(name, loss, update)`` in place of every optimiser's update."""
    for name, optimizer in task.optimizers.items():

        def update(loss: Tensor, step: int, name: str = name, real: Callable[..., Any] = optimizer.update) -> Any:
            return look(name, loss, lambda: real(loss, step))

        monkeypatch.setattr(optimizer, "update", update)


def reached(loss: Tensor, module: nn.Module) -> bool:
    """Whether a backward pass from the loss would arrive at any of the module's parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        return False
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return any(gradient is not None for gradient in found)


def with_gradients(modules: dict[str, nn.Module]) -> set[str]:
    """Names of the modules of which some parameter has a ``.grad``."""
    return {name for name, module in modules.items() if any(p.grad is not None for p in module.parameters())}


def flags(modules: dict[str, nn.Module]) -> dict[str, list[bool]]:
    """Which parameters require gradients."""
    return {name: [p.requires_grad for p in module.parameters()] for name, module in modules.items()}


def moved_student(settings: Settings, context: Context, network: nn.Module) -> nn.Module:
    """A student after one step of stage 1: where it equals the teacher, distribution matching has nothing to say."""
    task = prepare_task("trajectory", settings, context, network)
    task.step(0)
    return task.modules["student"]


# ---- whose turn it is


def test_in_a_turn_one_network_requires_gradients_and_afterwards_all_are_as_before() -> None:
    mine, other, frozen = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    other.bias.requires_grad_(False)
    everyone = {"mine": mine.requires_grad_(False), "other": other, "frozen": frozen}
    before = flags(everyone)
    with turn_of(mine, [other, frozen]):
        assert flags(everyone) == {"mine": [True, True], "other": [False, False], "frozen": [False, False]}
        frozen(other(mine(torch.ones(1, 2)))).sum().backward()
    assert with_gradients(everyone) == {"mine"}
    assert flags(everyone) == before == {"mine": [False, False], "other": [True, False], "frozen": [False, False]}


def test_flags_are_restored_when_a_turn_fails() -> None:
    mine, other = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    everyone = {"mine": mine, "other": other}
    before = flags(everyone)
    with pytest.raises(ZeroDivisionError), turn_of(mine, [other]):
        raise ZeroDivisionError
    assert flags(everyone) == before


@pytest.mark.parametrize("gan_loss", ["softplus", "hinge", "relativistic"])
def test_each_turns_backward_leaves_gradients_in_its_own_network_alone(
    gan_loss: Any, settings: Settings, context: Context, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    discriminator = dataclasses.replace(
        settings.distribution.discriminator, gan_loss=gan_loss, gan_weight=0.5, r1_weight=0.1
    )
    start = moved_student(settings, context, network)
    task = prepare_task("distribution", settings, context, network, start, discriminator=discriminator)
    everyone = {**task.modules, "teacher": network, "start": start}
    before = flags(everyone)
    seen: list[tuple[str, set[str]]] = []
    for name, optimizer in task.optimizers.items():
        adamw = optimizer.adamw
        step = adamw.step

        def look(name: str = name, step: Callable[[], Any] = step) -> Any:
            seen.append((name, with_gradients(everyone)))
            return step()

        monkeypatch.setattr(adamw, "step", look)
    for index in range(4):
        task.step(index)
        assert with_gradients(everyone) == set()
        assert flags(everyone) == before
    both = ["fake_score", "discriminator"]
    assert seen == [(name, {name}) for name in ["student", *both, *both, *both, "student", *both]]
    assert not any(before["teacher"])


def test_in_stage_1_the_backward_leaves_gradients_in_the_student_alone(
    settings: Settings, context: Context, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = prepare_task("trajectory", settings, context, network, guidance=GuidanceSettings(scale=2.0))
    everyone = {**task.modules, "teacher": network}
    before = flags(everyone)
    seen: list[set[str]] = []
    adamw = task.optimizers["student"].adamw
    step = adamw.step

    def look() -> Any:
        seen.append(with_gradients(everyone))
        return step()

    monkeypatch.setattr(adamw, "step", look)
    task.step(0)
    assert seen == [{"student"}]
    assert flags(everyone) == before
    assert not any(before["teacher"])


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_taken_by_backward_so_that_hooks_of_parameters_fire(
    stage: str, settings: Settings, context: Context, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP and FSDP2 hang on these hooks; torch.autograd.grad would pass them by."""
    task = prepare_task(stage, settings, context, network)
    fired: dict[str, int] = dict.fromkeys(task.optimizers, 0)
    for name in task.optimizers:
        for parameter in task.modules[name].parameters():

            def note(_: Tensor, name: str = name) -> None:
                fired[name] += 1

            parameter.register_post_accumulate_grad_hook(note)
    backwards: list[Tensor] = []
    backward = torch.Tensor.backward

    def count(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        backwards.append(loss)
        backward(loss, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", count)
    task.step(0)
    assert len(backwards) == len(task.optimizers)
    assert all(loss.ndim == 0 for loss in backwards)
    for name, times in fired.items():
        # One loss does not reach all parameters (pooled layers that are switched off), and none twice.
        assert 0 < times <= len(list(task.modules[name].parameters())), name


@pytest.mark.parametrize("gan_loss", ["softplus", "hinge", "relativistic"])
def test_every_loss_of_stage_2_reaches_its_own_network_only(
    gan_loss: Any, settings: Settings, context: Context, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    discriminator = DiscriminatorSettings(layers=BOTH, gan_loss=gan_loss, gan_weight=0.5, r1_weight=0.1)
    task = prepare_task("distribution", settings, context, network, discriminator=discriminator)
    everyone = {**task.modules, "teacher": network}
    turns: list[str] = []

    def look(name: str, loss: Tensor, update: Callable[[], Any]) -> Any:
        turns.append(name)
        assert {other for other, module in everyone.items() if reached(loss, module)} == {name}
        result: list[Any] = []
        assert changed(lambda: result.append(update()), everyone) == {name}
        return result[0]

    at_update(monkeypatch, task, look)
    for index in range(4):
        assert "r1" in task.step(index)
    both = ["fake_score", "discriminator"]
    assert turns == ["student", *both, *both, *both, "student", *both]


def test_every_optimiser_owns_its_module(settings: Settings, context: Context, network: nn.Module) -> None:
    for stage in STAGES:
        task = prepare_task(stage, settings, context, network)
        owned = {name: {id(p) for p in optimizer.parameters} for name, optimizer in task.optimizers.items()}
        for name, ids in owned.items():
            assert ids == {id(p) for p in task.modules[name].parameters()}
        assert set(task.modules) - set(owned) == {"average"}
        assert all(isinstance(optimizer, Optimizer) for optimizer in task.optimizers.values())


# ---- teacher


def test_a_teacher_step_changes_network_and_average(settings: Settings, context: Context, network: nn.Module) -> None:
    task = prepare_task("teacher", settings, context, network)
    assert changed(lambda: task.step(0), task.modules) == {"network", "average"}
    assert not same(snapshot(task.modules["network"]), snapshot(task.modules["average"]))


@pytest.mark.parametrize(("share", "moved"), [(1.0, {10}), (0.0, set(range(10)))])
def test_dropped_labels_train_the_null_class_alone(
    share: float, moved: set[int], settings: Settings, context: Context, network: nn.Module
) -> None:
    changes = {"condition_dropout": share, "batch": 256, "optimizer": OptimizerSettings(lr=0.1)}
    task = prepare_task("teacher", settings, context, network, **changes)
    module: Any = task.modules["network"]
    before = module.label_embed.weight.detach().clone()
    # A new network is cut off behind its zero layers: gradients need three steps to arrive.
    for index in range(4):
        task.step(index)
    rows = (module.label_embed.weight != before).any(dim=1).nonzero()[:, 0].tolist()
    assert set(rows) == moved


def test_every_condition_is_dropped_to_what_stands_for_none(context: Context) -> None:
    """The contract knows no labels: a condition is whatever the batch carries."""
    x = torch.linspace(-1, 1, 20).reshape(5, 1, 2, 2)
    split = InMemory(x=x, conditions={"text": torch.arange(30.0).reshape(5, 3, 2), "size": torch.arange(5) + 1})
    null = {"text": torch.tensor([-1.0, -2.0]), "size": 0}
    own = dataclasses.replace(context, data=Dataset(name="mine", train=split, held_out=split, null=null))
    dropped = torch.tensor([True, False, False, True, False])
    found = without(split.read(torch.arange(5)), dropped, own)
    assert found["size"].tolist() == [0, 2, 3, 0, 5]
    assert found["text"][0].tolist() == found["text"][3].tolist() == [[-1, -2]] * 3
    assert torch.equal(found["text"][[1, 2, 4]], split.conditions["text"][[1, 2, 4]])


# ---- stage 1


def test_the_student_starts_as_the_teacher_at_every_r(settings: Settings, context: Context, network: nn.Module) -> None:
    task = prepare_task("trajectory", settings, context, network)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, *context.data.shape, generator=generator)
    t = torch.rand(40, generator=generator)
    labels = torch.arange(40) % 11
    expected = network(x, t, labels=labels)
    assert expected.std() > 0.05
    for share in (0.0, 0.3, 1.0):
        for name in ("student", "average"):
            assert torch.equal(task.modules[name](x, t, share * t, labels=labels), expected)
    student: Any = task.modules["student"]
    with torch.no_grad():
        student.interval_embed.mlp[2].bias.add_(1)
    assert not torch.allclose(student(x, t, 0 * t, labels=labels), expected)


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_stage_1_changes_the_student_and_never_the_teacher(
    derivative: Any, scale: float, settings: Settings, context: Context, network: nn.Module
) -> None:
    changes = {"meanflow": MeanFlowLoss(derivative=derivative), "guidance": GuidanceSettings(scale=scale)}
    task = prepare_task("trajectory", settings, context, network, **changes)
    everyone = {**task.modules, "teacher": network}
    for index in range(3):
        assert changed(lambda i=index: task.step(i), everyone) == {"student", "average"}
    assert with_gradients(everyone) == set()


@pytest.mark.parametrize(
    ("stage", "model"), [("teacher", "network"), ("trajectory", "student"), ("distribution", "student")]
)
def test_the_averages_follow_their_formula(
    stage: str, model: str, settings: Settings, context: Context, network: nn.Module
) -> None:
    task = prepare_task(stage, settings, context, network, ema=0.15)
    for index in (0, 3):
        before = snapshot(task.modules["average"])
        task.step(index)
        after, now = snapshot(task.modules["average"]), snapshot(task.modules[model])
        turn = index // settings.distribution.student_update_every if stage == "distribution" else index
        decay = min(0.15, (1 + turn) / (10 + turn))
        for name in before:
            torch.testing.assert_close(after[name], decay * before[name] + (1 - decay) * now[name])


@pytest.mark.parametrize(
    ("share", "recorded"),
    [
        (0.5, {"error_r_equal_t", "error_r_below_t"}),
        (0.0, {"error_r_equal_t"}),
        (1.0, {"error_r_below_t"}),
    ],
)
def test_stage_1_records_what_its_samples_were(
    share: float, recorded: set[str], settings: Settings, context: Context, network: nn.Module
) -> None:
    times = LogitNormalTimes(interval_share=share)
    record = prepare_task("trajectory", settings, context, network, times=times).step(0)
    assert {name for name in record if name.startswith("error_")} == recorded


def test_stage_1_draws_from_its_own_times_whatever_the_loss_holds(
    settings: Settings, context: Context, network: nn.Module
) -> None:
    records = []
    for held in (LogitNormalTimes(interval_share=0.0), LogitNormalTimes(interval_share=1.0)):
        task = prepare_task("trajectory", settings, context, network, meanflow=MeanFlowLoss(times=held))
        records.append(task.step(0))
    assert records[0] == records[1]


def test_stage_1_starts_at_its_teachers_error_of_zero(settings: Settings, context: Context, network: nn.Module) -> None:
    plain = prepare_task("trajectory", settings, context, network).step(0)
    # Student = teacher, so that where r = t there is nothing to learn.
    assert plain["error_r_equal_t"] == 0
    assert plain["error_r_below_t"] > 0
    guidance = GuidanceSettings(scale=3.0)
    assert prepare_task("trajectory", settings, context, network, guidance=guidance).step(0)["error_r_equal_t"] > 0


def test_stage_1_measures_the_student_against_the_teacher(
    settings: Settings, context: Context, network: nn.Module
) -> None:
    task = prepare_task("trajectory", settings, context, network)
    student: Any = task.modules["student"]
    with torch.no_grad():
        student.head.linear.bias.add_(0.5)
    assert task.step(0)["error_r_equal_t"] == pytest.approx(0.25, rel=1e-4)


def test_the_students_new_layer_depends_on_the_seed_alone(
    settings: Settings, context: Context, network: nn.Module
) -> None:
    def new_layer(noise: int, own: Context) -> Tensor:
        torch.manual_seed(noise)
        student: Any = prepare_task("trajectory", settings, own, network).modules["student"]
        weight: Tensor = student.interval_embed.mlp[0].weight
        return weight

    assert torch.equal(new_layer(1, context), new_layer(2, context))
    assert not torch.equal(new_layer(1, context), new_layer(1, dataclasses.replace(context, seed=99)))


# ---- stage 2


def test_stage_2_never_changes_the_teacher_and_the_student_only_in_its_turn(
    settings: Settings, context: Context, network: nn.Module
) -> None:
    start = hd_zoo.to_student(network)
    task = prepare_task("distribution", settings, context, network, start)
    everyone = {**task.modules, "teacher": network, "start": start}
    for index in range(7):
        expected = {"fake_score", "discriminator"} | ({"student", "average"} if index % 3 == 0 else set())
        assert changed(lambda i=index: task.step(i), everyone) == expected
    assert with_gradients(everyone) == set()
    assert not any(p.requires_grad for p in network.parameters())


VARIANTS: list[dict[str, Any]] = [
    {"pooling": "scorer"},
    {"pooling": "mean", "num_queries": 1},
    {"num_heads": 4, "num_queries": 2},
    {"merge": "concatenate"},
    {"pooling": "scorer", "merge": "concatenate", "num_heads": 2},
    {"pool_over": "logits"},
    {"pooling": "scorer", "pool_over": "logits"},
    {"pooling": "mean", "pool_over": "logits"},
]


def of_variant(settings: Settings, variant: dict[str, Any], **changes: Any) -> DiscriminatorSettings:
    """The settings' discriminator with another network."""
    own = settings.distribution.discriminator
    return dataclasses.replace(own, network=dataclasses.replace(own.network, **variant), **changes)


@pytest.mark.parametrize("gan_loss", ["softplus", "relativistic"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_stage_2_trains_with_every_kind_of_discriminator(
    variant: dict[str, Any], gan_loss: str, settings: Settings, context: Context, network: nn.Module
) -> None:
    own = of_variant(settings, variant, r1_weight=0.1, gan_loss=gan_loss)
    task = prepare_task("distribution", settings, context, network, discriminator=own)
    discriminator = task.modules["discriminator"]
    one_logit = own.network.merge == "concatenate"
    assert discriminator([torch.randn(3, 16, 16)] * 2).shape == (3, 1 if one_logit else 2)
    before = snapshot(discriminator)
    for index in range(4):
        record: dict[str, Any] = {}
        expected = {"fake_score", "discriminator"} | ({"student", "average"} if index % 3 == 0 else set())
        assert changed(lambda i=index, r=record: r.update(task.step(i)), task.modules) == expected
        assert {"discriminator_loss", "discriminator_accuracy", "r1"} <= record.keys()
        assert all(torch.as_tensor(value).isfinite() for value in record.values())
    for name, value in snapshot(discriminator).items():
        # A shift of all scores or, where pairs are compared, of all logits has no gradient.
        free = name.endswith(("scorer.2.bias", "mlp.2.bias"))
        assert free or not torch.equal(value, before[name]), f"{name} was not trained"


def test_distribution_matching_can_be_switched_off(settings: Settings, context: Context, network: nn.Module) -> None:
    task = prepare_task("distribution", settings, context, network, matching_weight=0.0)
    assert changed(lambda: task.step(0), task.modules) == {"student", "average", "discriminator"}
    assert not {"fake_score_loss", "velocity_gap"} & task.step(1).keys()


def test_the_discriminator_can_be_switched_off(settings: Settings, context: Context, network: nn.Module) -> None:
    start = moved_student(settings, context, network)
    task = prepare_task("distribution", settings, context, network, start, discriminator=OFF)
    task.step(0)
    assert changed(lambda: task.step(3), task.modules) == {"student", "average", "fake_score"}
    assert not {"discriminator_loss", "gan_loss"} & task.step(1).keys()


def test_stage_2_starts_from_the_student_and_its_fake_score_from_the_teacher(
    settings: Settings, context: Context, network: nn.Module
) -> None:
    start = moved_student(settings, context, network)
    task = prepare_task("distribution", settings, context, network, start)
    assert same(snapshot(task.modules["student"]), snapshot(start))
    assert same(snapshot(task.modules["average"]), snapshot(start))
    assert same(snapshot(task.modules["fake_score"]), snapshot(network))
    assert not {id(p) for p in start.parameters()} & {id(p) for p in task.modules["student"].parameters()}


def test_distribution_matching_starts_at_zero_where_fake_equals_teacher(
    settings: Settings, context: Context, network: nn.Module
) -> None:
    task = prepare_task("distribution", settings, context, network)
    first, later = task.step(0), task.step(3)
    assert first["velocity_gap"] == 0
    assert first["matching_gradient"] == 0
    assert later["velocity_gap"] > 0
    # Guidance stands in the real velocity alone.
    guidance = GuidanceSettings(scale=2.0)
    assert prepare_task("distribution", settings, context, network, guidance=guidance).step(0)["velocity_gap"] > 0


def test_each_network_is_called_as_often_as_needed_and_with_a_graph_only_where_one_is_needed(
    settings: Settings, context: Context, network: nn.Module
) -> None:
    batches: dict[str, list[tuple[int, bool]]] = {"teacher": [], "fake_score": [], "student": []}
    task = prepare_task("distribution", settings, context, network, guidance=GuidanceSettings(scale=2.0))
    for name, module in (("teacher", network), *((n, task.modules[n]) for n in ("fake_score", "student"))):

        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            batches[name].append((len(args[0]), output.requires_grad))

        module.register_forward_hook(note)
    task.step(0)
    # Guided real velocity: 2 B without a graph; D's look at the student's sample with one; D's own turn without.
    assert batches["teacher"] == [(16, False), (8, True), (8, False), (8, False)]
    assert batches["fake_score"] == [(8, False), (8, True)]
    assert batches["student"] == [(8, True)]
    for calls in batches.values():
        calls.clear()
    task.step(1)
    assert batches == {"teacher": [(8, False)] * 2, "fake_score": [(8, True)], "student": [(8, False)]}


@pytest.mark.parametrize("offset", [0.5, -0.5])
def test_distribution_matching_moves_samples_to_where_the_teacher_is(
    offset: float, settings: Settings, context: Context, network: nn.Module
) -> None:
    task = prepare_task("distribution", settings, context, network, discriminator=OFF)
    student = task.modules["student"]
    noise, one = torch.randn(20, 1, 8, 8), torch.ones(20)
    before = noise - student(noise, one, 0 * one)
    fake_score: Any = task.modules["fake_score"]
    with torch.no_grad():
        # A larger velocity points back to smaller clean images: the real ones lie above.
        fake_score.head.linear.bias.add_(offset)
    assert task.step(0)["velocity_gap"] == pytest.approx(0.5, abs=1e-5)
    after = noise - student(noise, one, 0 * one)
    assert (after - before).mean() * offset > 1e-3


def test_the_discriminator_looks_at_data_and_samples_in_this_order(
    settings: Settings, context: Context, network: nn.Module
) -> None:
    # Next to no noise: what the networks see is what they are shown.
    clean = UniformLevels(low=0.0, high=1e-6)
    own = DiscriminatorSettings(layers=("blocks.0",), noise_levels=clean)
    task = prepare_task("distribution", settings, context, network, discriminator=own, noise_levels=clean)
    seen: dict[str, list[Tensor]] = {"teacher": [], "fake_score": [], "student": []}
    for name, module in (("teacher", network), *((n, task.modules[n]) for n in ("fake_score", "student"))):

        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            seen[name].append(args[0] - output if name == "student" else args[0])

        module.register_forward_hook(note)
    task.step(1)
    real, (sample,) = context.batch(1, 8).x, seen["student"]
    torch.testing.assert_close(seen["fake_score"], [sample], rtol=0, atol=1e-4)
    torch.testing.assert_close(seen["teacher"], [real, sample], rtol=0, atol=1e-4)


def test_every_loss_has_noise_levels_of_its_own_and_the_discriminator_compares_at_equal_ones(
    settings: Settings, context: Context, network: nn.Module
) -> None:
    own = dataclasses.replace(settings.distribution.discriminator, noise_levels=UniformLevels(low=0.7, high=0.9))
    changes = {
        "noise_levels": UniformLevels(low=0.1, high=0.3),
        "fake_score_noise_levels": UniformLevels(low=0.4, high=0.6),
    }
    task = prepare_task("distribution", settings, context, network, discriminator=own, **changes)
    seen: dict[str, list[Tensor]] = {"teacher": [], "fake_score": []}
    for name, module in (("teacher", network), ("fake_score", task.modules["fake_score"])):

        def note(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            seen[name].append(args[1])

        module.register_forward_pre_hook(note)
    task.step(0)
    real_score, student_look, real_look, sample_look = seen["teacher"]
    fake_score, fake_score_turn = seen["fake_score"]
    for times, low, high in [(real_score, 0.1, 0.3), (fake_score_turn, 0.4, 0.6), (student_look, 0.7, 0.9)]:
        assert low <= times.min() < times.max() <= high
    assert torch.equal(fake_score, real_score)
    assert torch.equal(sample_look, real_look)
    assert 0.7 <= real_look.min() < real_look.max() <= 0.9


@pytest.mark.parametrize("gan_loss", ["softplus", "hinge", "relativistic"])
def test_the_discriminator_learns_to_tell_and_the_student_to_deceive(
    gan_loss: Any, settings: Settings, context: Context, network: nn.Module
) -> None:
    quick, still = (OptimizerSettings(lr=lr, warmup=0, schedule="constant") for lr in (5e-3, 1e-12))
    own = DiscriminatorSettings(layers=BOTH, gan_loss=gan_loss, optimizer=quick, gan_weight=1.0)
    changes = {"optimizer": still, "matching_weight": 0.0, "student_update_every": 1, "batch": 64}
    task = prepare_task("distribution", settings, context, network, discriminator=own, **changes)
    records = [task.step(index) for index in range(30)]
    assert records[-1]["discriminator_loss"] < 0.8 * records[0]["discriminator_loss"]
    if gan_loss != "relativistic":  # which compares pairs and leaves the logits' zero open
        assert records[-1]["discriminator_accuracy"] > 0.8
    task.optimizers["student"].settings = quick
    task.optimizers["discriminator"].settings = still
    gan_losses = [float(task.step(index)["gan_loss"]) for index in range(30, 50)]
    assert sum(gan_losses[-5:]) / 5 < sum(gan_losses[:5]) / 5 - 0.1


def test_the_discriminator_sees_the_same_features_that_the_tap_gives(
    settings: Settings, context: Context, network: nn.Module
) -> None:
    judge = prepare_judge(settings.distribution.discriminator, context, network)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 0.3), torch.arange(4)
    outputs: dict[str, Tensor] = {}
    for name in BOTH:
        module = network.get_submodule(name)
        module.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
    logits = judge.logits(x, t, {"labels": labels})
    torch.testing.assert_close(logits, judge.discriminator([outputs[name] for name in BOTH]))


def test_the_students_step_is_a_weighted_sum_of_its_two_losses(
    settings: Settings, context: Context, network: nn.Module
) -> None:
    """The loss that reaches the optimiser is linear in the two weights."""

    def loss_at(matching: float, gan: float) -> float:
        own = dataclasses.replace(
            settings.distribution,
            matching_weight=matching,
            discriminator=dataclasses.replace(settings.distribution.discriminator, gan_weight=gan),
        )
        judge = prepare_judge(own.discriminator, context, network)
        student = hd_zoo.to_student(network)
        moved = hd_zoo.to_student(network)
        with torch.no_grad():
            moved.get_parameter("head.linear.bias").add_(0.3)
        everyone = Networks(
            student=student, average=student, fake_score=moved, teacher=network, real_score=network, judge=judge
        )
        seen: list[float] = []

        class Noting(Optimizer):
            def update(self, loss: Tensor, step: int) -> Tensor:
                seen.append(float(loss.detach()))
                return loss.detach()

        optimizer = Noting(student, own.optimizer, 1)
        batch = context.batch(0, 8)
        sample = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        student_step(own, context, everyone, optimizer, batch, sample, generator, 0)
        return seen[0]

    # Distribution matching draws first: the discriminator's part draws the same numbers only beside it.
    one, two = loss_at(1.0, 0.5), loss_at(2.0, 0.5)
    assert loss_at(3.0, 0.5) - two == pytest.approx(two - one, rel=1e-4)
    three, four = loss_at(1.0, 1.0), loss_at(1.0, 1.5)
    assert four - three == pytest.approx(three - one, rel=1e-4)
    assert min(two - one, three - one) > 1e-3


# ---- what the stages stand on


def test_missing_layers_are_a_users_error(settings: Settings, context: Context, network: nn.Module) -> None:
    own = DiscriminatorSettings(layers=("blocks.7",))
    with pytest.raises(UserError, match=r"discriminator\.layers: .*'blocks\.7'.*nearest: "):
        prepare_task("distribution", settings, context, network, discriminator=own)


def test_guidance_wraps_the_teacher_only_where_it_is_asked_for(network: nn.Module) -> None:
    null = {"labels": 10}
    assert guided(network, GuidanceSettings(), null) is network
    x, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5), torch.arange(4)
    conditional, unconditional = network(x, t, labels=labels), network(x, t, labels=torch.full((4,), 10))
    output = guided(network, GuidanceSettings(scale=3.0), null)(x, t, labels=labels)
    torch.testing.assert_close(output, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-5)
    outside = guided(network, GuidanceSettings(scale=3.0, interval=(0.6, 1.0)), null)(x, t, labels=labels)
    torch.testing.assert_close(outside, conditional, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"guidance scale 2\.0 needs a condition"):
        guided(hd_zoo.create_model("dit_nano_2", classes=0), GuidanceSettings(scale=2.0), {})


@pytest.mark.parametrize("model", [("dit_micro_4", {"classes": 10}), ("dit_nano_2", {"classes": 4})])
def test_a_network_for_other_images_is_refused(
    model: tuple[str, dict[str, int]], context: Context, tmp_path: Path
) -> None:
    hd_zoo.save_pretrained(hd_zoo.create_model(model[0], **model[1]), tmp_path)
    with pytest.raises(UserError, match=r"is for samples .* classes, the data set 'digits' has \(1, 8, 8\)"):
        load_network(tmp_path, context.data, context.device)


# ---- the discriminator on disk


def features() -> list[Tensor]:
    """Two layers of sixteen tokens."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(3, 16, 16, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("variant", [{}, *VARIANTS], ids=str)
def test_every_kind_of_discriminator_goes_to_disk_and_back(
    variant: dict[str, Any], settings: Settings, context: Context, network: nn.Module, tmp_path: Path
) -> None:
    own = of_variant(settings, variant, noise_levels=UniformLevels(low=0.1, high=0.9))
    judge = prepare_judge(own, context, network)
    with torch.no_grad():
        for parameter in judge.discriminator.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_discriminator(judge, tmp_path)
    loaded, layers = load_discriminator(tmp_path)
    assert layers == BOTH
    assert torch.equal(loaded(features()), judge.discriminator(features()))
    facts = json.loads((tmp_path / "discriminator.json").read_text())
    assert facts["network"].items() >= {"num_heads": 1, "merge": "logits", "pool_over": "features", **variant}.items()
    assert facts["noise_levels"].items() >= {"low": 0.1, "high": 0.9}.items()


def test_a_discriminator_of_the_first_format_is_read() -> None:
    folder = Path(__file__).parent / "data" / "run_of_0.1.0" / "distribution"
    loaded, layers = load_discriminator(folder)
    assert layers == ("blocks.0",)
    assert loaded([torch.randn(3, 16, 16)]).shape == (3, 1)
    assert loaded.token_weights([torch.randn(3, 16, 16)])[0].shape == (3, 4, 16)


def test_a_discriminator_from_before_the_variants_is_read(
    settings: Settings, context: Context, network: nn.Module, tmp_path: Path
) -> None:
    judge = prepare_judge(settings.distribution.discriminator, context, network)
    save_discriminator(judge, tmp_path)
    path = tmp_path / "discriminator.json"
    own = settings.distribution.discriminator.network
    then = {
        "widths": [16, 16],
        "pooling": own.pooling,
        "queries": own.num_queries,
        "head_width": own.head_width,
        "hidden": own.hidden,
        "layers": list(BOTH),
        "levels": [0.02, 0.98],
    }
    path.write_text(json.dumps(then))
    assert torch.equal(load_discriminator(tmp_path)[0](features()), judge.discriminator(features()))


@pytest.mark.parametrize(
    "damage",
    [
        {"widths": None},
        {"layers": None},
        {"network": None},
        {"network": {"merge": "sum"}},
        {"network": {"num_heads": 3}},
        {"network": {"pool_over": 1}},
        {"network": {"pooling": "max"}},
        {"network": {"num_queries": "4"}},
        {"network": {"colour": 4}},
        {"widths": [16, 17]},
        {"widths": 16},
        {"widths": ["a", "b"]},
        {"layers": 3},
    ],
    ids=str,
)
def test_damaged_facts_of_a_discriminator_are_refused(
    damage: dict[str, Any], settings: Settings, context: Context, network: nn.Module, tmp_path: Path
) -> None:
    save_discriminator(prepare_judge(settings.distribution.discriminator, context, network), tmp_path)
    path = tmp_path / "discriminator.json"
    facts = json.loads(path.read_text())
    for name, value in damage.items():
        if value is None:
            del facts[name]
        elif isinstance(value, dict):
            facts[name] |= value
        else:
            facts[name] = value
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"discriminator in .* is damaged") as caught:
        load_discriminator(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_weights_of_a_discriminator_are_refused(
    settings: Settings, context: Context, network: nn.Module, tmp_path: Path
) -> None:
    save_discriminator(prepare_judge(settings.distribution.discriminator, context, network), tmp_path)
    (tmp_path / "discriminator.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"discriminator\.safetensors is missing or damaged"):
        load_discriminator(tmp_path)
