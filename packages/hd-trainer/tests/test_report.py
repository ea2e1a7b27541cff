"""The report: one file that stands alone, with everything a reader was promised."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from trainer_helpers import hdistill, row

from hd_dmd import UniformLevels
from hd_trainer import Settings, UserError, load_recipe
from hd_trainer.evaluation import Row
from hd_trainer.files import read_records
from hd_trainer.networks import is_student, read_network, sampler
from hd_trainer.pipeline import context_of
from hd_trainer.report import pictures as report_pictures
from hd_trainer.report.figures import CURVES
from hd_trainer.report.page import command_line
from hd_trainer.report.summary import final_accuracy, summarise, warnings
from hd_trainer.run_folder import read_settings
from hd_trainer.stages.discriminator import prepare_judge, save_discriminator

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects what the tests ask about, and refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag in ("h2", "h3"):
            self.headings.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> inside <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] in (["td"], ["th"]):
            self.cells[-1][-1] += data
        if self.open[-1:] in (["h2"], ["h3"]):
            self.headings[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def text(finished: Path) -> str:
    """The finished run's page."""
    return (finished / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    """The same, taken apart."""
    return Page(text)


def picture(attributes: dict[str, Any]) -> Image.Image:
    """The picture inside an <img>."""
    return Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1])))


def test_every_tag_is_closed(page: Page) -> None:
    assert page.open == []
    assert {"html", "head", "body", "title", "table", "svg"} <= {tag for tag, _ in page.tags}


def test_nothing_is_loaded_from_outside(page: Page, text: str) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "image"), tag
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
        for value in attributes.values():
            found = re.findall(r"url\(([^)]*)\)", value or "")
            assert all(one.startswith("#") for one in found), (tag, value)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "file:" not in text


def test_the_three_stages_are_shown_from_one_noise(page: Page) -> None:
    images = {attributes["alt"]: picture(attributes) for attributes in page.named("img")}
    names = ("teacher, samples", "stage 1, trajectory, samples", "stage 2, distribution, samples")
    assert {*names, "nearest training images"} <= images.keys()
    sizes = {images[name].size for name in names}
    assert len(sizes) == 1
    assert len({images[name].tobytes() for name in names}) == 3
    for image in images.values():
        colors = image.convert("L").getcolors(10_000)
        assert colors is not None
        assert len(colors) > 5


def test_pictures_and_title_name_the_same_steps(text: str) -> None:
    titles = re.findall(r"<title>(.*?)</title>|<h1>(.*?)</h1>", text)
    assert [one or other for one, other in titles] == ["digits: 8 steps to one step"] * 2
    captions = re.findall(r"<figcaption><b>(?:Teacher|Stage \d, \w+)</b>: (.*?)</figcaption>", text)
    assert captions == ["8 steps", "one step", "one step"]
    assert "images per second of the teacher<br>in 8 steps" in text


def test_the_pictures_are_drawn_in_the_steps_of_their_captions(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    drawn: list[tuple[bool, int]] = []

    def noting(network: nn.Module, steps: int, *rest: Any) -> Any:
        drawn.append((is_student(network), steps))
        return sampler(network, steps, *rest)

    monkeypatch.setattr(report_pictures, "sampler", noting)
    assert hdistill("report", copy).code == 0
    assert drawn == [(False, 8), (True, 1), (True, 1), (True, 1)]  # the last is the way between two noises


def test_the_table_has_every_row(page: Page, finished: Path) -> None:
    rows = json.loads((finished / "evaluation.json").read_text())["rows"]
    header, *lines = page.cells
    assert header[4] == "FD-digits"
    assert len(lines) == len(rows) == 6
    for line, one in zip(lines, rows, strict=True):
        assert one["name"] in line[0]
        assert line[1:3] == [str(one["steps"] or ""), str(one["calls"] or "")]
        assert line[4:8] == [
            f"{one['fd']:.2f}",
            f"{one['kid']:.3f}",
            f"{one['precision']:.3f}",
            f"{one['recall']:.3f}",
        ]
    assert "held-out" in lines[0][0]


def test_the_curves_are_there_and_find_their_records(page: Page, finished: Path) -> None:
    headings = " | ".join(page.headings)
    for stage, panels in CURVES.items():
        assert re.search(rf"{stage}, \d+ s", headings), headings
        known = {name for record in read_records(finished / stage / "metrics.jsonl") for name in record}
        for _, names, _ in panels:
            assert set(names) <= known, f"{stage} records no {set(names) - known}"
    assert len(page.named("svg")) == len(CURVES) + 1


def test_the_token_weights_are_shown_per_layer(page: Page, finished: Path) -> None:
    layers = json.loads((finished / "distribution/discriminator.json").read_text())["layers"]
    assert "Where the discriminator looks" in page.headings
    assert set(layers) <= set(page.headings)
    alts = [attributes["alt"] for attributes in page.named("img")]
    assert alts.count("weights on real images") == alts.count("weights on generated images") == len(layers)


@pytest.mark.parametrize(
    "variant",
    [
        {"pooling": "attention", "merge": "concatenate", "num_heads": 4},
        {"pooling": "scorer", "pool_over": "logits"},
    ],
    ids=str,
)
def test_token_weights_of_every_kind_are_drawn(variant: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    settings = read_settings(copy)
    own = settings.distribution.discriminator
    own = dataclasses.replace(own, network=dataclasses.replace(own.network, **variant))
    context = context_of(settings)
    judge = prepare_judge(own, context, read_network(copy / "teacher", context.device))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in judge.discriminator.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    save_discriminator(judge, copy / "distribution")
    assert hdistill("report", copy).code == 0
    page = Page((copy / "report.html").read_text(encoding="utf-8"))
    for kind in ("real", "generated"):
        drawn = [picture(a) for a in page.named("img") if a["alt"] == f"weights on {kind} images"]
        assert len(drawn) == len(own.layers)
        # Below the images lie the weights: not all alike once the head is no longer fresh.
        for image in drawn:
            width, height = image.size
            colors = image.crop((0, height // 2 + 4, width, height)).getcolors(100_000)
            assert colors is not None
            assert len(colors) > 5


def test_the_page_says_what_its_numbers_are(text: str) -> None:
    words = " ".join(text.split())
    assert "it is not FID" in words
    assert "a floor, real against real" in words
    assert "means over 3 sampling seeds" in words


def test_the_settings_stand_in_the_page(text: str) -> None:
    for name in ("trajectory", "endpoint_share", "student_update_every", "time_scale"):
        assert name in text


def test_a_report_can_be_written_again(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    (copy / "report.html").unlink()
    answer = hdistill("report", copy)
    assert (answer.code, answer.out) == (0, f"Wrote {copy / 'report.html'}\n")
    again = Page((copy / "report.html").read_text(encoding="utf-8"))
    assert again.cells == Page((finished / "report.html").read_text(encoding="utf-8")).cells


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("evaluation.json", "is not evaluated yet; run: hdistill evaluate"),
        ("distribution/model.safetensors", "no model.safetensors in"),
        ("recipe.json", "is not a run's folder"),
    ],
)
def test_an_unfinished_run_is_one_line(missing: str, message: str, finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    (copy / "report.html").unlink()
    (copy / missing).unlink()
    answer = hdistill("report", copy)
    assert answer.code == 2
    assert message in answer.line
    assert not (copy / "report.html").exists()


def test_a_run_that_was_evaluated_before_a_stage_was_lost_is_one_line(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    (copy / "report.html").unlink()
    shutil.rmtree(copy / "distribution")
    answer = hdistill("report", copy)
    assert answer.code == 2
    assert "distribution" in answer.line
    assert "hdistill evaluate" in answer.line
    assert not (copy / "report.html").exists()


def test_a_damaged_evaluation_is_one_line(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    (copy / "evaluation.json").write_text("{}")
    answer = hdistill("report", copy)
    assert answer.code == 2
    assert "evaluation.json is damaged; run: hdistill evaluate" in answer.line


def with_network(settings: Settings, **changes: Any) -> Settings:
    """The settings with the discriminator's network changed."""
    own = settings.distribution.discriminator
    own = dataclasses.replace(own, network=dataclasses.replace(own.network, **changes))
    return dataclasses.replace(settings, distribution=dataclasses.replace(settings.distribution, discriminator=own))


def test_the_command_on_the_page_makes_the_run() -> None:
    full, small = load_recipe("digits"), load_recipe("digits", smoke=True)
    assert command_line(full, {}) == "hdistill run digits"
    assert command_line(small, {}) == "hdistill run digits --smoke"
    own = dataclasses.replace(full.distribution.discriminator, noise_levels=UniformLevels(low=0.1, high=0.5))
    changed = dataclasses.replace(full, distribution=dataclasses.replace(full.distribution, discriminator=own), seed=3)
    levels = "--distribution.discriminator.noise-levels"
    assert command_line(changed, {}) == f"hdistill run digits --seed 3 {levels}.low 0.1 {levels}.high 0.5"


def test_the_discriminators_network_has_its_flags_beside_the_discriminators_own() -> None:
    changed = with_network(load_recipe("digits"), pooling="scorer", merge="concatenate", num_heads=4)
    flags = [f"distribution.discriminator.{flag}" for flag in ("pooling scorer", "merge concatenate", "num-heads 4")]
    assert sorted(command_line(changed, {}).split(" --")[1:]) == sorted(flags)


def test_weights_that_were_brought_stand_in_the_command() -> None:
    brought = {"teacher": "a b/teacher", "student": "a/trajectory"}
    expected = "hdistill run digits --teacher 'a b/teacher' --student-weights a/trajectory"
    assert command_line(load_recipe("digits"), brought) == expected


# ---- the headline, on synthetic tables

FLOOR = row("held-out data", steps=0, calls=0, fd=0.9, recall=0.9, deviation=0.5, images_per_second=None)


def healthy() -> list[Row]:
    """A table as a good run has it: the teacher is at its best with four steps."""
    return [
        FLOOR,
        row("teacher", steps=4, fd=2.0, recall=0.8, deviation=0.48, images_per_second=500.0),
        row("teacher", steps=250, fd=2.5, recall=0.7, deviation=0.47, images_per_second=10.0),
        row("teacher", steps=1, fd=60.0, recall=0.0, deviation=0.1, images_per_second=2_000.0),
        row("trajectory", steps=4, fd=6.0, recall=0.5, deviation=0.44, images_per_second=500.0),
        row("trajectory", steps=1, fd=7.0, recall=0.4, deviation=0.43, images_per_second=2_000.0),
        row("distribution", steps=1, fd=3.0, recall=0.6, deviation=0.46, images_per_second=2_000.0),
    ]


def test_the_headline_compares_with_the_teacher_at_its_most_steps_and_at_its_best() -> None:
    found = summarise(healthy())
    assert (found["teacher"].steps, found["best"].steps) == (250, 4)
    assert [found[stage].steps for stage in ("trajectory", "distribution")] == [1, 1]
    assert found["last"] is found["distribution"]
    assert found["speed_ratio"] == pytest.approx(200)
    assert found["best_speed_ratio"] == pytest.approx(4)


def test_without_stage_2_the_headline_is_stage_1s() -> None:
    found = summarise(healthy()[:-1])
    assert found["distribution"] is None
    assert found["last"] is found["trajectory"]


def test_without_a_distance_the_best_row_is_the_one_with_most_steps() -> None:
    found = summarise([dataclasses.replace(one, fd=None) for one in healthy()])
    assert found["best"] is found["teacher"]
    assert found["teacher"].steps == 250


@pytest.mark.parametrize(
    ("missing", "message"), [("teacher", "no row for teacher"), ("student", "no row for trajectory, distribution")]
)
def test_a_table_without_a_comparison_is_one_line(missing: str, message: str) -> None:
    rows = [one for one in healthy() if (one.name in ("trajectory", "distribution")) != (missing == "student")]
    rows = [one for one in rows if missing == "student" or one.name != "teacher"]
    with pytest.raises(UserError, match=message):
        summarise(rows)


def training(folder: Path, accuracies: list[float], name: str = "discriminator_accuracy") -> Path:
    """A run's folder in which stage 2 noted how often its discriminator was right."""
    (folder / "distribution").mkdir(parents=True)
    lines = [json.dumps({"step": i + 1, "seconds": 1.0, name: value}) for i, value in enumerate(accuracies)]
    (folder / "distribution" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def said(rows: list[Row], folder: Path) -> list[str]:
    """The warnings about a table."""
    return warnings(rows, summarise(rows), folder)


def test_a_healthy_run_has_no_warning(tmp_path: Path) -> None:
    # Early on the discriminator wins; what counts is the end.
    assert said(healthy(), training(tmp_path, [1.0] * 15 + [0.8] * 5)) == []


@pytest.mark.parametrize("stage", ["trajectory", "distribution"])
def test_a_stage_that_has_collapsed_is_named(stage: str, tmp_path: Path) -> None:
    rows = [dataclasses.replace(one, deviation=0.2) if one.name == stage else one for one in healthy()]
    (sentence,) = said(rows, tmp_path)
    assert re.match(rf"Stage \d \({stage}\) has collapsed: its pixels vary 0\.20 .* real images 0\.50", sentence)


@pytest.mark.parametrize("name", ["discriminator_accuracy", "told_apart"])  # today's name and the first format's
def test_a_discriminator_that_has_won_is_named(name: str, tmp_path: Path) -> None:
    (sentence,) = said(healthy(), training(tmp_path, [0.7] * 15 + [0.995] * 5, name))
    assert sentence.startswith("The discriminator is right in 99.5% of the cases at the end of stage 2")


def test_a_teacher_far_from_the_data_is_named(tmp_path: Path) -> None:
    rows = [dataclasses.replace(one, fd=80.0) if one.name == "teacher" else one for one in healthy()]
    (sentence,) = said(rows, tmp_path)
    assert "its best distance is 80.00, that of held-out real data 0.90" in sentence


def test_what_was_not_measured_gives_no_warning(tmp_path: Path) -> None:
    rows = [dataclasses.replace(one, fd=None, deviation=None) for one in healthy()]
    assert said(rows, tmp_path) == []
    assert final_accuracy(tmp_path) is None


def test_the_smoke_run_does_not_boast(text: str) -> None:
    """Its teacher has learnt nothing: the page says so above any number."""
    warning = text.index("The teacher is far from the data")
    assert warning < text.index('<div class="numbers">')


# ---- runs of the first format


def test_a_run_of_the_first_format_is_reported(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(Path(__file__).parent / "data" / "run_of_0.1.0", tmp_path / "copy"))
    answer = hdistill("report", copy)
    assert answer.code == 0, answer.err
    page = Page((copy / "report.html").read_text(encoding="utf-8"))
    assert "Where the discriminator looks" in page.headings
    # All curves are found under their old names.
    assert len(page.named("svg")) == len(CURVES) + 1
