"""The report: one file that stands alone, with everything a reader was promised."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import hd_zoo
from hd_trainer import load_recipe
from hd_trainer.errors import UserError
from hd_trainer.files import read_records
from hd_trainer.report.figures import CURVES
from hd_trainer.report.page import command_line, summarise
from hd_trainer.run import read_settings
from hd_trainer.stages.critic import save_discriminator, seeded_discriminator

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
    return (finished / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def picture(attributes: dict[str, Any]) -> Image.Image:
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
    names = ("teacher samples", "stage 1 samples", "stage 2 samples")
    assert {*names, "nearest training images"} <= images.keys()
    sizes = {images[name].size for name in names}
    assert len(sizes) == 1
    assert len({images[name].tobytes() for name in names}) == 3
    for image in images.values():
        assert len(image.convert("L").getcolors(10_000)) > 5


def test_the_table_has_every_row(page: Page, finished: Path) -> None:
    rows = json.loads((finished / "evaluation.json").read_text())["rows"]
    header, *lines = page.cells
    assert header[4] == "FD-digits"
    assert len(lines) == len(rows) == 6
    for line, row in zip(lines, rows, strict=True):
        assert row["name"] in line[0]
        assert line[1:3] == [str(row["steps"] or ""), str(row["calls"] or "")]
        assert line[4:8] == [
            f"{row['fd']:.2f}",
            f"{row['kid']:.3f}",
            f"{row['precision']:.3f}",
            f"{row['recall']:.3f}",
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
        {"pooling": "attention", "merge": "concatenate", "heads": 4},
        {"pooling": "scorer", "weighed": "logits"},
    ],
)
def test_token_weights_of_every_kind_are_drawn(
    variant: dict[str, Any], finished: Path, tmp_path: Path, hdistill: Callable[..., Any]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    settings = dataclasses.replace(read_settings(copy).distribution.adversary, **variant)
    width = hd_zoo.from_pretrained(copy / "teacher").arguments["width"]
    discriminator = seeded_discriminator(settings, [width] * len(settings.layers), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    save_discriminator(discriminator, settings, copy / "distribution")
    assert hdistill("report", copy).code == 0
    page = Page((copy / "report.html").read_text(encoding="utf-8"))
    for kind in ("real", "generated"):
        drawn = [picture(a) for a in page.named("img") if a["alt"] == f"weights on {kind} images"]
        assert len(drawn) == len(settings.layers)
        # Below the images lie the weights: not all alike once the head is no longer fresh.
        for image in drawn:
            width, height = image.size
            assert len(image.crop((0, height // 2 + 4, width, height)).getcolors(100_000)) > 5


def test_the_page_says_what_its_numbers_are(text: str) -> None:
    words = " ".join(text.split())
    assert "it is not FID" in words
    assert "floor of real against real" in words


def test_the_settings_stand_in_the_page(text: str, finished: Path) -> None:
    assert '"trajectory"' in text or "&#34;trajectory&#34;" in text
    for name in ("endpoint_share", "student_every", "time_scale"):
        assert name in text


def test_a_report_can_be_written_again(finished: Path, tmp_path: Path, hdistill: Callable[..., Any]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "report.html").unlink()
    answer = hdistill("report", copy)
    assert (answer.code, answer.out) == (0, f"Wrote {copy / 'report.html'}\n")
    again = Page((copy / "report.html").read_text(encoding="utf-8"))
    assert again.cells == Page((finished / "report.html").read_text(encoding="utf-8")).cells


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("evaluation.json", "is not evaluated yet; run: hdistill evaluate"),
        ("distribution/config.json", "no config.json in"),
        ("recipe.json", "is not a run's folder"),
    ],
)
def test_an_unfinished_run_is_one_line(
    missing: str, message: str, finished: Path, tmp_path: Path, hdistill: Callable[..., Any]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "report.html").unlink()
    (copy / missing).unlink()
    answer = hdistill("report", copy)
    assert answer.code == 2
    assert message in answer.line
    assert not (copy / "report.html").exists()


def test_the_command_on_the_page_makes_the_run() -> None:
    full, small = load_recipe("digits"), load_recipe("digits", smoke=True)
    assert command_line(full) == "hdistill run digits"
    assert command_line(small) == "hdistill run digits --smoke"
    adversary = dataclasses.replace(full.distribution.adversary, pooling="mean", levels=(0.1, 0.5))
    changed = dataclasses.replace(
        full, seed=3, distribution=dataclasses.replace(full.distribution, adversary=adversary)
    )
    flags = "--seed 3 --distribution.adversary.pooling mean --distribution.adversary.levels 0.1 0.5"
    assert command_line(changed) == f"hdistill run digits {flags}"
    adversary = dataclasses.replace(full.distribution.adversary, pooling="scorer", merge="concatenate", heads=4)
    changed = dataclasses.replace(full, distribution=dataclasses.replace(full.distribution, adversary=adversary))
    flags = [f"--distribution.adversary.{flag}" for flag in ("pooling scorer", "merge concatenate", "heads 4")]
    assert sorted(command_line(changed).split(" --")[1:]) == sorted(flag[2:] for flag in flags)


def test_the_summary_takes_the_most_steps_of_the_teacher_and_the_fewest_of_students() -> None:
    def row(name: str, steps: int) -> dict[str, Any]:
        return {"name": name, "steps": steps, "recall": 0.5 + steps / 100, "images_per_second": 100.0 / steps}

    rows = [row("teacher", 4), row("teacher", 20), row("teacher", 1)]
    rows += [row(name, steps) for name in ("trajectory", "distribution") for steps in (4, 1)]
    found = summarise(rows)
    assert [found[name]["steps"] for name in ("teacher", "trajectory", "distribution")] == [20, 1, 1]
    assert found["speed_ratio"] == pytest.approx(20)
    assert found["recall_ratio"] == pytest.approx(0.51 / 0.7)
    with pytest.raises(UserError, match="no row for distribution"):
        summarise(rows[:5])


def test_a_damaged_evaluation_is_one_line(finished: Path, tmp_path: Path, hdistill: Callable[..., Any]) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    result = hdistill("report", tmp_path / "run")
    assert result.code == 2
    assert "evaluation.json is damaged; run: hdistill evaluate" in result.err
