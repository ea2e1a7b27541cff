"""``hdistill new``: the rules as functions, and the file that it writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from trainer_helpers import contents, drawn, hdistill, save_pictures

from hd_trainer import UserError, load_recipe, rules
from hd_trainer.networks import ModelSettings, cost_of
from hd_trainer.new_recipe import facts_of, text_of
from hd_trainer.rules import Facts

#: Most cases are whole runs: they are tried once, beside all other packages.
pytestmark = pytest.mark.slow

SHAPES = Facts(shape=(3, 32, 32), samples=1_800, classes=8, bf16=True)
MANY = Facts(shape=(3, 32, 32), samples=60_000, classes=10, bf16=True)
DIGITS = Facts(shape=(1, 8, 8), samples=1_437, classes=10)


def changed(facts: Facts, **changes: object) -> Facts:
    """The same facts but for some."""
    return dataclasses.replace(facts, **changes)  # type: ignore[arg-type]


# ---- rules


@pytest.mark.parametrize(
    ("facts", "name", "width"),
    [
        (DIGITS, "dit_nano_2", None),
        (SHAPES, "dit_micro_4", None),
        (changed(SHAPES, shape=(3, 30, 30)), "dit_nano_2", None),  # no multiple of 4
        (changed(SHAPES, cores=64), "dit_micro_4", None),  # few images need no more
        (changed(MANY, cores=32), "dit_mini_4", None),
        (changed(MANY, device="cuda"), "dit_mini_4", 384),
        (changed(MANY, device="cuda", minutes=600.0), "dit_mini_4", 384),
        (changed(MANY, shape=(1, 8, 8), cores=16), "dit_nano_2", 128),
    ],
)
def test_the_network_follows_side_images_and_time(facts: Facts, name: str, width: int | None) -> None:
    model = rules.model_of(facts)
    assert (model.name, model.width) == (name, width)


def test_the_networks_to_choose_from_grow() -> None:
    for models, side in ((rules.PATCH_2, 16), (rules.PATCH_4, 32)):
        costs = [cost_of(model, (3, side, side), 10).multiply_adds for model in models]
        assert costs == sorted(costs)


def test_a_batch_is_at_most_an_eighth_of_the_images() -> None:
    sizes = {8: 8, 100: 8, 200: 16, 512: 64, 60_000: 64}
    assert {samples: rules.batch_of(changed(SHAPES, samples=samples)) for samples in sizes} == sizes
    assert rules.batch_of(changed(MANY, device="cuda")) == 256


@pytest.mark.parametrize("minutes", [12.0, 30.0, 120.0])
def test_the_steps_take_three_quarters_of_the_time(minutes: float) -> None:
    facts = changed(MANY, minutes=minutes)
    model, batch, steps = rules.model_of(facts), rules.batch_of(facts), rules.steps_of(facts)
    seconds = sum(steps[stage] * rules.step_seconds(facts, model, stage, batch) for stage in steps)
    assert 0.85 * 45 * minutes < seconds <= 45 * minutes  # rounded down to two digits
    assert rules.estimated_minutes(facts) <= minutes


def test_more_cores_and_bfloat16_mean_more_steps_and_larger_images_fewer() -> None:
    steps = rules.steps_of(MANY)["teacher"]
    assert rules.steps_of(changed(MANY, cores=4))["teacher"] > steps
    assert rules.steps_of(changed(MANY, bf16=False))["teacher"] < steps
    assert rules.steps_of(changed(MANY, shape=(3, 64, 64)))["teacher"] < steps


def test_steps_have_a_least_and_a_most() -> None:
    slow = changed(SHAPES, shape=(3, 128, 128), cores=1)
    assert rules.steps_of(slow) == rules.LEAST_STEPS
    assert rules.estimated_minutes(slow) > 100
    quick = rules.steps_of(changed(DIGITS, minutes=10_000.0))
    assert quick["teacher"] * 64 <= rules.MOST_EPOCHS * DIGITS.samples
    assert quick["trajectory"] <= quick["teacher"] / 2


@pytest.mark.parametrize("shape", [(3, 32, 48), (1, 7, 7)])
def test_what_no_network_takes_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="square samples with an even side"):
        changed(SHAPES, shape=shape)


def test_twelve_images_are_enough_for_every_rule() -> None:
    settings = rules.settings_of(Facts(shape=(1, 8, 8), samples=8, classes=0), "npz:x.npz", "x")
    assert settings.evaluation.samples == 10
    assert settings.teacher.batch == 8


# ---- the file

EVERY = [
    *(DIGITS, SHAPES, MANY, changed(MANY, device="cuda", minutes=600.0), changed(SHAPES, classes=0, minutes=0.5)),
    changed(MANY, shape=(4, 32, 32), device="cuda"),
]


@pytest.mark.parametrize("facts", EVERY)
@pytest.mark.parametrize("data", ["digits", "folder:my pictures?size=32&flip=true", 'npz:a "b" \\c.npz', "npz:é\n.npz"])
def test_the_file_returns_the_settings_of_the_rules(
    facts: Facts, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("mine.py")
    wanted = rules.settings_of(facts, data, str(path.absolute()))
    text = text_of(wanted, facts, data, path)
    path.write_text(text, encoding="utf-8")
    assert load_recipe(str(path)) == wanted
    assert load_recipe(str(path), smoke=True).teacher.steps == 20
    assert text.count("\n") < 62
    assert max(map(len, text.splitlines())) <= 125


def test_new_reads_the_data_and_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("cat", "dog")):
        save_pictures(Path("pictures") / name, drawn(10, seed=number))
    answer = hdistill("new", "mine", "--data", "folder:pictures", "--minutes", 3)
    assert (answer.code, answer.err) == (0, "")
    assert "Wrote mine.py: 16 samples of 3 x 12 x 12, 2 classes." in answer.out
    assert "Next: hdistill run mine.py --dry-run" in answer.out
    found = facts_of("folder:pictures", "cpu", 3.0)
    assert (found.samples, found.classes, found.shape) == (16, 2, (3, 12, 12))
    assert load_recipe("mine.py").model == ModelSettings(name="dit_nano_2")
    before = contents(tmp_path)
    again = hdistill("new", "mine", "--data", "folder:pictures")
    assert (again.code, again.out) == (2, "")
    assert again.line == "hdistill: mine.py exists; choose another name, or another --out"
    assert contents(tmp_path) == before
    assert hdistill("new", "mine", "--data", "folder:pictures", "--out", "pictures/other.py").code == 0
    assert "hdistill run pictures/other.py" in Path("pictures/other.py").read_text()


def test_what_new_writes_runs_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("cat", "dog")):
        save_pictures(Path("pictures") / name, drawn(20, (8, 8), seed=number))
    assert hdistill("new", "mine", "--data", "folder:pictures").code == 0
    answer = hdistill("run", "mine.py", "--smoke", "--precision", "fp32", "--model.width", 32, "--model.depth", 2)
    assert answer.code == 0, answer.err
    assert Path("runs/mine-smoke/report.html").is_file()
