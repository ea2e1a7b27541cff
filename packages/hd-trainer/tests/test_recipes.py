"""Recipes from a user's file, or from a run's recipe.json: found, refused in one line, and run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from trainer_helpers import SHORT, contents, hdistill, tiny_settings

from hd_trainer import UserError, load_recipe
from hd_trainer.settings import settings_from_json, to_json

GOOD = """
import dataclasses

from hd_trainer import load_recipe
from hd_trainer.engine.loop import LoopSettings

STEPS = 2


def recipe():
    full = load_recipe("digits", smoke=True)
    return dataclasses.replace(
        full,
        model=dataclasses.replace(full.model, width=16, depth=1),
        loop=LoopSettings(log_every=1, checkpoint_every=2),
        teacher=dataclasses.replace(full.teacher, steps=STEPS, batch=8),
        trajectory=dataclasses.replace(full.trajectory, steps=STEPS, batch=8),
        distribution=dataclasses.replace(
            full.distribution,
            steps=STEPS,
            batch=8,
            discriminator=dataclasses.replace(full.distribution.discriminator, layers=("blocks.0",)),
        ),
        evaluation=dataclasses.replace(full.evaluation, samples=10, teacher_steps=(1,), timing_repeats=1),
    )


def seeded():
    return dataclasses.replace(recipe(), seed=5)


def smoke():
    return dataclasses.replace(recipe(), seed=6)


def raising():
    raise KeyError("x")


def refusing():
    return dataclasses.replace(recipe(), seed=-1)


def nonsense():
    return {"seed": 4}


def needing(argument):
    return recipe()
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's file of recipes, named from where the user stands."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(GOOD)
    return Path("mine.py")


def test_a_function_in_a_file_is_a_recipe(mine: Path) -> None:
    assert load_recipe("mine.py") == load_recipe("mine.py:recipe")
    assert load_recipe("mine.py:seeded").seed == 5
    assert load_recipe("mine.py", smoke=True).seed == 6


def test_a_users_recipe_runs_to_a_report(mine: Path) -> None:
    answer = hdistill("run", "mine.py:seeded")
    assert answer.code == 0, answer.err
    out = Path("runs/mine")
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["recipe"], recipe["seed"], recipe["teacher"]["steps"]) == ("mine.py:seeded", 5, 2)
    # The command on the page makes the run again.
    assert "<pre>hdistill run mine.py:seeded</pre>" in (out / "report.html").read_text()


def test_flags_change_a_users_recipe_and_its_help_shows_its_defaults(mine: Path) -> None:
    text = " ".join(hdistill("run", "mine.py:seeded", "--help").out.split())
    assert "(default: 5)" in text
    assert "(default: runs/mine)" in text
    answer = hdistill("run", "mine.py", "--seed", "-3")
    assert "seed must be" in answer.line


def test_a_report_outlives_its_recipes_file(mine: Path) -> None:
    assert hdistill("run", "mine.py").code == 0
    mine.unlink()
    assert hdistill("evaluate", "runs/mine").code == 0
    assert hdistill("report", "runs/mine").code == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:raising", "mine.py:raising raised KeyError: 'x'"),
        ("mine.py:refusing", "seed must be a whole number >= 0 and below 2^32; got -1"),
        ("mine.py:nonsense", "mine.py:nonsense must return hd_trainer.settings.Settings; got dict"),
        ("mine.py:needing", "mine.py:needing raised TypeError: needing() missing 1 required positional argument"),
        ("mine.py:STEPS", "mine.py has no function 'STEPS'; it has"),
        ("mine.py:other", "mine.py has no function 'other'; it has"),
        ("absent.py", "no file absent.py"),
        ("broken.py:recipe", "broken.py cannot be imported: SyntaxError"),
        ("importing.py", "importing.py cannot be imported: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("folder.py", "no file folder.py"),
        ("binary.py", "binary.py cannot be imported"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_one_line(name: str, message: str, mine: Path) -> None:
    Path("broken.py").write_text("def recipe(:\n")
    Path("importing.py").write_text("import nothing_like_it\n")
    Path("folder.py").mkdir()
    Path("binary.py").write_bytes(b"\x00\xff\xfe")
    before = contents(Path())
    for command in (("run", name), ("train", "teacher", name), ("run", name, "--out", "new")):
        answer = hdistill(*command)
        assert (answer.code, answer.out) == (2, "")
        assert message in answer.line
    after = {file: content for file, content in contents(Path()).items() if "__pycache__" not in file}
    assert after == before


def test_without_a_short_form_smoke_says_so(mine: Path) -> None:
    mine.write_text(GOOD.replace("def smoke", "def other"))
    answer = hdistill("run", "mine.py", "--smoke")
    assert (answer.code, answer.out) == (2, "")
    assert "mine.py has no function 'smoke'; it has" in answer.line


def test_a_runs_recipe_json_gives_its_settings_back(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(to_json(tiny_settings())))
    assert settings_from_json(json.loads(path.read_text()), str(path)) == tiny_settings()


def test_a_runs_recipe_json_is_a_recipe(tmp_path: Path) -> None:
    """The same run again, somewhere else, by the file that the first one left."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(to_json(tiny_settings())))
    assert load_recipe(str(path)).teacher == tiny_settings().teacher
    first_format = Path(__file__).parent / "data" / "run_of_0.1.0" / "recipe.json"
    assert load_recipe(str(first_format)).teacher.steps == 4
    for bad, message in (("{", "is not JSON"), ('{"seed": 1}', "recipe"), ("[]", "holds no JSON object")):
        path.write_text(bad)
        with pytest.raises(UserError, match=message):
            load_recipe(str(path))
    with pytest.raises(UserError, match="no file"):
        load_recipe(str(tmp_path / "absent.json"))
    with pytest.raises(UserError, match="has no short form"):
        load_recipe(str(path), smoke=True)


def again(source: Path, out: Path, *flags: object) -> None:
    """Run ``source``'s recipe.json into ``out``."""
    answer = hdistill("run", source / "recipe.json", "--out", out, *flags)
    assert answer.code == 0, answer.err


def records(path: Path) -> list[dict[str, object]]:
    """The lines of a metrics.jsonl without their times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_run(one: Path, other: Path, stages: tuple[str, ...]) -> None:
    """Settings, losses and weights agree to the last bit."""
    assert (one / "recipe.json").read_bytes() == (other / "recipe.json").read_bytes()
    for stage in stages:
        assert records(one / stage / "metrics.jsonl") == records(other / stage / "metrics.jsonl")
        weights = [(run / stage / "model.safetensors").read_bytes() for run in (one, other)]
        assert weights[0] == weights[1]


def test_a_run_from_its_recipe_json_is_the_same_run(finished: Path, tmp_path: Path) -> None:
    again(finished, tmp_path / "again")
    assert_same_run(finished, tmp_path / "again", ("teacher", "trajectory", "distribution"))
    # In its own folder it is that run, which is finished.
    before = {stage: (tmp_path / "again" / stage / "model.safetensors").stat().st_mtime_ns for stage in ("teacher",)}
    again(tmp_path / "again", tmp_path / "again")
    assert before["teacher"] == (tmp_path / "again" / "teacher" / "model.safetensors").stat().st_mtime_ns


def test_a_recipe_json_brings_the_weights_that_its_run_was_given(finished: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    for stage in ("teacher", "trajectory"):
        shutil.copytree(finished / stage, weights / stage)
    given = ("--teacher", weights / "teacher", "--student-weights", weights / "trajectory")
    answer = hdistill(*SHORT, *given, "--out", tmp_path / "one")
    assert answer.code == 0, answer.err
    again(tmp_path / "one", tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two", ("distribution",))
    assert not (tmp_path / "two" / "trajectory").exists()
    # Other weights in the same place are another run.
    shutil.copyfile(finished / "distribution" / "model.safetensors", weights / "trajectory" / "model.safetensors")
    answer = hdistill("run", tmp_path / "one" / "recipe.json", "--out", tmp_path / "three")
    assert (answer.code, answer.out) == (2, "")
    assert "was begun from another student than the one in" in answer.line
    shutil.rmtree(weights / "trajectory")
    answer = hdistill("run", tmp_path / "one" / "recipe.json", "--out", tmp_path / "three")
    assert (answer.code, answer.out) == (2, "")
    assert not (tmp_path / "three").exists()


def test_a_run_again_goes_beside_the_first_by_default(finished: Path) -> None:
    text = " ".join(hdistill("run", finished / "recipe.json", "--help").out.split())
    assert "(default: runs/digits-again)" in text


def test_list_recipes_names_them_and_the_other_kinds() -> None:
    answer = hdistill("list", "recipes")
    assert (answer.code, answer.err) == (0, "")
    for words in ("digits", "FILE.py", "recipe.json", "hdistill new NAME --data DATA"):
        assert words in answer.out
