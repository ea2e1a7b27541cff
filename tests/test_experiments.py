"""The experiments: their committed tables follow from their committed runs, and the command takes their arguments."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hd_trainer import load_recipe
from hd_trainer.run_options import parse_settings
from hd_trainer.settings import differences, to_json

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["digits-discriminator", "digits-noise-levels", "digits-seeds", "discriminator-weight", "weighting"]
SEEDS = ROOT / "experiments/results/digits_seeds.json"


def load_experiment(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module `experiments.NAME`; the root folder is no package, so it is put on the path."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module(f"experiments.{name}")


def test_they_are_listed_by_name() -> None:
    command = [sys.executable, "-m", "experiments"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == NAMES
    unknown = subprocess.run([*command, "no-such"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert unknown.returncode == 2
    assert unknown.stderr == f"experiments: unknown name 'no-such'; known: {', '.join(NAMES)}\n"


def test_the_committed_summary_and_targets_are_those_of_the_committed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_experiment("digits_seeds", monkeypatch)
    committed = json.loads(SEEDS.read_text(encoding="utf-8"))
    assert experiment.summary(committed["runs"]) == committed["summary"]
    assert experiment.targets(committed["runs"]) == committed["targets"]


def test_the_seeds_run_the_recipe_as_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    experiment = load_experiment("digits_seeds", monkeypatch)
    command, *arguments = experiment.command(seed=2, folder=tmp_path)
    options = parse_settings(command, arguments)
    assert options.settings == parse_settings("run", ["digits", "--seed", "2"]).settings


def test_the_variants_differ_in_the_discriminator_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    experiment, shared = (load_experiment(name, monkeypatch) for name in ("digits_discriminator", "stage_two"))
    settings = {}
    for name, variant in experiment.VARIANTS.items():
        command, *arguments = shared.run_arguments(variant, seed=1, source=tmp_path / "1", folder=tmp_path / name)
        options = parse_settings(command, arguments)
        assert options.teacher_weights == tmp_path / "1/teacher"
        assert options.student_weights == tmp_path / "1/trajectory"
        settings[name] = options.settings.distribution.discriminator
    assert settings["none"].gan_weight == 0
    assert settings["gap"].gan_weight > 0
    assert settings["gap"].network.pooling == "mean"


def test_the_laws_differ_in_the_noise_levels_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    experiment, shared = (load_experiment(name, monkeypatch) for name in ("digits_noise_levels", "stage_two"))
    plain = to_json(load_recipe("digits"))
    found = {}
    for name, variant in experiment.VARIANTS.items():
        command, *arguments = shared.run_arguments(variant, seed=0, source=tmp_path / "0", folder=tmp_path / name)
        found[name] = differences(to_json(parse_settings(command, arguments).settings), plain)
    others = ("recipe", "teacher_source", "evaluation.teacher_steps")
    assert all("noise_levels" in line or line.startswith(others) for lines in found.values() for line in lines)
    assert any(line.startswith("distribution.noise_levels.kind: KarrasLevels") for line in found["dmd2"])
    assert not any(line.startswith("distribution.noise_levels") for line in found["wide-fake-score"])


def test_awd_s_rows_are_those_of_the_seeds() -> None:
    runs = json.loads(SEEDS.read_text(encoding="utf-8"))["runs"]
    lines = (ROOT / "experiments/results/digits_discriminator.csv").read_text(encoding="utf-8").splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    for run in runs:
        expected = next(row for row in run["rows"] if row["name"] == "distribution")
        found = next(row for row in rows if row["discriminator"] == "awd" and int(row["seed"]) == run["seed"])
        assert float(found["fd"]) == pytest.approx(expected["fd"], abs=1e-4)
        assert float(found["recall"]) == pytest.approx(expected["recall"], abs=1e-4)


@pytest.mark.parametrize("data", ["digits", "fashion", "emoji", "shapes"])
def test_the_search_for_the_weight_asks_for_what_there_is(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_experiment("discriminator_weight", monkeypatch)
    options = parse_settings("run", [experiment.DATA[data], *experiment.EVALUATION])
    assert options.settings.evaluation.samples == 1000
    assert data in options.settings.data


def test_the_choice_is_the_weight_whose_worst_case_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_experiment("discriminator_weight", monkeypatch)
    distances = {("a", 0.0): 2.0, ("a", 0.1): 1.0, ("a", 0.5): 1.0, ("b", 0.0): 4.0, ("b", 0.1): 5.0, ("b", 0.5): 4.0}
    rows = [
        {"data": data, "gan_weight": weight, "discriminator_lr": 1e-3, "fd": fd, "alarms": "collapse" * (weight == 0.5)}
        for (data, weight), fd in distances.items()
    ]
    experiment.mark_choice(rows)
    # 0.5 has the best distances and an alarm; 0.1 is at worst 1.25 times the best, 0 twice.
    assert {row["gan_weight"] for row in rows if row["choice"]} == {0.1}
    assert {row["worst_ratio"] for row in rows if row["gan_weight"] == 0.1} == {1.25}
