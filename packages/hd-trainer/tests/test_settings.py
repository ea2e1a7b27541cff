"""Settings: there and back through JSON, and every impossible one refused by name."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest

import hd_awd
from hd_trainer import Settings, UserError, list_recipes, load_recipe
from hd_trainer.evaluation import EvaluationSettings
from hd_trainer.loop import LoopSettings
from hd_trainer.optim import OptimizerSettings
from hd_trainer.run import check
from hd_trainer.settings import ModelSettings, differences, from_json, to_json
from hd_trainer.stages.critic import AdversarySettings, Merge, Pooling, Weighed
from hd_trainer.stages.distribution import DistributionSettings
from hd_trainer.stages.teacher import TeacherSettings
from hd_trainer.stages.trajectory import TrajectorySettings


@pytest.mark.parametrize("smoke", [False, True])
def test_settings_go_through_json_and_back(smoke: bool) -> None:
    ours = load_recipe("digits", smoke=smoke)
    text = json.dumps(to_json(ours))
    assert from_json(Settings, json.loads(text), "here") == ours
    assert isinstance(from_json(Settings, json.loads(text), "here").distribution.adversary.layers, tuple)


def test_none_and_changed_values_survive(tiny: Settings) -> None:
    ours = dataclasses.replace(
        tiny, seed=9, evaluation=dataclasses.replace(tiny.evaluation, samples=None, teacher_steps=(2,))
    )
    assert from_json(Settings, json.loads(json.dumps(to_json(ours))), "here") == ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"color": 1}, r"^here: unknown setting\(s\) color"),
        ({"teacher": {"steps": 5, "stepz": 5, "a": 1}}, r"^here: teacher: unknown setting\(s\) a, stepz"),
        ({"teacher": {"batch": 5}}, r"^here: teacher: .*'steps'"),
        ({"teacher": 5}, r"^here: teacher: TeacherSettings must be an object; got 5"),
        ({"seed": -4}, r"^here: seed must be"),
        ({"loop": {"log_every": 0}}, r"^here: loop: log_every"),
        ({"teacher": {"steps": "many"}}, r"^here: teacher: .*'str'"),
        ({"precision": "fp8"}, r"^here: precision must be one of auto, bf16, fp32; got 'fp8'"),
    ],
)
def test_settings_from_a_file_are_checked(change: dict[str, Any], message: str, tiny: Settings) -> None:
    with pytest.raises(UserError, match=message) as caught:
        from_json(Settings, {**to_json(tiny), **change}, "here")
    assert "\n" not in str(caught.value)


def test_settings_from_a_file_must_be_an_object() -> None:
    with pytest.raises(UserError, match=r"^here: Settings must be an object; got \[1\]"):
        from_json(Settings, [1], "here")


def test_differences_name_the_settings(tiny: Settings) -> None:
    theirs = dataclasses.replace(
        tiny,
        seed=8,
        distribution=dataclasses.replace(
            tiny.distribution, adversary=dataclasses.replace(tiny.distribution.adversary, layers=("blocks.1",))
        ),
    )
    assert differences(to_json(tiny), to_json(tiny)) == []
    assert differences(to_json(tiny), to_json(theirs)) == [
        "distribution.adversary.layers: ['blocks.0', 'blocks.1'] here, ['blocks.1'] there",
        "seed: 3 here, 8 there",
    ]
    without = {name: value for name, value in to_json(tiny).items() if name != "device"}
    assert differences(to_json(tiny), without) == ["device: cpu here, None there"]


NAN, INF = math.nan, math.inf
IMPOSSIBLE: list[tuple[type, dict[str, Any]]] = [
    *((LoopSettings, {"log_every": 0}), (LoopSettings, {"checkpoint_every": -1})),
    *((OptimizerSettings, {"lr": value}) for value in (0.0, -1.0, NAN, INF)),
    *((OptimizerSettings, {"lr": 1.0, "clip": value}) for value in (0.0, NAN)),
    *((OptimizerSettings, {"lr": 1.0, "betas": value}) for value in ((1.0, 0.9), (0.9, -0.1))),
    *((OptimizerSettings, {"lr": 1.0, name: -1}) for name in ("weight_decay", "warmup")),
    (OptimizerSettings, {"lr": 1.0, "schedule": "linear"}),
    *((TeacherSettings, {"steps": value}) for value in (0, -5)),
    *((TeacherSettings, {"steps": 5, "batch": 0}), (TeacherSettings, {"steps": 5, "time_std": 0.0})),
    *((TeacherSettings, {"steps": 5, name: 1.1}) for name in ("ema", "label_dropout")),
    *((TrajectorySettings, {"steps": 5, name: 0}) for name in ("batch", "time_std", "c")),
    *((TrajectorySettings, {"steps": 5, name: -0.1}) for name in ("ema", "interval_share", "endpoint_share")),
    *((TrajectorySettings, {"steps": 5, "p": value}) for value in (-1.0, NAN)),
    *((TrajectorySettings, {"steps": 5, "guidance_scale": value}) for value in (-1.0, INF, NAN)),
    *((TrajectorySettings, {"steps": 5, "guidance_interval": v}) for v in ((0.9, 0.1), (0, 1.5), (-1, 1))),
    (TrajectorySettings, {"steps": 5, "derivative": "autograd"}),
    (TrajectorySettings, {"steps": 0}),
    *((DistributionSettings, {"steps": 5, name: 0}) for name in ("student_every", "batch")),
    *((DistributionSettings, {"steps": 5, "levels": value}) for value in ((0.5, 0.5), (0.0, 2.0), (-0.1, 1))),
    *((DistributionSettings, {"steps": 5, name: -1.0}) for name in ("ema", "matching_weight", "guidance_scale")),
    *((AdversarySettings, {name: 0}) for name in ("queries", "head_width", "hidden", "r1_std")),
    *((AdversarySettings, {name: value}) for name in ("weight", "r1_weight") for value in (-1.0, NAN)),
    *((AdversarySettings, {"layers": ()}), (AdversarySettings, {"levels": (0.9, 0.2)})),
    *((AdversarySettings, {"pooling": "max"}), (AdversarySettings, {"loss": "mse"})),
    *((AdversarySettings, {"merge": "sum"}), (AdversarySettings, {"weighed": "tokens"})),
    *((AdversarySettings, {"heads": value}) for value in (0, -1, 3, 128)),
    *((AdversarySettings, {**other, "weighed": "logits"}) for other in ({"heads": 2}, {"merge": "concatenate"})),
    *((EvaluationSettings, {"samples": value}) for value in (0, 9, -3)),
    *((EvaluationSettings, {name: 0}) for name in ("batch", "timing_repeats")),
    *((EvaluationSettings, {name: v}) for name in ("teacher_steps", "student_steps") for v in ((), (1, 0))),
    *((EvaluationSettings, {"guidance_scale": -1.0}), (EvaluationSettings, {"guidance_interval": (1, 0)})),
]


@pytest.mark.parametrize(
    ("kind", "values"), IMPOSSIBLE, ids=[f"{kind.__name__}-{values}" for kind, values in IMPOSSIBLE]
)
def test_impossible_settings_are_refused_by_name(kind: type, values: dict[str, Any]) -> None:
    name = list(values)[-1]
    with pytest.raises(UserError, match=rf"\b{name}\b") as caught:
        kind(**values)
    assert "\n" not in str(caught.value)


def test_the_adversarys_settings_accept_what_the_discriminator_accepts() -> None:
    """Checked by name before anything is trained, and with no rule of their own."""
    fates = set()
    for pooling, merge, weighed, heads in itertools.product(
        (*get_args(Pooling), "max"), (*get_args(Merge), "sum"), (*get_args(Weighed), "tokens"), (0, 1, 2, 3)
    ):
        variant = {"pooling": pooling, "merge": merge, "weighed": weighed, "heads": heads, "head_width": 4}
        fate = []
        critic = functools.partial(hd_awd.Discriminator, [3], **variant)
        for make in (functools.partial(AdversarySettings, **variant), critic):
            try:
                make()
            except ValueError:
                fate.append("refused")
            else:
                fate.append("accepted")
        assert fate[0] == fate[1], variant
        fates.add(fate[0])
    assert fates == {"refused", "accepted"}


def test_variants_go_through_json_and_older_files_get_the_defaults(tiny: Settings) -> None:
    changes = {"pooling": "scorer", "merge": "concatenate", "heads": 4}
    adversary = dataclasses.replace(tiny.distribution.adversary, **changes)
    ours = dataclasses.replace(tiny, distribution=dataclasses.replace(tiny.distribution, adversary=adversary))
    values = json.loads(json.dumps(to_json(ours)))
    assert from_json(Settings, values, "here") == ours
    for name in ("heads", "merge", "weighed"):
        del values["distribution"]["adversary"][name]
    plain = from_json(Settings, values, "here").distribution.adversary
    assert plain == dataclasses.replace(tiny.distribution.adversary, pooling="scorer")
    assert (plain.heads, plain.merge, plain.weighed) == (1, "logits", "vectors")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_have_bounds(seed: int, tiny: Settings) -> None:
    with pytest.raises(UserError, match=r"seed must be .*; got"):
        dataclasses.replace(tiny, seed=seed)


def test_a_stage_without_any_loss_is_refused() -> None:
    with pytest.raises(UserError, match="nothing would train the student"):
        DistributionSettings(steps=5, matching_weight=0.0, adversary=AdversarySettings(weight=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelSettings(name="dit_nan")}, r"^model: unknown model 'dit_nan'"),
        ({"model": ModelSettings(width=30)}, r"^model: width must be a multiple"),
        ({"model": ModelSettings(time_scale=0.0)}, r"^model: time_scale must be > 0"),
        ({"model": ModelSettings(name="mlp_2d")}, r"^model: unknown argument 'image_size'"),
        ({"model": ModelSettings(depth=1)}, r"^adversary\.layers: the network has no module 'blocks\.1'"),
        ({"device": "cuda:77"}, r'^device "cuda:77" cannot be used here'),
        ({"data": "fashion"}, r"^unknown data set 'fashion'"),
    ],
)
def test_what_only_the_whole_can_know_is_checked_before_training(
    changes: dict[str, Any], message: str, tiny: Settings
) -> None:
    check(tiny)
    with pytest.raises(UserError, match=message):
        check(dataclasses.replace(tiny, **changes))


def every_class(kind: type) -> Iterator[type]:
    yield kind
    for entry in dataclasses.fields(kind):
        module = next((k for k in CLASSES if k.__name__ == entry.type), None)
        if module:
            yield from every_class(module)


CLASSES = [
    *(ModelSettings, LoopSettings, OptimizerSettings, TeacherSettings, TrajectorySettings),
    *(AdversarySettings, DistributionSettings, EvaluationSettings, Settings),
]


@pytest.mark.parametrize("kind", CLASSES)
def test_settings_are_frozen_and_keyword_only(kind: type) -> None:
    assert kind.__dataclass_params__.frozen
    assert all(entry.kw_only for entry in dataclasses.fields(kind))
    assert kind.__doc__
    assert set(CLASSES) == set(every_class(Settings))


def test_recipes_are_found_by_name() -> None:
    assert "digits" in list_recipes()
    assert "no download" in list_recipes()["digits"]
    assert load_recipe("digits").recipe == load_recipe("digits", smoke=True).recipe == "digits"
    with pytest.raises(UserError, match=r"^unknown recipe 'digit' \(did you mean 'digits'\?\); known: digits"):
        load_recipe("digit")
    with pytest.raises(UserError, match=r"^unknown recipe 'zzz'; known: digits"):
        load_recipe("zzz")


def test_the_recipe_has_the_rows_of_the_table() -> None:
    evaluation = load_recipe("digits").evaluation
    assert {1, 2, 4, 50, 250} <= set(evaluation.teacher_steps)
    assert 1 in evaluation.student_steps
    assert evaluation.samples is None
