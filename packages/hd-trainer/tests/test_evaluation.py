"""Evaluation: what a row counts, that all rows start from one noise, and the sample command's pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import hd_zoo
from hd_trainer import UserError, evaluation
from hd_trainer.evaluation import EvaluationSettings, Meter, Row, evaluate, format_rows, sampler
from hd_trainer.stages.common import Context


class Counting(nn.Module):
    """A field that shrinks its input, and notes how many images it was asked about and the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.null_label = 10
        self.images = 0
        self.starts: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, *, labels: Tensor) -> Tensor:
        self.images += len(x)
        if (t == 1).all():
            self.starts.append((x.clone(), labels.clone()))
        return 0.3 * x


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("name", ["teacher", "trajectory", "distribution"])
def test_calls_are_counted_as_they_are_made(name: str, steps: int, scale: float) -> None:
    field = Counting()
    draw, calls = sampler(name, field, steps, EvaluationSettings(guidance_scale=scale))
    draw(torch.randn(6, 1, 8, 8), torch.arange(6))
    assert field.images == 6 * calls
    assert calls == steps * (2 if name == "teacher" and scale != 1 else 1)


def test_all_rows_start_from_one_noise_and_one_label_draw(context: Context) -> None:
    settings = EvaluationSettings(samples=50, batch=20, teacher_steps=(1, 5), timing_repeats=2)
    fields = {name: Counting() for name in ("teacher", "trajectory", "distribution")}
    rows = evaluate(settings, context.data, fields, context.device, seed=3)
    assert [(row.name, row.steps, row.calls) for row in rows] == [
        ("held-out data", 0, 0),
        *(("teacher", 1, 1), ("teacher", 5, 5), ("trajectory", 1, 1), ("distribution", 1, 1)),
    ]
    starts: list[Tensor] = []
    for field in fields.values():
        # Batches of 20, 20, 10, in as many rounds as were timed.
        assert [len(x) for x, _ in field.starts[:3]] == [20, 20, 10]
        for first in range(0, len(field.starts), 3):
            starts.append(torch.cat([x for x, _ in field.starts[first : first + 3]]))
            labels = torch.cat([one for _, one in field.starts[first : first + 3]])
            assert torch.equal(labels, context.data.train_labels[:50])
    assert len(starts) == 2 + 1 + 2 + 2  # repeats for few calls; a single round for five
    assert all(torch.equal(start, starts[0]) for start in starts)
    assert 0.9 < starts[0].std() < 1.1
    assert len(starts[0].flatten(1).unique(dim=0)) == 50
    # The same field scores the same in every stage that asks it once.
    scores = [dataclasses.asdict(row) for row in rows if row.calls == 1]
    for row in scores:
        assert row.pop("name")
        assert row.pop("images_per_second") > 0
    assert scores[0] == scores[1] == scores[2]
    # A seed of its own: other noise.
    again = Counting()
    evaluate(settings, context.data, {"trajectory": again}, context.device, seed=4)
    assert not torch.isin(again.starts[0][0], starts[0]).any()


def test_more_samples_than_training_images_repeat_its_labels(context: Context) -> None:
    field = Counting()
    settings = EvaluationSettings(samples=1_500, batch=2_000, timing_repeats=1)
    rows = evaluate(settings, context.data, {"trajectory": field}, context.device, seed=0)
    labels = context.data.train_labels
    assert torch.equal(field.starts[0][1], torch.cat([labels, labels[: 1_500 - len(labels)]]))
    assert rows[1].samples == 1_500


def test_the_floor_is_the_held_out_data(context: Context) -> None:
    floor = evaluate(EvaluationSettings(), context.data, {}, context.device, seed=0)[0]
    meter = Meter(context.data)
    scores = meter.measure(context.data.held_out, context.data.held_out_labels)
    assert dataclasses.asdict(floor) == {
        "name": "held-out data",
        "steps": 0,
        "calls": 0,
        "images_per_second": None,
        **scores,
    }
    assert floor.samples == 360
    assert floor.accuracy > 0.98
    assert 0 < floor.fd < 3
    assert min(floor.precision, floor.recall) > 0.6


def test_the_training_split_measured_against_itself_is_perfect(context: Context) -> None:
    meter = Meter(context.data)
    scores = meter.measure(context.data.train, context.data.train_labels)
    assert scores["fd"] == pytest.approx(0, abs=1e-6)
    assert (scores["precision"], scores["recall"], scores["nearest"]) == (1, 1, 0)
    wrong = meter.measure(context.data.train, (context.data.train_labels + 1) % 10)
    assert wrong["accuracy"] < 0.02
    # Less than half a grey level is rounded away before anything is measured.
    near = context.data.train + 0.06 * torch.ones(1, 1, 8, 8)
    assert meter.measure(near, context.data.train_labels) == scores


def test_images_that_are_not_finite_are_a_users_error(context: Context) -> None:
    class Broken(Counting):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return x * torch.nan

    settings = EvaluationSettings(samples=20, timing_repeats=1)
    with pytest.raises(UserError, match=r"^trajectory, 1 step\(s\): .*finite"):
        evaluate(settings, context.data, {"trajectory": Broken()}, context.device, seed=0)


def test_time_is_the_median_of_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(clock))
    images, seconds = evaluation._timed(lambda: torch.ones(1), 3, torch.device("cpu"))
    assert seconds == 2.0
    assert torch.equal(images, torch.ones(1))


def test_the_table_says_what_the_rows_say() -> None:
    row = Row(
        name="teacher",
        steps=50,
        calls=100,
        samples=1_437,
        fd=7.256,
        kid=0.01234,
        precision=0.5,
        recall=0.25,
        accuracy=1.0,
        nearest=2.5,
        images_per_second=12_345.6,
    )
    data = dataclasses.replace(row, name="held-out data", steps=0, calls=0, images_per_second=None)
    header, first, second = format_rows([data, row], "digits").splitlines()
    assert header.split() == [
        *("steps", "calls", "N", "FD-digits", "KID", "prec.", "recall", "acc.", "nearest", "images/s")
    ]
    assert second.split() == [
        *("teacher", "50", "100", "1437", "7.26", "0.012", "0.500", "0.250", "1.000", "2.50", "12,346")
    ]
    assert first.split()[:5] == ["held-out", "data", "-", "-", "1437"]
    assert first.split()[-1] == "-"
    assert len(header) == len(first) == len(second)


def test_a_runs_evaluation_is_on_disk(finished: Path) -> None:
    results = json.loads((finished / "evaluation.json").read_text())
    rows = [(row["name"], row["steps"]) for row in results["rows"]]
    assert rows == [
        ("held-out data", 0),
        *(("teacher", 1), ("teacher", 3), ("teacher", 8), ("trajectory", 1), ("distribution", 1)),
    ]
    assert all(row["images_per_second"] > 0 for row in results["rows"][1:])
    assert all(row["samples"] == 60 for row in results["rows"][1:])
    # A result row records what it depends on.
    assert {"recipe", "seed", "data", "torch", "device", "machine", "guidance_scale"} <= results.keys()
    assert set(results["training_seconds"]) == {"teacher", "trajectory", "distribution"}


# ---- hdistill sample


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L"))


def cells(path: Path, count: int) -> list[np.ndarray]:
    """The images of a grid, ten in a row, each 8 pixels enlarged by 4 with a gap of 4."""
    grid = pixels(path)
    corners = [(index // 10 * 36 + 4, index % 10 * 36 + 4) for index in range(count)]
    return [grid[top : top + 32, left : left + 32] for top, left in corners]


@pytest.fixture
def draw(hdistill: Callable[..., Any], finished: Path, tmp_path: Path) -> Callable[..., list[np.ndarray]]:
    """``draw(stage, count, *arguments)``: the command's images."""

    def run(stage: str, count: int, *arguments: object) -> list[np.ndarray]:
        out = tmp_path / "picture.png"
        answer = hdistill("sample", finished / stage, "--count", count, "--out", out, *arguments)
        assert answer.code == 0, answer.err
        assert answer.out == f"Wrote {out}: {count} images\n"
        return cells(out, count)

    return run


def test_image_i_of_a_seed_does_not_depend_on_the_count(draw: Callable[..., list[np.ndarray]]) -> None:
    few, many = draw("distribution", 7), draw("distribution", 23)
    assert len(many) == 23
    for one, other in zip(few, many, strict=False):
        # Batches of other sizes may round otherwise: one grey value.
        assert np.abs(one.astype(int) - other).max() <= 1
    assert np.abs(few[0].astype(int) - few[1]).max() > 20
    assert all((a == b).all() for a, b in zip(few, draw("distribution", 7), strict=True))
    other = draw("distribution", 7, "--seed", 1)
    assert all((a != b).any() for a, b in zip(few, other, strict=True))


def test_labels_go_round(draw: Callable[..., list[np.ndarray]], network: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        network.label_embed.weight.mul_(30)
    folder = hd_zoo.save_pretrained(network, tmp_path / "teacher")
    turns = draw(folder, 6, "--labels", "3", "7", "--steps", "2")
    threes = draw(folder, 6, "--labels", "3", "--steps", "2")
    assert [bool((a == b).all()) for a, b in zip(turns, threes, strict=True)] == [True, False] * 3


def test_steps_and_guidance_reach_the_sampler(
    draw: Callable[..., list[np.ndarray]], network: nn.Module, tmp_path: Path
) -> None:
    # Networks that mind every input: after a few steps of training, two kinds of sampling look alike.
    student = hd_zoo.to_student(network)
    with torch.no_grad():
        for module in (network.label_embed, student.label_embed):
            module.weight.mul_(30)
        student.interval_embed.mlp[2].weight.normal_()
    folders = {
        "50": hd_zoo.save_pretrained(network, tmp_path / "teacher"),
        "1": hd_zoo.save_pretrained(student, tmp_path / "student"),
    }
    for plain, folder in folders.items():
        default = draw(folder, 4)
        assert all((a == b).all() for a, b in zip(default, draw(folder, 4, "--steps", plain), strict=True))
        assert all((a != b).any() for a, b in zip(default, draw(folder, 4, "--steps", "3"), strict=True))
    guided = draw(folders["50"], 4, "--guidance-scale", "8")
    assert all((a != b).any() for a, b in zip(draw(folders["50"], 4), guided, strict=True))
