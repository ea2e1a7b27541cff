"""``--dry-run``: what it says is what the run does, and it leaves no trace."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from trainer_helpers import SHORT, contents, hdistill, tiny_settings

from hd_trainer import dry_run, pipeline
from hd_trainer.dry_run import Plan, StagePlan, duration, format_plan, seconds_per_step, size
from hd_trainer.engine.checkpoint import complete_checkpoints
from hd_trainer.engine.loop import DONE
from hd_trainer.stages import STAGES

#: Most cases are whole runs: they are tried once, beside all other packages.
pytestmark = pytest.mark.slow


def plan_of(out: Path, **given: Path) -> Plan:
    """The plan of the tiny settings."""
    return dry_run.dry_run(tiny_settings(), out, **given)


def test_it_prints_data_stages_and_time_and_writes_nothing(tmp_path: Path) -> None:
    answer = hdistill(*SHORT, "--dry-run", "--out", tmp_path / "new")
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert lines[0] == "data         digits: grey images, 1 x 8 x 8 (channels, height, width)"
    for words in (
        "1,437 for training, 360 held out",
        "values from -1.00 to 1.00",
        "10 classes: 0, 1, 2, 3, 4, 5, 6, 7 ...",
    ):
        assert f"             {words}" in lines
    starts = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert starts == ["data", "teacher", "trajectory", "distribution", "evaluation", "report", "in", "Peak"]
    assert "Nothing was written." in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_train_shows_its_stage_alone(tmp_path: Path) -> None:
    words = ("train", "teacher", *SHORT[1:], "--dry-run", "--out", tmp_path / "new")
    answer = hdistill(*words)
    assert (answer.code, answer.err) == (0, "")
    assert "trajectory" not in answer.out
    assert "evaluation" not in answer.out
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_those_of_the_files_that_the_run_writes(tmp_path: Path) -> None:
    settings = dataclasses.replace(
        tiny_settings(), evaluation=dataclasses.replace(tiny_settings().evaluation, samples=10)
    )
    plan = dry_run.dry_run(settings, tmp_path / "run")
    pipeline.run(settings, tmp_path / "run")
    for stage in plan.stages:
        folder = tmp_path / "run" / stage.name
        # A file of tensors begins with their names and shapes.
        written = (folder / "model.safetensors").stat().st_size
        assert 0 <= written - stage.weight_bytes < 20_000
        kept = complete_checkpoints(folder)
        assert len(kept) == 2
        states = sum((path / "state.safetensors").stat().st_size for path in kept)
        assert 0 <= states - stage.state_bytes < 100_000
        assert stage.grids == len(list((folder / "samples").iterdir()))
        assert stage.left == 7
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    generated = [row for row in rows if row["name"] in STAGES]
    assert plan.rows == 2 + settings.evaluation.seeds * len(generated)


def test_measuring_leaves_random_numbers_and_threads_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    plan_of(tmp_path / "new")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_what_is_done_is_not_planned_again(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    (copy / "trajectory" / DONE).unlink()
    shutil.rmtree(copy / "distribution")
    for path in complete_checkpoints(copy / "trajectory")[1:]:
        shutil.rmtree(path)
    before = contents(copy)
    answer = hdistill(*SHORT, "--dry-run", "--out", copy)
    assert answer.code == 0, answer.err
    found = {line.split()[0]: line for line in answer.out.splitlines() if line.startswith(("teacher", "traj", "dist"))}
    assert found["teacher"].endswith("done")
    assert found["trajectory"].endswith("goes on after step 5")
    assert found["trajectory"].split()[1] == "4"  # of 9 steps
    assert found["distribution"].endswith("to train")
    assert contents(copy) == before


def test_a_teacher_that_is_given_is_left_out(finished: Path, tmp_path: Path) -> None:
    source = finished / "teacher"
    answer = hdistill(*SHORT, "--teacher", source, "--dry-run", "--out", tmp_path / "new")
    assert answer.code == 0, answer.err
    assert f"left out: {source}" in answer.out
    assert list(tmp_path.iterdir()) == []


def test_what_the_run_would_refuse_is_refused(finished: Path, tmp_path: Path) -> None:
    before = contents(finished)
    answer = hdistill(*SHORT, "--dry-run", "--out", finished, "--seed", 1)
    assert (answer.code, answer.out) == (2, "")
    assert "holds a run with other settings (seed: 1 here, 0 there)" in answer.line
    assert contents(finished) == before
    (tmp_path / "file").touch()
    answer = hdistill(*SHORT, "--dry-run", "--out", tmp_path / "file" / "new")
    assert f"{tmp_path / 'file'} is not a folder; choose another --out" in answer.line


class Clock:
    """Time that passes only where a step says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_steps_are_measured_without_warm_up_and_by_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, steps = Clock(), []
    monkeypatch.setattr(dry_run, "time", clock)

    def step(index: int) -> None:
        cold = len(steps) < 2
        steps.append(index)
        clock.now += 9.0 if cold else 0.4 if index == 0 else 0.1

    # Every third step takes 0.4 s and the others 0.1 s.
    assert seconds_per_step(step, 3, torch.device("cpu")) == pytest.approx(0.2)
    steps.clear()
    assert seconds_per_step(step, 1, torch.device("cpu")) == pytest.approx(0.4)
    assert len(steps) < 8  # a slow step is not measured ten times


def test_the_whole_is_the_sum_of_its_parts() -> None:
    stage = StagePlan(name="teacher", state="to train", left=100, step_seconds=0.5, grids=2, grid_seconds=3.0)
    plan = Plan(data=["x"], stages=[stage, stage], evaluation_seconds=40.0, report_seconds=4.0, rows=3, samples=9)
    assert stage.seconds == 56
    assert plan.seconds == 156
    assert "in all" in format_plan(plan)
    assert "3 min" in format_plan(plan)


def test_numbers_as_a_person_says_them() -> None:
    assert [size(one) for one in (0, 999, 1_000, 25_700_000, 3.2e9, 5e12)] == [
        *("0 B", "999 B", "1 kB", "25.7 MB", "3.2 GB", "5.0 TB"),
    ]
    assert [duration(one) for one in (0.4, 99, 100, 3_600, 9_000)] == ["0 s", "99 s", "2 min", "60 min", "2.5 h"]
