"""What the page shows beside the table: the way between two noises, the nearest neighbours, the film, the classes."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import shutil
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from trainer_helpers import SHORT, hdistill

from hd_trainer.context import Context
from hd_trainer.data import InMemory, images_from_arrays
from hd_trainer.evaluation import EvaluationSettings
from hd_trainer.evaluation.distances import precision_recall
from hd_trainer.networks import make_student
from hd_trainer.report import film, per_class, pictures
from hd_trainer.report.figures import WIDEST, address
from hd_trainer.report.per_class import ClassRow, shown

#: Most cases are whole runs: they are tried once, beside all other packages.
pytestmark = pytest.mark.slow


def opened(text: str) -> Image.Image:
    """The picture of a data address."""
    return Image.open(io.BytesIO(b64decode(text.split(",")[1])))


# ---- between two noises


def test_the_arc_has_closed_form_points() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    found = pictures.spherical(a, b, torch.tensor([0.0, 1 / 3, 0.5, 1.0], dtype=torch.float64))
    half = math.sqrt(2)
    expected = [[[2.0, 0.0]], [[2 * math.cos(math.pi / 6), 1.0]], [[half, half]], [[0.0, 2.0]]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_on_the_arc_noise_keeps_the_length_of_noise() -> None:
    a, b = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    lengths = pictures.spherical(a, b, torch.linspace(0, 1, 9)).flatten(1).norm(dim=1)
    assert torch.all((lengths / a.norm() - 1).abs() < 0.03)
    straight = (a + b) / 2  # what a straight line would pass through is no noise any more
    assert straight.norm() < 0.75 * a.norm()


def test_the_arc_from_a_noise_to_itself_stays() -> None:
    a = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pictures.spherical(a, a, torch.tensor([0.0, 0.5, 1.0])), a.expand(3, 1, 4, 4))


class Noted(nn.Module):
    """A student that returns zeros and notes noise and labels: its one-step sample is the noise."""

    takes_r = True

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Tensor) -> Tensor:
        self.x, self.cond = x, cond
        return torch.zeros_like(x)


def test_a_row_keeps_its_class_and_goes_from_one_noise_to_another(context: Context) -> None:
    student = Noted()
    found = pictures.between(context, student, rows=5, columns=9)
    assert student.cond["labels"].tolist() == [label for label in (0, 2, 4, 6, 8) for _ in range(9)]
    torch.testing.assert_close(found, student.x)
    rows = found.reshape(5, 9, -1)
    ends = torch.cat([rows[:, 0], rows[:, -1]])
    assert len(torch.unique(ends, dim=0)) == 10, "no two rows share an end"
    # Equal steps along each arc.
    units = torch.nn.functional.normalize(rows.double(), dim=2)
    cosines = (units[:, 1:] * units[:, :-1]).sum(dim=2)
    angles = torch.arccos((units[:, 0] * units[:, -1]).sum(dim=1))
    assert bool((cosines > torch.cos(0.25 * angles)[:, None]).all())


def test_without_classes_there_are_rows_too(context: Context) -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    plain = dataclasses.replace(context, data=images_from_arrays("plain", images))
    student = Noted()
    assert pictures.between(plain, student, rows=3, columns=4).shape == (12, 1, 8, 8)
    assert student.cond == {}


# ---- the nearest training pictures


def test_the_nearest_are_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    split = InMemory(x=torch.randn(101, 1, 4, 4, generator=generator))
    samples = torch.randn(7, 1, 4, 4, generator=generator)
    brute = [min(range(101), key=lambda i: float((split.x[i] - one).norm())) for one in samples]
    torch.testing.assert_close(pictures.nearest(samples, split), split.x[brute])


# ---- the film


def grids(folder: Path, steps: list[int], side: int = 20) -> Path:
    """A stage's folder with a grid of one grey, the step's, for each step."""
    (folder / "samples").mkdir(parents=True)
    for step in steps:
        Image.new("RGB", (side, side), (step % 256,) * 3).save(folder / f"samples/{step:06d}.png")
    return folder


def test_a_film_has_the_first_and_the_last_grid_and_at_most_twelve(tmp_path: Path) -> None:
    folder = grids(tmp_path, list(range(1, 101)))
    (folder / "samples/.incomplete-x.png").write_bytes(b"half a picture")
    found = film.frames(folder)
    assert [frame.step for frame in found] == [1, 10, 19, 28, 37, 46, 55, 64, 73, 82, 91, 100]
    for frame in found:
        assert opened(frame.address).getpixel((0, 0)) == (frame.step,) * 3


def test_a_film_keeps_to_its_bytes(tmp_path: Path) -> None:
    folder = grids(tmp_path, list(range(1, 13)))
    one = max(len(frame.address) for frame in film.frames(folder))
    found = film.frames(folder, most_bytes=6 * one)
    assert [frame.step for frame in found][:: len(found) - 1] == [1, 12]
    assert 2 < len(found) <= 6
    assert film.frames(folder, most_bytes=one) == []


@pytest.mark.parametrize("steps", [[], [4]], ids=["none", "one"])
def test_a_film_needs_two_grids(steps: list[int], tmp_path: Path) -> None:
    assert film.frames(grids(tmp_path, steps)) == []


def test_wide_pictures_are_made_smaller() -> None:
    small, wide = Image.new("RGB", (WIDEST, 10)), Image.new("RGB", (2 * WIDEST, 20))
    assert address(small).startswith("data:image/png;base64,")
    assert address(wide).startswith("data:image/jpeg;base64,")
    assert opened(address(wide)).size == (WIDEST, 10)


def test_the_page_shows_the_frames_by_their_steps(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    for stage, steps in (("teacher", (5, 10, 12)), ("trajectory", (5, 9)), ("distribution", (5, 7))):
        inputs = re.findall(rf'<input type="radio" name="film-{stage}" id="film-{stage}-(\d+)"( checked)?>', text)
        assert inputs == [(str(step), " checked" * (step == steps[-1])) for step in steps]
    for index in range(1, film.MOST_FRAMES + 1):
        assert f".film input:nth-of-type({index}):checked ~ .frames img:nth-of-type({index})" in text
    assert "<script" not in text


# ---- class by class


def test_classes_are_measured_apart(context: Context, network: nn.Module) -> None:
    settings = EvaluationSettings(samples=300, batch=70)
    student = make_student(network, 0)
    found = per_class.per_class(context, settings, student)
    assert [row.name for row in found] == [str(label) for label in range(10)]
    # Once more, written out for one class.
    from hd_trainer.engine import draws
    from hd_trainer.evaluation.extractors import extract, load_extractors
    from hd_trainer.images import quantise
    from hd_zoo import sample_jumps

    data, extractor = context.data, load_extractors((), context.data, context.device)[0]
    batch = data.train.read(torch.arange(len(data.train)))
    labels = batch.cond["labels"]
    noise = draws.picture_noise(data.shape, draws.evaluation_seed(context.seed, 0, 300), 300)
    images = quantise(sample_jumps(student, noise, labels=labels[:300]), data.grey_levels)
    own = images[labels[:300] == 3]
    real = batch.x[labels == 3][: len(own)]
    expected = precision_recall(extract(extractor, real)[0], extract(extractor, own)[0])
    assert found[3].samples == len(own)
    assert (found[3].precision, found[3].recall) == pytest.approx(expected)


class Memory(nn.Module):
    """A one-step student that knows the training images of all classes but one, of which it knows a single image."""

    takes_r = True

    def __init__(self, context: Context, lost: int) -> None:
        super().__init__()
        split = context.data.train
        batch = split.read(torch.arange(len(split)))
        self.images = {label: batch.x[batch.cond["labels"] == label] for label in range(10)}
        self.images[lost] = self.images[lost][:1]
        self.seen = dict.fromkeys(range(10), 0)

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, *, labels: Tensor) -> Tensor:
        drawn = []
        for label in labels.tolist():
            images = self.images[label]
            drawn.append(images[self.seen[label] % len(images)])
            self.seen[label] += 1
        return x - torch.stack(drawn)


def test_a_class_that_was_lost_has_no_recall(context: Context) -> None:
    found = per_class.per_class(context, EvaluationSettings(samples=400), Memory(context, lost=4))
    assert [row.recall for row in found if row.name != "4"] == [1.0] * 9
    assert found[4].recall < 0.1


def test_of_many_classes_the_worst_ten_and_the_median_are_shown() -> None:
    rows = [ClassRow(f"c{index}", 50, 0.5 + index / 100, 1 - index / 100) for index in range(25)]
    found = shown(rows)
    assert found[0] == ClassRow("median of 25", None, 0.62, 0.88)
    assert [row.name for row in found[1:]] == [f"c{index}" for index in range(24, 14, -1)]
    assert shown(rows[:10]) == rows[:10]


def test_without_classes_or_an_extractor_there_is_no_such_table(context: Context, network: nn.Module) -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    student = make_student(network, 0)
    settings = EvaluationSettings(samples=20)
    for labels in (None, np.arange(40) % 10):
        other = dataclasses.replace(context, data=images_from_arrays("other", images, labels))
        assert per_class.per_class(other, settings, student) == []
    assert per_class.per_class(context, settings, student) == [], "two samples of a class say nothing"


def test_a_run_without_an_extractor_has_a_sensible_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", images=rng.integers(0, 255, (60, 8, 8, 3), dtype=np.uint8))
    short = [*SHORT[:2], "--data", f"npz:{tmp_path / 'data.npz'}", "--evaluation.extractors", "none", *SHORT[2:]]
    answer = hdistill(*short, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    text = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert {"Measured", "Between two noises", "Is it copying?", "Samples through training"} <= set(headings)
    assert "Class by class" not in headings
    assert "no distance was measured" in text
    assert "its class stays" not in text
    numbers = text[text.index('<div class="numbers">') : text.index("<h2>")]
    assert "recall" not in numbers
    assert "images per second of the teacher" in numbers
    shutil.rmtree(tmp_path / "run")
