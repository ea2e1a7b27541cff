"""Gradient routing of the real stages: who is changed by which loss, and who never."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hd_zoo
from hd_trainer import UserError
from hd_trainer.loop import Task
from hd_trainer.optim import Optimizer, OptimizerSettings
from hd_trainer.stages.common import Context, guided, load_network
from hd_trainer.stages.critic import AdversarySettings, load_discriminator, save_discriminator

Snapshot = Callable[[nn.Module], dict[str, Tensor]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]


@pytest.fixture
def changed(snapshot: Snapshot, same: Same) -> Callable[..., set[str]]:
    """``changed(act, modules)``: names of the modules whose state ``act()`` changed in any bit."""

    def run(act: Callable[[], Any], modules: dict[str, nn.Module]) -> set[str]:
        before = {name: snapshot(module) for name, module in modules.items()}
        act()
        return {name for name, module in modules.items() if not same(before[name], snapshot(module))}

    return run


def spy(monkeypatch: pytest.MonkeyPatch, task: Task, look: Callable[[str, Tensor, Callable[[], Any]], Any]) -> None:
    """Call ``look(name, loss, update)`` in place of every optimiser's update."""
    for name, optimizer in task.optimizers.items():

        def update(loss: Tensor, step: int, steps: int, name: str = name, real: Any = optimizer.update) -> Any:
            return look(name, loss, lambda: real(loss, step, steps))

        monkeypatch.setattr(optimizer, "update", update)


def reached(loss: Tensor, module: nn.Module) -> bool:
    """Whether a backward pass from the loss would arrive at any of the module's parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        return False
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return any(gradient is not None for gradient in found)


# ---- teacher


def test_a_teacher_step_changes_network_and_average(
    prepare: Callable[..., Task], changed: Callable[..., set[str]], same: Same, snapshot: Snapshot
) -> None:
    task = prepare("teacher")
    assert changed(lambda: task.step(0), task.modules) == {"network", "average"}
    assert not same(snapshot(task.modules["network"]), snapshot(task.modules["average"]))


def test_dropped_labels_train_the_null_class_alone(prepare: Callable[..., Task]) -> None:
    for share, moved in ((1.0, {10}), (0.0, set(range(10)))):
        task = prepare("teacher", label_dropout=share, batch=256, optimizer=OptimizerSettings(lr=0.1))
        embedding = task.modules["network"].label_embed.weight
        before = embedding.detach().clone()
        # A new network is cut off behind its zero layers: gradients need three steps to arrive.
        for index in range(4):
            task.step(index)
        rows = (embedding != before).any(dim=1).nonzero()[:, 0].tolist()
        assert set(rows) == moved


# ---- stage 1


def test_the_student_starts_as_the_teacher_at_every_r(
    prepare: Callable[..., Task], network: nn.Module, context: Context
) -> None:
    task = prepare("trajectory")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, *context.data.shape, generator=generator)
    t = torch.rand(40, generator=generator)
    labels = torch.arange(40) % 11
    expected = network(x, t, labels=labels)
    assert expected.std() > 0.05
    for share in (0.0, 0.3, 1.0):
        for name in ("student", "average"):
            assert torch.equal(task.modules[name](x, t, share * t, labels=labels), expected)
    with torch.no_grad():
        task.modules["student"].interval_embed.mlp[2].bias.add_(1)
    assert not torch.allclose(task.modules["student"](x, t, 0 * t, labels=labels), expected)


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_stage_1_changes_the_student_and_never_the_teacher(
    derivative: str, scale: float, prepare: Callable[..., Task], network: nn.Module, changed: Any
) -> None:
    task = prepare("trajectory", derivative=derivative, guidance_scale=scale)
    everyone = {**task.modules, "teacher": network}
    for index in range(3):
        assert changed(lambda i=index: task.step(i), everyone) == {"student", "average"}
    assert all(p.grad is None for module in everyone.values() for p in module.parameters())


def test_the_averages_follow_their_formula(prepare: Callable[..., Task], snapshot: Snapshot) -> None:
    for stage, model in (("teacher", "network"), ("trajectory", "student"), ("distribution", "student")):
        task = prepare(stage, ema=0.15)
        for index, decay in ((0, 0.1), (3, 0.15)):
            before = snapshot(task.modules["average"])
            task.step(index)
            after, now = snapshot(task.modules["average"]), snapshot(task.modules[model])
            turn = 1 if stage == "distribution" and index else index
            decay = min(0.15, (1 + turn) / (10 + turn))
            for name in before:
                torch.testing.assert_close(after[name], decay * before[name] + (1 - decay) * now[name])


def test_stage_1_records_what_its_samples_were(prepare: Callable[..., Task]) -> None:
    both = {"error_at_r_equal_t", "error_at_intervals"}
    assert both <= prepare("trajectory").step(0).keys()
    assert both & prepare("trajectory", interval_share=0.0).step(0).keys() == {"error_at_r_equal_t"}
    assert both & prepare("trajectory", interval_share=1.0).step(0).keys() == {"error_at_intervals"}


def test_stage_1_starts_at_its_teachers_error_of_zero(prepare: Callable[..., Task]) -> None:
    # Student = teacher, so that where r = t there is nothing to learn.
    assert prepare("trajectory").step(0)["error_at_r_equal_t"] == 0
    assert prepare("trajectory").step(0)["error_at_intervals"] > 0
    assert prepare("trajectory", guidance_scale=3.0).step(0)["error_at_r_equal_t"] > 0


def test_stage_1_measures_the_student_against_the_teacher(prepare: Callable[..., Task]) -> None:
    task = prepare("trajectory")
    with torch.no_grad():
        task.modules["student"].head.linear.bias.add_(0.5)
    assert task.step(0)["error_at_r_equal_t"] == pytest.approx(0.25, rel=1e-4)


def test_the_students_new_layer_depends_on_the_seed_alone(prepare: Callable[..., Task]) -> None:
    weights = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        weights.append(prepare("trajectory").modules["student"].interval_embed.mlp[0].weight)
    assert torch.equal(*weights)


# ---- stage 2


def test_stage_2_never_changes_the_teacher_and_the_student_only_in_its_turn(
    prepare: Callable[..., Task], network: nn.Module, changed: Any
) -> None:
    start = hd_zoo.to_student(network)
    task = prepare("distribution", start=start)
    everyone = {**task.modules, "teacher": network, "start": start}
    for index in range(7):
        expected = {"fake", "discriminator"} | ({"student", "average"} if index % 3 == 0 else set())
        assert changed(lambda i=index: task.step(i), everyone) == expected
    assert all(p.grad is None for module in everyone.values() for p in module.parameters())
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("loss", ["softplus", "hinge", "relativistic"])
def test_every_loss_of_stage_2_reaches_its_own_network_only(
    loss: str,
    prepare: Callable[..., Task],
    network: nn.Module,
    changed: Any,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Any,
) -> None:
    adversary = AdversarySettings(layers=("blocks.0", "blocks.1"), loss=loss, weight=0.5, r1_weight=0.1)
    task = prepare("distribution", adversary=adversary)
    everyone = {**task.modules, "teacher": network}
    turns: list[str] = []

    def look(name: str, value: Tensor, update: Callable[[], Any]) -> Any:
        turns.append(name)
        arrives = {other for other, module in everyone.items() if reached(value, module)}
        # The student's loss passes through the discriminator; its update must not follow it there.
        assert arrives == ({"student", "discriminator"} if name == "student" else {name})
        result = []
        assert changed(lambda: result.append(update()), everyone) == {name}
        return result[0]

    spy(monkeypatch, task, look)
    for index in range(4):
        record = task.step(index)
        assert "r1" in record
    critics = ["fake", "discriminator"]
    assert turns == ["student", *critics, *critics, *critics, "student", *critics]


VARIANTS: list[dict[str, Any]] = [
    {"pooling": "scorer"},
    {"pooling": "mean", "queries": 1},
    {"heads": 4, "queries": 2},
    {"merge": "concatenate"},
    {"pooling": "scorer", "merge": "concatenate", "heads": 2},
    {"weighed": "logits"},
    {"pooling": "scorer", "weighed": "logits"},
    {"pooling": "mean", "weighed": "logits"},
]


@pytest.mark.parametrize("loss", ["softplus", "relativistic"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_stage_2_trains_with_every_kind_of_discriminator(
    variant: dict[str, Any], loss: str, prepare: Callable[..., Task], snapshot: Snapshot, changed: Any, tiny: Any
) -> None:
    adversary = dataclasses.replace(tiny.distribution.adversary, r1_weight=0.1, loss=loss, **variant)
    task = prepare("distribution", adversary=adversary)
    discriminator = task.modules["discriminator"]
    one_logit = adversary.merge == "concatenate"
    assert discriminator([torch.randn(3, 16, 16)] * 2).shape == (3, 1 if one_logit else 2)
    before = snapshot(discriminator)
    for index in range(4):
        record: dict[str, Any] = {}
        expected = {"fake", "discriminator"} | ({"student", "average"} if index % 3 == 0 else set())
        assert changed(lambda i=index, r=record: r.update(task.step(i)), task.modules) == expected
        assert {"discriminator", "told_apart", "r1"} <= record.keys()
        assert all(torch.as_tensor(value).isfinite() for value in record.values())
    for name, value in snapshot(discriminator).items():
        # A shift of all scores or, where pairs are compared, of all logits has no gradient.
        free = name.endswith(("scorer.2.bias", "mlp.2.bias"))
        assert free or not torch.equal(value, before[name]), f"{name} was not trained"


def test_each_part_of_stage_2_can_be_switched_off(prepare: Callable[..., Task], changed: Any, tiny: Any) -> None:
    alone = prepare("distribution", matching_weight=0.0)
    assert changed(lambda: alone.step(0), alone.modules) == {"student", "average", "discriminator"}
    assert not {"fake_score", "velocity_gap"} & alone.step(1).keys()
    quiet = AdversarySettings(layers=("blocks.0",), weight=0.0)
    # A student that has moved: where it equals the teacher, distribution matching has nothing to say.
    moved = prepare("trajectory")
    moved.step(0)
    task = prepare("distribution", adversary=quiet, start=moved.modules["student"])
    task.step(0)
    assert changed(lambda: task.step(3), task.modules) == {"student", "average", "fake"}
    assert not {"discriminator", "student_adversarial"} & task.step(1).keys()


def test_stage_2_starts_from_the_student_and_its_fake_score_from_the_teacher(
    prepare: Callable[..., Task], network: nn.Module, snapshot: Snapshot, same: Same
) -> None:
    moved = prepare("trajectory")
    moved.step(0)
    start = moved.modules["student"]
    task = prepare("distribution", start=start)
    assert same(snapshot(task.modules["student"]), snapshot(start))
    assert same(snapshot(task.modules["average"]), snapshot(start))
    assert same(snapshot(task.modules["fake"]), snapshot(network))
    assert not {id(p) for p in start.parameters()} & {id(p) for p in task.modules["student"].parameters()}


def test_distribution_matching_starts_at_zero_where_fake_equals_teacher(
    prepare: Callable[..., Task],
) -> None:
    first, later = (task := prepare("distribution")).step(0), task.step(3)
    assert first["velocity_gap"] == 0
    assert first["matching_gradient"] == 0
    assert later["velocity_gap"] > 0
    # Guidance stands in the real velocity alone.
    assert prepare("distribution", guidance_scale=2.0).step(0)["velocity_gap"] > 0


def test_critics_follow_the_students_own_samples(prepare: Callable[..., Task], network: nn.Module) -> None:
    """In the critics' turn the networks see what student and data really are, noised."""
    batches: dict[str, list[tuple[int, bool]]] = {"teacher": [], "fake": [], "student": []}
    task = prepare("distribution", guidance_scale=2.0)
    hooks = []
    for name, module in (("teacher", network), *((n, task.modules[n]) for n in ("fake", "student"))):

        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            batches[name].append((len(args[0]), output.requires_grad))

        hooks.append(module.register_forward_hook(note))
    task.step(0)
    # Guided real velocity: 2 B without a graph; D's look at the student's sample with one; D's own turn without.
    assert batches["teacher"] == [(16, False), (8, True), (8, False), (8, False)]
    assert batches["fake"] == [(8, False), (8, True)]
    assert batches["student"] == [(8, True)]
    for calls in batches.values():
        calls.clear()
    task.step(1)
    assert batches == {"teacher": [(8, False)] * 2, "fake": [(8, True)], "student": [(8, False)]}


def test_distribution_matching_moves_samples_to_where_the_teacher_is(prepare: Callable[..., Task]) -> None:
    quiet = AdversarySettings(layers=("blocks.0",), weight=0.0)
    for offset in (0.5, -0.5):
        task = prepare("distribution", adversary=quiet)
        student = task.modules["student"]
        noise, one = torch.randn(20, 1, 8, 8), torch.ones(20)
        before = noise - student(noise, one, 0 * one)
        with torch.no_grad():
            # A larger velocity points back to smaller clean images: the real ones lie above.
            task.modules["fake"].head.linear.bias.add_(offset)
        assert task.step(0)["velocity_gap"] == pytest.approx(0.5, abs=1e-5)
        after = noise - student(noise, one, 0 * one)
        assert (after - before).mean() * offset > 1e-3


def test_the_critics_look_at_samples_and_data_in_this_order(
    prepare: Callable[..., Task], network: nn.Module, context: Context
) -> None:
    # Next to no noise: what they see is what they are shown.
    clean = (0.0, 1e-6)
    adversary = AdversarySettings(layers=("blocks.0",), levels=clean)
    task = prepare("distribution", adversary=adversary, levels=clean)
    seen: dict[str, list[Tensor]] = {"teacher": [], "fake": [], "student": []}
    for name, module in (("teacher", network), *((n, task.modules[n]) for n in ("fake", "student"))):

        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            seen[name].append(args[0] - output if name == "student" else args[0])

        module.register_forward_hook(note)
    task.step(1)
    real, (sample,) = context.batch(1, 8)[0], seen["student"]
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(seen["fake"], [sample], **close)
    torch.testing.assert_close(seen["teacher"], [real, sample], **close)


@pytest.mark.parametrize("loss", ["softplus", "hinge", "relativistic"])
def test_the_adversary_learns_to_tell_and_the_student_to_deceive(loss: str, prepare: Callable[..., Task]) -> None:
    quick, still = (OptimizerSettings(lr=lr, warmup=0, schedule="constant") for lr in (5e-3, 1e-12))
    adversary = AdversarySettings(layers=("blocks.0", "blocks.1"), loss=loss, optimizer=quick, weight=1.0)
    task = prepare("distribution", adversary=adversary, optimizer=still, matching_weight=0.0, student_every=1, batch=64)
    records = [task.step(index) for index in range(30)]
    assert records[-1]["discriminator"] < 0.8 * records[0]["discriminator"]
    if loss != "relativistic":  # which compares pairs and leaves the logits' zero open
        assert records[-1]["told_apart"] > 0.8
    task.optimizers["student"].settings = quick
    task.optimizers["discriminator"].settings = still
    deceit = [task.step(index)["student_adversarial"] for index in range(30, 50)]
    assert sum(deceit[-5:]) / 5 < sum(deceit[:5]) / 5 - 0.1


def test_every_optimiser_owns_its_module(prepare: Callable[..., Task]) -> None:
    for stage in ("teacher", "trajectory", "distribution"):
        task = prepare(stage)
        owned = {name: {id(p) for p in opt.parameters} for name, opt in task.optimizers.items()}
        for name, ids in owned.items():
            assert ids == {id(p) for p in task.modules[name].parameters()}
        assert set(task.modules) - set(owned) == {"average"}
        assert all(isinstance(opt, Optimizer) for opt in task.optimizers.values())


def test_the_grid_has_a_column_for_every_class(context: Context) -> None:
    noise, labels = context.grid_inputs()
    assert labels.reshape(-1, 10).unique(dim=0).tolist() == [list(range(10))]
    assert noise.shape == (len(labels), 1, 8, 8)
    assert torch.equal(noise, context.grid_inputs()[0])


def test_missing_layers_are_a_users_error(prepare: Callable[..., Task]) -> None:
    with pytest.raises(UserError, match=r"adversary\.layers: .*'blocks\.7'.*nearest: "):
        prepare("distribution", adversary=AdversarySettings(layers=("blocks.7",)))


def test_guidance_wraps_the_teacher_only_where_it_is_asked_for(network: nn.Module) -> None:
    assert guided(network, 1.0, (0.0, 1.0)) is network
    x, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5), torch.arange(4)
    conditional, null = network(x, t, labels=labels), network(x, t, labels=torch.full((4,), 10))
    output = guided(network, 3.0, (0.0, 1.0))(x, t, labels=labels)
    torch.testing.assert_close(output, null + 3 * (conditional - null), rtol=1e-4, atol=1e-5)
    plain = hd_zoo.create_model("dit_nano_2", classes=0)
    with pytest.raises(UserError, match="class-conditional"):
        guided(plain, 2.0, (0.0, 1.0))


@pytest.mark.parametrize("model", [("dit_micro_4", {"classes": 10}), ("dit_nano_2", {"classes": 4})])
def test_a_network_for_other_images_is_refused(
    model: tuple[str, dict[str, int]], context: Context, tmp_path: Any
) -> None:
    hd_zoo.save_pretrained(hd_zoo.create_model(model[0], **model[1]), tmp_path)
    with pytest.raises(UserError, match=r"is for images .* classes, the data set 'digits' has \(1, 8, 8\)"):
        load_network(tmp_path, context.data, context.device)


def test_a_discriminator_goes_to_disk_and_back(prepare: Callable[..., Task], tmp_path: Any) -> None:
    task = prepare("distribution")
    task.step(0)
    trained = task.modules["discriminator"]
    settings = AdversarySettings(layers=("blocks.0", "blocks.1"), levels=(0.1, 0.9))
    save_discriminator(trained, settings, tmp_path)
    loaded, layers, levels = load_discriminator(tmp_path)
    assert (layers, levels) == (("blocks.0", "blocks.1"), (0.1, 0.9))
    features = [torch.randn(3, 16, 16), torch.randn(3, 16, 16)]
    assert torch.equal(loaded(features), trained(features))
    (tmp_path / "discriminator.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"discriminator in .* is damaged"):
        load_discriminator(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_kind_of_discriminator_goes_to_disk_and_back(
    variant: dict[str, Any], prepare: Callable[..., Task], tiny: Any, tmp_path: Any
) -> None:
    settings = dataclasses.replace(tiny.distribution.adversary, **variant)
    task = prepare("distribution", adversary=settings)
    task.step(0)
    save_discriminator(task.modules["discriminator"], settings, tmp_path)
    loaded, *_ = load_discriminator(tmp_path)
    features = [torch.randn(3, 16, 16), torch.randn(3, 16, 16)]
    assert torch.equal(loaded(features), task.modules["discriminator"](features))
    facts = json.loads((tmp_path / "discriminator.json").read_text())
    assert facts.items() >= {"heads": 1, "merge": "logits", "weighed": "vectors", **variant}.items()


def test_a_discriminator_from_before_the_variants_is_read_and_a_damaged_one_is_not(
    prepare: Callable[..., Task], tiny: Any, tmp_path: Any
) -> None:
    trained = prepare("distribution").modules["discriminator"]
    save_discriminator(trained, tiny.distribution.adversary, tmp_path)
    path = tmp_path / "discriminator.json"
    facts = json.loads(path.read_text())
    old = {name: value for name, value in facts.items() if name not in ("heads", "merge", "weighed")}
    path.write_text(json.dumps(old))
    features = [torch.randn(3, 16, 16), torch.randn(3, 16, 16)]
    assert torch.equal(load_discriminator(tmp_path)[0](features), trained(features))
    for name in ("widths", "pooling", "queries", "head_width", "hidden", "layers", "levels"):
        path.write_text(json.dumps({key: value for key, value in facts.items() if key != name}))
        with pytest.raises(UserError, match=rf"discriminator in .* is damaged \('{name}'\)"):
            load_discriminator(tmp_path)
    for change in ({"merge": "sum"}, {"heads": 3}, {"weighed": 1}, {"pooling": "max"}, {"queries": "4"}):
        path.write_text(json.dumps({**facts, **change}))
        with pytest.raises(UserError, match=r"discriminator in .* is damaged"):
            load_discriminator(tmp_path)
