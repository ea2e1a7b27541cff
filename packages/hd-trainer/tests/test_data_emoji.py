"""``hdistill emoji`` on small packages made here, and ``--data emoji``. What is drawn is a stand-in's colour."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trainer_helpers import contents, hdistill

from hd_trainer import UserError
from hd_trainer.data import ByteImages, load_data, read_all
from hd_trainer.data.emoji_build import (
    GROUPS,
    STYLES,
    as_svg,
    build_emoji,
    join,
    read_concepts,
    read_packages,
    slug,
)


def names(number: int = 40) -> list[dict[str, Any]]:
    """Entries as emojibase has them, in turn of every group; the first with a skin tone, and two without a picture."""
    groups = list(GROUPS)
    found: list[dict[str, Any]] = [
        {"label": f"thing {index}", "hexcode": f"1F6{index:02X}-FE0F", "group": groups[index % len(groups)]}
        for index in range(number)
    ]
    found[0]["skins"] = [{"label": "thing 0: light skin tone", "hexcode": "1F600-1F3FB", "group": 1}]
    return [*found, {"label": "light skin tone", "hexcode": "1F3FB", "group": 2}, {"label": "A", "hexcode": "1F1E6"}]


def icons(style: str, number: int = 40) -> dict[str, Any]:
    """As iconify has them: a body for every name; the last drawing is the same as the first one."""
    bodies = {f"thing-{index}": {"body": f"<g id='{style}{index % (number - 1)}'/>"} for index in range(number)}
    bodies["thing-0-light-skin-tone"] = {"body": "<g id='skin'/>"}
    return {"prefix": style, "width": 36, "height": 24, "icons": bodies}


def pack(path: Path, members: dict[str, Any]) -> None:
    """A package as npm packs it."""
    with tarfile.open(path, "w:gz") as archive:
        for name, value in members.items():
            content = json.dumps(value).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """All packages that the set is made of, small."""
    folder = tmp_path / "packages"
    folder.mkdir()
    pack(folder / "emojibase-data-17.0.0.tgz", {"en/data.json": names()})
    for style, version in STYLES.items():
        members = {"icons.json": icons(style), "info.json": {"license": {"spdx": "MIT"}}}
        pack(folder / f"iconify-json-{style}-{version}.tgz", members)
    return folder


def stand_in(svg: str) -> bytes:
    """A PNG of 32 x 32 that is a function of the drawing: transparent but for a square of a colour of its own."""
    picture = Image.new("RGBA", (32, 32))
    picture.paste((*hashlib.sha256(svg.encode()).digest()[:3], 255), (8, 8, 24, 24))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def test_the_set_is_built_and_read(packages: Path, tmp_path: Path) -> None:
    told = build_emoji(tmp_path / "set", packages, stand_in)
    # 40 concepts in 7 styles; of each style the last drawing is a copy.
    assert told == f"273 pictures, 56 of them held out, in 7 styles: {tmp_path / 'set'}"
    data = load_data(f"emoji:{tmp_path / 'set'}")
    assert (len(data.train), len(data.held_out), data.shape) == (217, 56, (3, 32, 32))
    assert data.classes == tuple(GROUPS.values())
    assert isinstance(data.train, ByteImages)
    assert isinstance(data.held_out, ByteImages)
    assert isinstance(data.train.pixels, np.memmap)
    # Every picture stands beside its own label and caption, on white.
    for split in (data.train, data.held_out):
        batch = read_all(split)
        for x, label, caption in zip(batch.x, batch.cond["labels"].tolist(), split.captions, strict=True):
            thing, style = caption.removesuffix(" style").split(", ")
            index = int(thing.removeprefix("thing "))
            assert label == index % len(GROUPS)
            svg = as_svg(icons(style)["icons"][f"thing-{index}"], icons(style))
            assert ((x[:, 16, 16] + 1) * 127.5).round().tolist() == list(hashlib.sha256(svg.encode()).digest()[:3])
            assert x[:, 0, 0].tolist() == [1, 1, 1]
    assert len(load_data(f"emoji:{tmp_path / 'set'}?flip=true").train) == 434
    facts = json.loads((tmp_path / "set" / "emoji.json").read_text())
    assert facts["packages"]["@iconify-json/noto@1.2.9"] == "MIT"


def test_no_concept_is_on_both_sides_and_the_first_samples_are_of_several_styles(
    packages: Path, tmp_path: Path
) -> None:
    build_emoji(tmp_path / "set", packages, stand_in)
    data = load_data(f"emoji:{tmp_path / 'set'}")
    assert isinstance(data.train, ByteImages)
    assert isinstance(data.held_out, ByteImages)
    ours, others = ({caption.split(",")[0] for caption in split.captions} for split in (data.train, data.held_out))
    assert (len(ours), len(others), ours & others) == (31, 8, set())
    assert len({caption.split(", ")[1] for caption in data.train.captions[:20]}) >= 4


def test_building_twice_gives_the_same_bytes(packages: Path, tmp_path: Path) -> None:
    build_emoji(tmp_path / "set", packages, stand_in)
    first = contents(tmp_path / "set")
    build_emoji(tmp_path / "set", packages, stand_in)
    assert contents(tmp_path / "set") == first


def test_the_command_builds_where_the_name_alone_looks(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Resvg:
        @staticmethod
        def svg_to_bytes(*, svg_string: str, width: int, height: int) -> list[int]:
            assert (width, height) == (32, 32)
            return list(stand_in(svg_string))

    monkeypatch.setitem(sys.modules, "resvg_py", Resvg)
    monkeypatch.setenv("HDISTILL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"holds no emoji set; build the set with: hdistill emoji$"):
        load_data("emoji")
    answer = hdistill("emoji", "--packages", packages)
    assert answer.code == 0, answer.err
    assert answer.out == f"Wrote 273 pictures, 56 of them held out, in 7 styles: {tmp_path / 'cache' / 'emoji-32'}\n"
    assert len(load_data("emoji").train) == 217


def test_drawings_are_joined_by_code_points_then_by_name() -> None:
    concepts = read_concepts(names(3))
    assert [one.code for one in concepts] == ["1f600", "1f601", "1f602"]
    bodies = {name: {"body": name} for name in ("other", "thing-0", "thing-2")}
    found = join("mine", {"icons": bodies | {"hidden": {"body": "", "hidden": True}}}, {"1f600": "other"}, concepts)
    assert [(glyph.concept.label, glyph.svg[-12:]) for glyph in found] == [
        ("thing 0", ">other</svg>"),
        ("thing 2", "hing-2</svg>"),
    ]
    hidden = {"icons": {"thing-0": {"body": "", "hidden": True}}}
    assert list(join("mine", hidden, {}, concepts)) == []


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("grinning face", "grinning-face"),
        ("flag: Côte d'Ivoire", "flag-cote-divoire"),
        ("woman’s hat", "womans-hat"),
        ("keycap: 10", "keycap-10"),
        ("Japanese “here” button", "japanese-here-button"),
    ],
)
def test_a_label_as_the_name_of_an_icon(label: str, name: str) -> None:
    assert slug(label) == name


def test_an_oblong_drawing_stands_in_the_middle_of_a_square() -> None:
    assert 'viewBox="0 -6 36 36"' in as_svg({"body": ""}, {"width": 36, "height": 24})
    assert 'viewBox="-8 0 36 36"' in as_svg({"body": "", "width": 20, "height": 36}, {"width": 1, "height": 1})
    assert 'viewBox="5 7 16 16"' in as_svg({"body": "", "left": 5, "top": 7}, {})


# ---- what is refused; nothing is left behind


def test_a_licence_that_is_passed_on_is_refused(packages: Path) -> None:
    path = packages / "iconify-json-noto-1.2.9.tgz"
    pack(path, {"icons.json": icons("noto"), "info.json": {"license": {"spdx": "CC-BY-SA-4.0"}}})
    with pytest.raises(UserError, match=r"is under CC-BY-SA-4\.0, none of Apache-2\.0, CC-BY-4\.0, MIT"):
        read_packages(packages)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is not there; without --packages npm downloads it"), (b"no archive", "is damaged")]
)
def test_packages_that_are_missing_or_damaged(
    content: bytes | None, message: str, packages: Path, tmp_path: Path
) -> None:
    path = packages / "iconify-json-twemoji-1.2.5.tgz"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        build_emoji(tmp_path / "set", packages, stand_in)
    assert message in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_another_folder_is_not_replaced(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="holds something else than an emoji set; choose another --out"):
        build_emoji(tmp_path / "mine", packages, stand_in)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_a_drawing_that_cannot_be_rendered_leaves_nothing(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="emojione: thing 0 cannot be rendered"):
        build_emoji(tmp_path / "set", packages, lambda svg: b"no picture")
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


def test_missing_tools_are_named(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    answer = hdistill("emoji", "--packages", packages, "--out", tmp_path / "set")
    assert answer.code == 2
    assert 'resvg-py, which draws the emoji, is missing: pip install "hd-trainer[emoji]"' in answer.line
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="npm, which downloads the drawings, is not installed"):
        build_emoji(tmp_path / "set", None, stand_in)


@pytest.mark.parametrize("name", ["images.npy", "emoji.json"])
def test_a_damaged_set_says_how_to_build_it_again(name: str, packages: Path, tmp_path: Path) -> None:
    build_emoji(tmp_path / "set", packages, stand_in)
    (tmp_path / "set" / name).write_bytes(b"{}")
    with pytest.raises(UserError, match="is damaged; build the set with: hdistill emoji --out"):
        load_data(f"emoji:{tmp_path / 'set'}")


def test_resvg_draws_what_the_svg_says() -> None:
    resvg = pytest.importorskip("resvg_py")
    from hd_trainer.decoding import decode

    svg = as_svg({"body": '<rect width="8" height="16" fill="#f00"/>'}, {})
    found = torch.from_numpy(decode(bytes(resvg.svg_to_bytes(svg_string=svg, width=32, height=32)), None, 3).copy())
    assert found[16, 8].tolist() == [255, 0, 0]
    assert found[16, 24].tolist() == [255, 255, 255]
