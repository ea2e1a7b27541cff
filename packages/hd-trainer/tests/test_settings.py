"""Settings: there and back through JSON, and every impossible one refused by name."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from trainer_helpers import tiny_settings

import hd_awd
from hd_awd import DiscriminatorConfig
from hd_dmd import KarrasLevels, LogitNormalLevels, UniformLevels
from hd_meanflow import LogitNormalTimes, MeanFlowGuidance, MeanFlowLoss, UniformTimes
from hd_trainer import Settings, UserError, list_recipes, load_recipe
from hd_trainer.earlier import FORMAT
from hd_trainer.engine.loop import LoopSettings
from hd_trainer.engine.optimizer import OptimizerSettings
from hd_trainer.evaluation import EvaluationSettings
from hd_trainer.networks import GuidanceSettings, ModelSettings
from hd_trainer.pipeline import check, context_of
from hd_trainer.recipes import RECIPES
from hd_trainer.run_folder import read_settings
from hd_trainer.settings import differences, settings_from_json, to_json
from hd_trainer.stages.discriminator import DiscriminatorSettings
from hd_trainer.stages.distribution import DistributionSettings
from hd_trainer.stages.teacher import TeacherSettings
from hd_trainer.stages.trajectory import TrajectorySettings

FIRST_FORMAT = Path(__file__).parent / "data" / "run_of_0.1.0"


def through_json(settings: Settings) -> Settings:
    """Written as text and read again."""
    return settings_from_json(json.loads(json.dumps(to_json(settings))), "here")


def with_discriminator(settings: Settings, **changes: Any) -> Settings:
    """The settings with the discriminator's changed."""
    own = dataclasses.replace(settings.distribution.discriminator, **changes)
    return dataclasses.replace(settings, distribution=dataclasses.replace(settings.distribution, discriminator=own))


# ---- there and back


@pytest.mark.parametrize("smoke", [False, True])
def test_settings_go_through_json_and_back(smoke: bool) -> None:
    ours = load_recipe("digits", smoke=smoke)
    assert through_json(ours) == ours
    assert isinstance(through_json(ours).distribution.discriminator.layers, tuple)
    assert to_json(ours)["format"] == FORMAT


def test_none_and_changed_values_survive(settings: Settings) -> None:
    evaluation = dataclasses.replace(settings.evaluation, samples=None, teacher_steps=(2,))
    ours = dataclasses.replace(settings, seed=9, evaluation=evaluation)
    assert through_json(ours) == ours


@pytest.mark.parametrize("levels", [UniformLevels(high=0.7), LogitNormalLevels(), KarrasLevels()], ids=repr)
def test_every_law_of_noise_levels_survives(levels: Any, settings: Settings) -> None:
    distribution = dataclasses.replace(settings.distribution, noise_levels=levels, fake_score_noise_levels=levels)
    ours = dataclasses.replace(settings, distribution=distribution)
    assert through_json(ours) == ours
    assert type(through_json(ours).distribution.fake_score_noise_levels) is type(levels)


def test_the_settings_of_the_leaves_survive(settings: Settings) -> None:
    trajectory = dataclasses.replace(
        settings.trajectory,
        times=LogitNormalTimes(mean=0.3, interval_share=0.9),
        meanflow=MeanFlowLoss(p=0.5, derivative="difference"),
        guidance=GuidanceSettings(scale=1.5, interval=(0.1, 0.8)),
    )
    distribution = dataclasses.replace(settings.distribution, noise_levels=UniformLevels(low=0.2, high=0.4))
    ours = dataclasses.replace(settings, trajectory=trajectory, distribution=distribution)
    assert through_json(ours) == ours


def test_variants_go_through_json_and_older_files_get_the_defaults(settings: Settings) -> None:
    network = DiscriminatorConfig(pooling="scorer", merge="concatenate", num_heads=4, num_queries=2)
    ours = with_discriminator(settings, network=network)
    values = json.loads(json.dumps(to_json(ours)))
    assert settings_from_json(values, "here") == ours
    for name in ("num_heads", "merge", "pool_over"):
        del values["distribution"]["discriminator"]["network"][name]
    plain = settings_from_json(values, "here").distribution.discriminator.network
    assert plain == DiscriminatorConfig(pooling="scorer", num_queries=2)
    assert (plain.num_heads, plain.merge, plain.pool_over) == (1, "logits", "features")


# ---- files of the first format


def test_settings_of_the_first_format_are_read() -> None:
    found = read_settings(FIRST_FORMAT)
    then = json.loads((FIRST_FORMAT / "recipe.json").read_text())
    teacher, trajectory, distribution = (then[stage] for stage in ("teacher", "trajectory", "distribution"))
    adversary = distribution["adversary"]
    assert found.teacher.condition_dropout == teacher["label_dropout"]
    assert found.teacher.times == LogitNormalTimes(mean=0.0, std=1.0, interval_share=0.0)
    assert found.trajectory.times == LogitNormalTimes(mean=-0.4, std=1.0, interval_share=0.5, endpoint_share=0.5)
    assert (found.trajectory.meanflow.p, found.trajectory.meanflow.c) == (trajectory["p"], trajectory["c"])
    assert found.distribution.student_update_every == distribution["student_every"]
    assert found.distribution.fake_score_optimizer.lr == distribution["fake_optimizer"]["lr"]
    assert found.distribution.noise_levels == UniformLevels(low=0.02, high=0.98)
    assert found.distribution.discriminator.network == DiscriminatorConfig(
        pooling="attention", pool_over="features", num_queries=4, num_heads=1, head_width=16, hidden=16
    )
    assert found.distribution.discriminator.gan_weight == adversary["weight"]
    assert found.distribution.discriminator.optimizer.betas == (0.0, 0.99)
    assert found.evaluation.guidance == GuidanceSettings(scale=1.0, interval=(0.0, 1.0))


@pytest.mark.parametrize(
    ("path", "value", "now"),
    [
        ("teacher.label_dropout", 0.3, "teacher.condition_dropout"),
        ("teacher.time_std", 0.7, "teacher.times.std"),
        ("trajectory.interval_share", 0.6, "trajectory.times.interval_share"),
        ("trajectory.endpoint_share", 0.1, "trajectory.times.endpoint_share"),
        ("trajectory.time_mean", 0.2, "trajectory.times.mean"),
        ("trajectory.c", 0.5, "trajectory.meanflow.c"),
        ("trajectory.derivative", "difference", "trajectory.meanflow.derivative"),
        ("trajectory.guidance_scale", 2.0, "trajectory.guidance.scale"),
        ("trajectory.guidance_interval", [0.1, 0.9], "trajectory.guidance.interval"),
        ("distribution.guidance_scale", 3.0, "distribution.guidance.scale"),
        ("evaluation.guidance_scale", 4.0, "evaluation.guidance.scale"),
        ("distribution.student_every", 2, "distribution.student_update_every"),
        ("distribution.fake_optimizer.lr", 0.1, "distribution.fake_score_optimizer.lr"),
        ("distribution.adversary.loss", "hinge", "distribution.discriminator.gan_loss"),
        ("distribution.adversary.r1_weight", 0.1, "distribution.discriminator.r1_weight"),
        ("distribution.adversary.layers", ["blocks.1"], "distribution.discriminator.layers"),
        ("distribution.adversary.optimizer.lr", 0.2, "distribution.discriminator.optimizer.lr"),
        ("distribution.adversary.pooling", "mean", "distribution.discriminator.network.pooling"),
        ("distribution.adversary.queries", 3, "distribution.discriminator.network.num_queries"),
        ("distribution.adversary.heads", 2, "distribution.discriminator.network.num_heads"),
    ],
)
def test_every_renamed_setting_keeps_its_value(path: str, value: Any, now: str) -> None:
    values = json.loads((FIRST_FORMAT / "recipe.json").read_text())
    entry = values
    *parents, name = path.split(".")
    for parent in parents:
        entry = entry[parent]
    assert name in entry
    entry[name] = value
    found: Any = settings_from_json(values, "here")
    for name in now.split("."):
        found = getattr(found, name)
    assert found == (tuple(value) if isinstance(value, list) else value)


def test_renamed_values_and_pairs_of_the_first_format() -> None:
    values = json.loads((FIRST_FORMAT / "recipe.json").read_text())
    adversary = values["distribution"]["adversary"]
    adversary |= {"weighed": "logits", "levels": [0.1, 0.5]}
    values["distribution"]["levels"] = [0.2, 0.6]
    found = settings_from_json(values, "here").distribution
    assert found.discriminator.network.pool_over == "logits"
    assert found.discriminator.noise_levels == UniformLevels(low=0.1, high=0.5)
    assert found.noise_levels == UniformLevels(low=0.2, high=0.6)


# ---- bad files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"color": 1}, r"^here: unknown setting\(s\) color"),
        ({"teacher": {"steps": 5, "stepz": 5, "a": 1}}, r"^here: teacher: unknown setting\(s\) a, stepz"),
        ({"teacher": {"batch": 5}}, r"^here: teacher: .*'steps'"),
        ({"teacher": 5}, r"^here: teacher: TeacherSettings must be an object; got 5"),
        ({"seed": -4}, r"^here: seed must be"),
        ({"seed": 1.5}, r"^here: seed must be int; got 1\.5"),
        ({"loop": {"log_every": 0}}, r"^here: loop: log_every"),
        ({"teacher": {"steps": "many"}}, r"^here: teacher: steps must be int; got 'many'"),
        ({"teacher": {"steps": True}}, r"^here: teacher: steps must be int; got True"),
        ({"precision": "fp8"}, r"^here: precision must be one of auto, bf16, fp32; got 'fp8'"),
        ({"format": 3}, r"^here: format must be 2; got 3: use the version that made it"),
    ],
)
def test_settings_from_a_file_are_checked(change: dict[str, Any], message: str, settings: Settings) -> None:
    with pytest.raises(UserError, match=message) as caught:
        settings_from_json({**to_json(settings), **change}, "here")
    assert "\n" not in str(caught.value)


def every_path(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every entry, objects included."""
    for name, value in values.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from every_path(value, (*prefix, name))


PATHS = list(every_path(to_json(tiny_settings())))


@pytest.mark.parametrize("path", PATHS, ids=[".".join(path) for path in PATHS])
def test_no_value_of_a_wrong_kind_gets_through_a_file(path: tuple[str, ...]) -> None:
    """Whatever stands in place of an entry: settings of the right kind, or one line that names it."""
    for value in ("x", -1, 10**400, [], [[]], {}, {"a": 1}, [1, 2, 3], True, math.nan):
        values = to_json(tiny_settings())
        entry = values
        for name in path[:-1]:
            entry = entry[name]
        if type(entry[path[-1]]) is type(value) and isinstance(value, (str, bool)):
            continue  # a text for a text: another name, which others check
        entry[path[-1]] = value
        message, found = "", None
        try:
            found = settings_from_json(values, "here")
        except UserError as error:
            message = str(error)
        if found is None:
            assert re.fullmatch(r"here: .{5,400}", message), value
            assert path[-1] in message
        else:
            # What is accepted is of the old value's kind: a number for a number.
            old: Any = to_json(tiny_settings())
            for name in path:
                old = old[name]
            assert isinstance(old, (int, float)) == isinstance(value, (int, float)), value
            assert through_json(found) == found


def test_settings_from_a_file_must_be_an_object() -> None:
    with pytest.raises(UserError, match=r"^here: Settings must be an object; got \[1\]"):
        settings_from_json([1], "here")


def test_differences_name_the_settings(settings: Settings) -> None:
    theirs = dataclasses.replace(with_discriminator(settings, layers=("blocks.1",)), seed=8)
    assert differences(to_json(settings), to_json(settings)) == []
    assert differences(to_json(settings), to_json(theirs)) == [
        "distribution.discriminator.layers: ['blocks.0', 'blocks.1'] here, ['blocks.1'] there",
        "seed: 3 here, 8 there",
    ]
    without = {name: value for name, value in to_json(settings).items() if name != "device"}
    assert differences(to_json(settings), without) == ["device: cpu here, None there"]


# ---- impossible ones


NAN, INF, HUGE = math.nan, math.inf, 10**5000
IMPOSSIBLE: list[tuple[type, dict[str, Any]]] = [
    *((LoopSettings, {"log_every": 0}), (LoopSettings, {"checkpoint_every": -1})),
    *((OptimizerSettings, {"lr": value}) for value in (0.0, -1.0, NAN, INF)),
    *((OptimizerSettings, {"lr": 1.0, "clip": value}) for value in (0.0, NAN)),
    *((OptimizerSettings, {"lr": 1.0, "betas": value}) for value in ((1.0, 0.9), (0.9, -0.1))),
    *((OptimizerSettings, {"lr": 1.0, name: -1}) for name in ("weight_decay", "warmup")),
    (OptimizerSettings, {"lr": 1.0, "schedule": "linear"}),
    *((TeacherSettings, {"steps": value}) for value in (0, -5, HUGE, 1.5, True)),
    *((TeacherSettings, {"steps": 5, "batch": value}) for value in (0, HUGE)),
    *((TeacherSettings, {"steps": 5, name: 1.1}) for name in ("ema", "condition_dropout")),
    (TeacherSettings, {"steps": 5, "times": LogitNormalTimes(interval_share=0.5)}),
    *((TrajectorySettings, {"steps": 5, "batch": 0}), (TrajectorySettings, {"steps": 5, "ema": -0.1})),
    (TrajectorySettings, {"steps": 0}),
    (TrajectorySettings, {"steps": 5, "meanflow": MeanFlowLoss(guidance=MeanFlowGuidance())}),
    *((GuidanceSettings, {"scale": value}) for value in (-1.0, INF, NAN)),
    *((GuidanceSettings, {"interval": value}) for value in ((0.9, 0.1), (0, 1.5), (-1, 1), (0.5,), 1)),
    *((DistributionSettings, {"steps": 5, name: 0}) for name in ("student_update_every", "batch")),
    *((DistributionSettings, {"steps": 5, name: -1.0}) for name in ("ema", "matching_weight")),
    *((DiscriminatorSettings, {name: value}) for name in ("gan_weight", "r1_weight") for value in (-1.0, NAN)),
    (DiscriminatorSettings, {"r1_std": 0}),
    (DiscriminatorSettings, {"gan_loss": "mse"}),
    *((ModelSettings, {name: 0}) for name in ("width", "depth", "time_scale")),
    *((EvaluationSettings, {"samples": value}) for value in (0, 9, -3, HUGE)),
    *((EvaluationSettings, {name: 0}) for name in ("batch", "timing_repeats")),
    *((EvaluationSettings, {name: v}) for name in ("teacher_steps", "student_steps") for v in ((), (1, 0))),
    # Of the leaves: their own checks, not repeated here.
    *((LogitNormalTimes, {name: 0.0}) for name in ("std",)),
    *((LogitNormalTimes, {name: -0.1}) for name in ("interval_share", "endpoint_share")),
    *((MeanFlowLoss, {"p": value}) for value in (-1.0, NAN)),
    *((MeanFlowLoss, {"c": 0}), (MeanFlowLoss, {"derivative": "autograd"})),
    *((DiscriminatorConfig, {name: 0}) for name in ("num_queries", "head_width", "hidden")),
    *((DiscriminatorConfig, {"pooling": "max"}), (DiscriminatorConfig, {"merge": "sum"})),
    *((DiscriminatorConfig, {"num_heads": value}) for value in (0, -1, 3, 128)),
    (DiscriminatorConfig, {"pool_over": "tokens"}),
    *(
        (DiscriminatorConfig, {**other, "pool_over": "logits"})
        for other in ({"num_heads": 2}, {"merge": "concatenate"})
    ),
]


@pytest.mark.parametrize(
    ("kind", "values"), IMPOSSIBLE, ids=[f"{kind.__name__}-{list(values)!s}" for kind, values in IMPOSSIBLE]
)
def test_impossible_settings_are_refused_by_name(kind: type, values: dict[str, Any]) -> None:
    name = list(values)[-1]
    with pytest.raises(ValueError, match=rf"\b{name}\b") as caught:
        kind(**values)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("low_high", [(0.5, 0.5), (0.0, 2.0), (-0.1, 1.0)])
def test_impossible_noise_levels_are_refused(low_high: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="low < high"):
        UniformLevels(low=low_high[0], high=low_high[1])


def test_the_discriminators_settings_accept_what_the_discriminator_accepts() -> None:
    """Checked by name before anything is trained, and with no rule of their own."""
    fates = set()
    for pooling, merge, pool_over, num_heads in itertools.product(
        ("attention", "scorer", "mean", "max"), ("logits", "concatenate", "sum"), ("features", "logits"), (0, 1, 2, 3)
    ):
        variant: dict[str, Any] = {"pooling": pooling, "merge": merge, "pool_over": pool_over, "num_heads": num_heads}
        fate = []
        for make in (DiscriminatorConfig, lambda **given: hd_awd.Discriminator([3], **given)):
            try:
                make(**variant, head_width=4)
            except ValueError:
                fate.append("refused")
            else:
                fate.append("accepted")
        assert fate[0] == fate[1], variant
        fates.add(fate[0])
    assert fates == {"refused", "accepted"}


@pytest.mark.parametrize("name", ["num_queries", "head_width", "hidden"])
def test_the_discriminators_sizes_have_upper_bounds(name: str) -> None:
    network = DiscriminatorConfig(**{name: 10**9})
    with pytest.raises(UserError, match=rf"^{name} must be a whole number from 1 to [\d,]+; got 1000000000$"):
        DiscriminatorSettings(network=network)


@pytest.mark.parametrize("seed", [-1, 2**32, True, 0.5])
def test_seeds_have_bounds(seed: Any, settings: Settings) -> None:
    with pytest.raises(UserError, match=r"seed must be .*; got"):
        dataclasses.replace(settings, seed=seed)


def test_a_stage_without_any_loss_is_refused() -> None:
    with pytest.raises(UserError, match="nothing would train the student"):
        DistributionSettings(steps=5, matching_weight=0.0, discriminator=DiscriminatorSettings(gan_weight=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelSettings(name="dit_nan")}, r"^model: unknown model 'dit_nan'"),
        ({"model": ModelSettings(width=30)}, r"^model: width must be a multiple"),
        ({"model": ModelSettings(name="mlp_2d")}, r"^model: unknown argument 'image_size'"),
        ({"model": ModelSettings(depth=1)}, r"^discriminator\.layers: the network has no module 'blocks\.1'"),
        ({"device": "cuda:77"}, r'^device "cuda:77" cannot be used here'),
        ({"data": "cifar"}, r"^unknown data set 'cifar'"),
    ],
)
def test_what_only_the_whole_can_know_is_checked_before_training(
    changes: dict[str, Any], message: str, settings: Settings
) -> None:
    check(settings, context_of(settings))
    wrong = dataclasses.replace(settings, **changes)
    with pytest.raises(UserError, match=message):
        check(wrong, context_of(wrong))


# ---- their form


OWN = [
    *(ModelSettings, LoopSettings, OptimizerSettings, GuidanceSettings, TeacherSettings, TrajectorySettings),
    *(DiscriminatorSettings, DistributionSettings, EvaluationSettings, Settings),
]
HELD = [
    *(LogitNormalTimes, UniformTimes, MeanFlowLoss, MeanFlowGuidance, DiscriminatorConfig),
    *(UniformLevels, LogitNormalLevels, KarrasLevels),
]


def every_class(kind: type[Any]) -> Iterator[type]:
    """The class and, below it, those of its fields."""
    yield kind
    hints = get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        # A choice of several classes of settings counts as all of them.
        for one in (hints[entry.name], *get_args(hints[entry.name])):
            if isinstance(one, type) and dataclasses.is_dataclass(one):
                yield from every_class(one)


def test_the_settings_are_made_of_ours_and_the_leaves() -> None:
    assert set(every_class(Settings)) == {*OWN, *HELD}


@pytest.mark.parametrize("kind", [*OWN, *HELD])
def test_settings_are_frozen_and_documented(kind: Any) -> None:
    assert kind.__dataclass_params__.frozen
    assert kind.__doc__
    if kind in OWN:
        assert all(entry.kw_only for entry in dataclasses.fields(kind))


# ---- recipes


def test_recipes_are_found_by_name() -> None:
    assert "digits" in list_recipes()
    assert "no download" in list_recipes()["digits"]
    assert load_recipe("digits").recipe == load_recipe("digits", smoke=True).recipe == "digits"
    with pytest.raises(UserError, match=r"^unknown recipe 'digit' \(did you mean 'digits'\?\); known: digits"):
        load_recipe("digit")
    with pytest.raises(UserError, match=r"^unknown recipe 'zzz'; known: digits"):
        load_recipe("zzz")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_description_is_its_functions_first_line(name: str) -> None:
    entry = RECIPES[name]
    module = importlib.import_module(entry.module)
    assert getattr(module, entry.full).__doc__.splitlines()[0] == entry.description
    assert isinstance(getattr(module, entry.smoke)(), Settings)


def test_the_recipe_has_the_rows_of_the_table() -> None:
    evaluation = load_recipe("digits").evaluation
    assert {1, 2, 4, 50, 250} <= set(evaluation.teacher_steps)
    assert 1 in evaluation.student_steps
    assert evaluation.samples is None
