"""Evaluation: what a row counts, that all rows start from one noise, and the sample command's pictures."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from trainer_helpers import hdistill, row

import hd_zoo
from hd_trainer import UserError
from hd_trainer.context import Context
from hd_trainer.data import Batch, Split, read_all
from hd_trainer.evaluation import (
    EvaluationSettings,
    Meter,
    evaluate,
    format_rows,
    load_extractors,
    measure,
    nearest_training,
    read_results,
    save_rows,
)
from hd_trainer.evaluation.rows import PIXELS, SCORES, Row, row_of_seeds
from hd_trainer.networks import GuidanceSettings, sampler


class Counting(nn.Module):
    """A field that shrinks its input, and notes how many images it was asked about and the first ones."""

    def __init__(self, takes_r: bool = True) -> None:
        super().__init__()
        self.takes_r = takes_r
        self.images = 0
        self.starts: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, *, labels: Tensor) -> Tensor:
        self.images += len(x)
        if (t == 1).all():
            self.starts.append((x.clone(), labels.clone()))
        return 0.3 * x


def meter_of(context: Context) -> Meter:
    """A meter with the data's own extractor."""
    return Meter(context.data, load_extractors((), context.data, torch.device("cpu")))


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("student", [False, True])
def test_calls_are_counted_as_they_are_made(student: bool, steps: int, scale: float) -> None:
    field = Counting(takes_r=student)
    draw, calls = sampler(field, steps, GuidanceSettings(scale=scale), {"labels": 10})
    draw(torch.randn(6, 1, 8, 8), {"labels": torch.arange(6)})
    assert field.images == 6 * calls
    assert calls == steps * (2 if not student and scale != 1 else 1)


def test_all_rows_start_from_one_noise_and_one_label_draw(context: Context) -> None:
    settings = EvaluationSettings(samples=50, seeds=1, batch=20, teacher_steps=(1, 5), timing_repeats=2)
    fields = {name: Counting(takes_r=name != "teacher") for name in ("teacher", "trajectory", "distribution")}
    rows = evaluate(settings, context, dict(fields))
    assert [(one.name, one.steps, one.calls) for one in rows] == [
        ("held-out data", 0, 0),
        *(("teacher", 1, 1), ("teacher", 5, 5), ("trajectory", 1, 1), ("distribution", 1, 1)),
    ]
    starts: list[Tensor] = []
    asked = read_all(context.data.train).cond["labels"][:50]
    for field in fields.values():
        # Batches of 20, 20, 10, in as many rounds as were timed.
        assert [len(x) for x, _ in field.starts[:3]] == [20, 20, 10]
        for first in range(0, len(field.starts), 3):
            starts.append(torch.cat([x for x, _ in field.starts[first : first + 3]]))
            assert torch.equal(torch.cat([one for _, one in field.starts[first : first + 3]]), asked)
    assert len(starts) == 2 + 1 + 2 + 2  # repeats for few calls; a single round for five
    assert all(torch.equal(start, starts[0]) for start in starts)
    assert 0.9 < starts[0].std() < 1.1
    assert len(starts[0].flatten(1).unique(dim=0)) == 50
    # The same field scores the same in every stage that asks it once.
    scores = [dataclasses.asdict(one) for one in rows if one.calls == 1]
    for score in scores:
        assert score.pop("name")
        assert score.pop("images_per_second") > 0
    assert scores[0] == scores[1] == scores[2]
    # A seed of its own: other noise.
    again = Counting()
    evaluate(settings, dataclasses.replace(context, seed=context.seed + 1), {"trajectory": again})
    assert not torch.isin(again.starts[0][0], starts[0]).any()


def test_more_samples_than_training_images_repeat_its_labels(context: Context) -> None:
    field = Counting()
    settings = EvaluationSettings(samples=1_500, seeds=1, batch=2_000, timing_repeats=1)
    rows = evaluate(settings, context, {"trajectory": field})
    labels = read_all(context.data.train).cond["labels"]
    assert torch.equal(field.starts[0][1], torch.cat([labels, labels[: 1_500 - len(labels)]]))
    assert rows[-1].samples == 1_500


def test_every_sampling_seed_has_noise_of_its_own_and_the_row_is_their_mean(context: Context) -> None:
    field = Counting()
    settings = EvaluationSettings(samples=40, seeds=3, batch=40, timing_repeats=3)
    one = evaluate(settings, context, {"trajectory": field})[-1]
    # The first seed is timed: three times the same. The others are sampled once.
    starts = [x for x, _ in field.starts]
    assert len(starts) == 5
    assert torch.equal(starts[0], starts[2])
    assert len(torch.cat(starts[2:]).flatten(1).unique(dim=0)) == 3 * 40
    fewer = [dataclasses.replace(settings, seeds=number) for number in (1, 2)]
    alone = [evaluate(one, context, {"trajectory": Counting()})[-1] for one in fewer]
    assert alone[1].per_seed == one.per_seed[:2]
    assert alone[0].fd == one.per_seed[0]["fd"]  # seed 0 is what a single one gives
    for name in ("fd", "kid", "recall", "nearest", "deviation"):
        values = [seed[name] for seed in one.per_seed]
        assert one.score(name) == pytest.approx(sum(values) / 3)
        assert one.range(name) == (min(values), max(values))
    assert one.range("fd") is not None
    assert len({seed["fd"] for seed in one.per_seed}) == 3


def test_labels_are_the_training_splits_or_drawn_from_it(context: Context) -> None:
    own = read_all(context.data.train).cond["labels"][:50]
    found = {}
    for labels in ("training", "random"):
        field = Counting()
        settings = EvaluationSettings(samples=50, seeds=2, labels=labels, timing_repeats=1)  # type: ignore[arg-type]
        evaluate(settings, context, {"trajectory": field})
        found[labels] = [one for _, one in field.starts]
    assert all(torch.equal(one, own) for one in found["training"])
    assert not any(torch.equal(one, own) for one in found["random"])
    assert not torch.equal(*found["random"])
    with pytest.raises(UserError, match="labels must be one of training, random"):
        EvaluationSettings(labels="balanced")  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [7, 50])
def test_results_do_not_depend_on_the_batch(batch: int, context: Context) -> None:
    def rows(size: int) -> list[Row]:
        settings = EvaluationSettings(samples=50, seeds=2, batch=size, timing_repeats=1)
        return evaluate(settings, context, {"trajectory": Counting()})

    for one, other in zip(rows(batch), rows(20), strict=True):
        for name in (*SCORES, *PIXELS):
            assert one.score(name) == pytest.approx(other.score(name), rel=1e-5)


def test_where_less_is_held_out_than_generated_two_halves_of_the_training_split_are_a_floor(context: Context) -> None:
    few, many = (evaluate(EvaluationSettings(samples=count), context, {}) for count in (300, 1_000))
    assert [(one.name, one.samples) for one in few] == [("held-out data", 300)]
    assert [(one.name, one.samples) for one in many] == [("held-out data", 360), ("training halves", 718)]
    assert many[1].fd is not None
    assert 0 < many[1].fd < 1
    assert min(many[1].precision or 0, many[1].recall or 0, many[1].coverage or 0) > 0.7
    assert abs(many[1].kid or 1) < 0.05


def test_the_meter_and_the_report_keep_no_copy_of_the_training_pictures(context: Context) -> None:
    class Counted:
        """A split that notes how many samples it is asked for at once."""

        def __init__(self, split: Split) -> None:
            self.split, self.most = split, 0

        def __len__(self) -> int:
            return 3 * len(self.split)

        def read(self, index: Tensor) -> Batch:
            self.most = max(self.most, len(index))
            return self.split.read(index % len(self.split))

        def cond(self, index: Tensor) -> dict[str, Tensor]:
            return self.split.cond(index % len(self.split))

    split = Counted(context.data.train)
    data = dataclasses.replace(context.data, train=split)
    split.most = 0
    meter = Meter(data, load_extractors((), data, torch.device("cpu")))
    samples = read_all(context.data.held_out).x
    distance, index = nearest_training(samples, split)
    meter.measure(samples, {})
    assert split.most <= 2_000 < len(split)
    whole = torch.cdist(samples.flatten(1), read_all(context.data.train).x.flatten(1))
    torch.testing.assert_close(distance, whole.amin(dim=1), rtol=1e-4, atol=1e-4)
    found = read_all(context.data.train).x[index % len(split.split)]
    torch.testing.assert_close((samples - found).flatten(1).norm(dim=1), distance, rtol=1e-4, atol=1e-4)


def test_the_floor_is_the_held_out_data(context: Context) -> None:
    floor = evaluate(EvaluationSettings(), context, {})[0]
    held_out = read_all(context.data.held_out)
    scores = meter_of(context).measure(held_out.x, held_out.cond)
    facts: dict[str, Any] = {"steps": 0, "calls": 0, "images_per_second": None, "samples": 360}
    assert floor == Row(name="held-out data", **facts, **scores)
    assert floor.samples == 360
    assert floor.accuracy is not None
    assert floor.accuracy > 0.98
    assert floor.fd is not None
    assert 0 < floor.fd < 3
    assert min(floor.precision or 0, floor.recall or 0) > 0.6
    assert floor.deviation == pytest.approx(float(held_out.x.std(dim=0).mean()))


def test_the_training_split_measured_against_itself_is_perfect(context: Context) -> None:
    meter, train = meter_of(context), read_all(context.data.train)
    scores = meter.measure(train.x, train.cond)
    assert scores["fd"] == pytest.approx(0, abs=1e-6)
    assert (scores["precision"], scores["recall"], scores["coverage"], scores["nearest"]) == (1, 1, 1, 0)
    wrong = meter.measure(train.x, {"labels": (train.cond["labels"] + 1) % 10})
    assert wrong["accuracy"] < 0.02
    # Less than half a grey level is rounded away before anything is measured.
    near = train.x + 0.06 * torch.ones(1, 1, 8, 8)
    assert meter.measure(near, train.cond) == scores


def test_images_that_are_all_alike_have_no_deviation(context: Context) -> None:
    one = read_all(context.data.train, 1)
    scores = meter_of(context).measure(one.x.expand(30, -1, -1, -1), {"labels": one.cond["labels"].expand(30)})
    assert scores["deviation"] == 0


def test_images_that_are_not_finite_are_a_users_error(context: Context) -> None:
    class Broken(Counting):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return x * torch.nan

    settings = EvaluationSettings(samples=20, timing_repeats=1)
    with pytest.raises(UserError, match=r"^trajectory, 1 step\(s\): .*finite"):
        evaluate(settings, context, {"trajectory": Broken()})


def test_time_is_the_median_of_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    images, seconds = measure._timed(lambda: torch.ones(1), 3, torch.device("cpu"))
    assert seconds == 2.0
    assert torch.equal(images, torch.ones(1))


#: What the report needs to know beside the rows.
FACTS = {
    "extractors": [{"name": "digits"}],
    "seed": 3,
    "training_seconds": {"teacher": 1.5},
    "torch": "2.13",
    "device": "cpu",
    "threads": 1,
    "guidance_scale": 1.0,
}


def test_the_table_says_what_the_rows_say() -> None:
    data = row("held-out data", steps=0, calls=0, images_per_second=None)
    header, first, second = format_rows([data, row()], ["digits"]).splitlines()
    assert header.split() == [
        *("steps", "calls", "N", "FD-digits", "KID", "prec.", "recall", "acc.", "nearest", "images/s")
    ]
    assert second.split() == [
        *("teacher", "50", "100", "1437", "7.26", "0.012", "0.500", "0.250", "1.000", "2.50", "12,346")
    ]
    assert first.split()[:5] == ["held-out", "data", "-", "-", "1437"]
    assert first.split()[-1] == "-"
    assert len(header) == len(first) == len(second)


def test_a_table_without_an_extractor_has_dashes() -> None:
    unmeasured = dict.fromkeys(("fd", "kid", "precision", "recall", "accuracy"))
    header, line = format_rows([row(**unmeasured)], []).splitlines()
    assert header.split()[3:5] == ["FD", "KID"]
    assert line.split() == [*("teacher", "50", "100", "1437", "-", "-", "-", "-", "2.50", "12,346")]
    assert len(header) == len(line)


def test_the_table_shows_each_extractor_and_the_range_over_the_seeds() -> None:
    scores: dict[str, Any] = {**dict.fromkeys(SCORES), "precision": 0.5, "recall": 0.25}
    per_seed = [
        {**scores, "seed": seed, "fd": fd, "kid": 0.1, "nearest": 2.0, "deviation": 0.5}
        | {"further": {"FID": {**scores, "fd": 10 * fd, "kid": 0.2}}}
        for seed, fd in enumerate((3.0, 1.0, 5.0))
    ]
    facts: dict[str, Any] = {"steps": 4, "calls": 4, "samples": 20, "images_per_second": 7.0}
    one = row_of_seeds(per_seed, name="teacher", **facts)
    assert (one.fd, one.range("fd"), one.accuracy) == (3.0, (1.0, 5.0), None)
    assert (one.score("fd", "FID"), one.range("fd", "FID")) == (30.0, (10.0, 50.0))
    assert one.range("accuracy") is None
    own, other = (table.splitlines() for table in format_rows([one], ["own", "FID"]).split("\n\n"))
    assert "FD-own" in own[0]
    assert own[1].split()[4] == "3.00"
    assert own[2].split()[0] == "1.00..5.00"
    assert other[0].split()[3] == "FID"  # the standard extractor's name stands alone
    assert other[2].split()[0] == "10.00..50.00"


def test_rows_go_to_disk_and_back(tmp_path: Path) -> None:
    rows = [row("held-out data", images_per_second=None), row(fd=None, accuracy=None)]
    save_rows(rows, tmp_path, FACTS)
    assert read_results(tmp_path) == (rows, FACTS)


def test_several_extractors_and_seeds_go_to_disk_and_back(tmp_path: Path) -> None:
    scores = dict.fromkeys(SCORES, 0.5)
    per_seed = [{"seed": seed, **scores, **dict.fromkeys(PIXELS, 1.5), "further": {"b": scores}} for seed in range(3)]
    facts: dict[str, Any] = {"steps": 4, "calls": 4, "samples": 20, "images_per_second": 7.0}
    floor = row("held-out data", images_per_second=None, further={"b": scores})
    rows = [floor, row_of_seeds(per_seed, name="teacher", **facts)]
    names = {**FACTS, "extractors": [{"name": "a"}, {"name": "b"}]}
    save_rows(rows, tmp_path, names)
    assert read_results(tmp_path) == (rows, names)
    save_rows(rows, tmp_path, FACTS)  # a table of one extractor with rows of two
    with pytest.raises(UserError, match="damaged"):
        read_results(tmp_path)


def test_rows_of_the_first_format_are_read() -> None:
    rows, facts = read_results(Path(__file__).parent / "data" / "run_of_0.1.0")
    assert rows[0].name == "held-out data"
    assert {one.name for one in rows[1:]} == {"teacher", "trajectory", "distribution"}
    assert all(one.deviation is None and one.per_seed == () for one in rows)
    assert facts["extractors"] == [{"name": "digits"}]
    assert set(facts["training_seconds"]) == {"teacher", "trajectory", "distribution"}


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": None},
        {"rows": []},
        {"rows": {}},
        {"rows": 3},
        {"rows": [None]},
        {"rows": [{"name": "held-out data"}]},
        {"rows": [{**vars(row("teacher"))}]},
        {"rows": [{**vars(row("held-out data")), "fd": "7"}]},
        {"rows": [{**vars(row("held-out data")), "samples": None}]},
        {"rows": [{**vars(row("held-out data")), "further": {"b": {"fd": "7"}}}]},
        {"rows": [{**vars(row("held-out data")), "per_seed": [{"fd": 7.0}]}]},
        {"rows": [{**vars(row("held-out data")), "per_seed": 3}]},
        {"extractors": [3]},
        {"extractors": None},
        {"rows": [{**vars(row("held-out data")), "steps": True}]},
        {"rows": [{**vars(row("held-out data")), "steps": [1]}]},
        {"rows": [vars(row("held-out data")), {**vars(row()), "name": 7}]},
        {"training_seconds": None},
        {"training_seconds": 4},
        {"training_seconds": {"teacher": "long"}},
        {"threads": None},
        {"device": 0},
        {"guidance_scale": float("nan")},
    ],
    ids=str,
)
def test_a_damaged_evaluation_is_one_line(damage: dict[str, Any], tmp_path: Path) -> None:
    facts: dict[str, Any] = {**FACTS, "rows": [vars(row("held-out data"))]}
    (tmp_path / "evaluation.json").write_text(json.dumps(facts))
    assert read_results(tmp_path)[1] == FACTS
    (tmp_path / "evaluation.json").write_text(json.dumps({**facts, **damage}))
    with pytest.raises(UserError, match=r"evaluation\.json is damaged; run: hdistill evaluate"):
        read_results(tmp_path)


def test_a_runs_evaluation_is_on_disk(finished: Path) -> None:
    results = json.loads((finished / "evaluation.json").read_text())
    rows = [(one["name"], one["steps"]) for one in results["rows"]]
    assert rows == [
        ("held-out data", 0),
        *(("teacher", 1), ("teacher", 3), ("teacher", 8), ("trajectory", 1), ("distribution", 1)),
    ]
    assert all(one["images_per_second"] > 0 for one in results["rows"][1:])
    assert all(one["samples"] == 60 for one in results["rows"][1:])
    # A result row records what it depends on.
    assert {"recipe", "seed", "data", "torch", "device", "machine", "guidance_scale", "labels"} <= results.keys()
    assert results["sampling_seeds"] == 3
    assert [one["name"] for one in results["extractors"]] == ["digits"]
    assert all([seed["seed"] for seed in one["per_seed"]] == [0, 1, 2] for one in results["rows"][1:])
    assert set(results["training_seconds"]) == {"teacher", "trajectory", "distribution"}


# ---- hdistill sample


def cells(path: Path, count: int) -> list[np.ndarray]:
    """The images of a grid, ten in a row, each 8 pixels enlarged by 4 with a gap of 4."""
    with Image.open(path) as picture:
        grid = np.asarray(picture.convert("L"))
    corners = [(index // 10 * 36 + 4, index % 10 * 36 + 4) for index in range(count)]
    return [grid[top : top + 32, left : left + 32] for top, left in corners]


def drawn(folder: Path, out: Path, count: int, *arguments: object) -> list[np.ndarray]:
    """The images that the command draws with a folder's weights."""
    answer = hdistill("sample", folder, "--count", count, "--out", out, *arguments)
    assert answer.code == 0, answer.err
    assert answer.out == f"Wrote {out}: {count} images\n"
    return cells(out, count)


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> list[bool]:
    """Image by image."""
    return [bool((one == other).all()) for one, other in zip(a, b, strict=True)]


def strengthen(module: Any) -> None:
    """Make a network mind its label: after a few steps of training, all classes look alike."""
    with torch.no_grad():
        module.label_embed.weight.mul_(30)


def test_image_i_of_a_seed_does_not_depend_on_the_count(finished: Path, tmp_path: Path) -> None:
    stage, out = finished / "distribution", tmp_path / "picture.png"
    few, many = drawn(stage, out, 7), drawn(stage, out, 23)
    assert len(many) == 23
    for one, other in zip(few, many, strict=False):
        # Batches of other sizes may round otherwise: one grey value.
        assert np.abs(one.astype(int) - other).max() <= 1
    assert np.abs(few[0].astype(int) - few[1]).max() > 20
    assert all(equal(few, drawn(stage, out, 7)))
    assert not any(equal(few, drawn(stage, out, 7, "--seed", 1)))


def test_labels_go_round(network: nn.Module, tmp_path: Path) -> None:
    strengthen(network)
    folder, out = hd_zoo.save_pretrained(network, tmp_path / "teacher"), tmp_path / "picture.png"
    turns = drawn(folder, out, 6, "--labels", "3", "7", "--steps", "2")
    threes = drawn(folder, out, 6, "--labels", "3", "--steps", "2")
    assert equal(turns, threes) == [True, False] * 3


def test_steps_reach_the_sampler(network: nn.Module, tmp_path: Path) -> None:
    strengthen(network)
    student: Any = hd_zoo.to_student(network)
    with torch.no_grad():
        student.interval_embed.mlp[2].weight.normal_()
    out = tmp_path / "picture.png"
    for module, plain in ((network, "50"), (student, "1")):
        folder = hd_zoo.save_pretrained(module, tmp_path / f"takes {plain}")
        default = drawn(folder, out, 4)
        assert all(equal(default, drawn(folder, out, 4, "--steps", plain)))
        assert not any(equal(default, drawn(folder, out, 4, "--steps", "3")))


def test_guidance_reaches_the_sampler(network: nn.Module, tmp_path: Path) -> None:
    strengthen(network)
    folder, out = hd_zoo.save_pretrained(network, tmp_path / "teacher"), tmp_path / "picture.png"
    assert not any(equal(drawn(folder, out, 4), drawn(folder, out, 4, "--guidance-scale", "8")))


def test_of_a_run_its_last_stage_is_sampled(finished: Path, tmp_path: Path) -> None:
    out, copy = tmp_path / "picture.png", tmp_path / "copy"
    assert all(equal(drawn(finished, out, 4), drawn(finished / "distribution", out, 4)))
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "distribution")
    assert all(equal(drawn(copy, out, 4), drawn(finished / "trajectory", out, 4)))
    shutil.rmtree(copy / "trajectory")
    assert all(equal(drawn(copy, out, 4), drawn(finished / "teacher", out, 4)))
    shutil.rmtree(copy / "teacher")
    answer = hdistill("sample", copy, "--out", out)
    assert answer.code == 2
    assert "no trained stage in" in answer.line
