"""``hdistill emoji``: the emoji set, rendered here from npm packages of drawings and names with permissive licences."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hd_trainer.data.emoji import FACTS, IMAGES, default_folder
from hd_trainer.decoding import UnreadableError, decode
from hd_trainer.engine.draws import shuffled
from hd_trainer.errors import UserError
from hd_trainer.files import folder_in_progress, make_folder, write_json
from hd_trainer.progress import progress

#: Drawings by style. The sets openmoji and emojione-v1 are left out: what is made of them must be under CC-BY-SA too.
STYLES = {
    "emojione": "1.2.3",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "fxemoji": "1.2.2",
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
}
NAMES_VERSION = "17.0.0"
PERMISSIVE = ("Apache-2.0", "CC-BY-4.0", "MIT")

#: Unicode's groups; "component" (skin tones, hair) has no pictures of its own.
GROUPS = {
    0: "smileys and emotion",
    1: "people and body",
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
    8: "symbols",
    9: "flags",
}
SIZE = 32
#: Share of the concepts that is held out, in every style, and the seed of the choice [ours].
HELD_OUT, SEED = 0.2, 32

Render = Callable[[str], bytes]


@dataclass(frozen=True)
class Concept:
    """What an emoji shows, in whatever style."""

    label: str
    group: int
    """place of its group in GROUPS"""
    code: str
    """code points in hexadecimal, joined by hyphens, without the variation selector"""


@dataclass(frozen=True)
class Glyph:
    """A concept drawn in a style."""

    concept: Concept
    style: str
    svg: str


def build_emoji(out: Path | None = None, packages: Path | None = None, render: Render | None = None) -> str:
    """Build the set; a sentence about what was made.

    Args:
        out: folder to make; None: in the cache folder, where ``emoji`` is looked for.
        packages: folder that holds the packages as npm packs them; None: npm downloads them.
        render: SVG text -> PNG; None: resvg-py.

    Raises:
        UserError: if npm or resvg-py is missing, a package is missing or damaged, or ``out`` holds something else.
    """
    target = out or default_folder()
    if target.exists() and not (target / FACTS).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} holds something else than an emoji set; choose another --out")
    render = render or _resvg()
    with contextlib.ExitStack() as stack:
        if packages is None:
            packages = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            download(packages)
        glyphs, licences = read_packages(packages)
    make_folder(target.parent)
    kept, pixels = draw(glyphs, render)
    with folder_in_progress(target) as temporary:
        np.save(temporary / IMAGES, pixels)
        write_json(temporary / FACTS, facts_of(kept, licences))
    held_out = sum(held_out_flags(kept))
    return f"{len(kept)} pictures, {held_out} of them held out, in {len(licences)} styles: {target}"


def download(folder: Path) -> None:
    """Let npm fetch the packages, as archives.

    Raises:
        UserError: if there is no npm, or it fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm, which downloads the drawings, is not installed: get Node.js, or give --packages FOLDER")
    wanted = [f"@iconify-json/{style}@{version}" for style, version in STYLES.items()]
    for package in progress([*wanted, f"emojibase-data@{NAMES_VERSION}"], desc="packages", leave=False):
        done = subprocess.run(
            [npm, "pack", "--silent", "--pack-destination", str(folder), package],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[0][:150]
            raise UserError(f"npm cannot fetch {package} ({reason}); is there a network?")


def read_packages(folder: Path) -> tuple[list[Glyph], dict[str, str]]:
    """(drawings that have a name, in a fixed order; licence of each style).

    Raises:
        UserError: for a package that is missing or damaged, or whose licence is not permissive.
    """
    names = _member(folder / f"emojibase-data-{NAMES_VERSION}.tgz", "en/data.json")
    concepts = read_concepts(names)
    glyphs: list[Glyph] = []
    licences: dict[str, str] = {}
    for style, version in STYLES.items():
        archive = folder / f"iconify-json-{style}-{version}.tgz"
        licence = _member(archive, "info.json").get("license", {}).get("spdx")
        if licence not in PERMISSIVE:
            raise UserError(f"{archive.name} is under {licence}, none of {', '.join(PERMISSIVE)}")
        licences[style] = licence
        chars = _member(archive, "chars.json", missing={})
        glyphs += join(style, _member(archive, "icons.json"), chars, concepts)
    return glyphs, licences


def read_concepts(names: Any) -> list[Concept]:
    """The emoji of emojibase's list that belong to a group, without their skin tones."""
    places = {group: place for place, group in enumerate(GROUPS)}
    return [
        Concept(label=str(one["label"]), group=places[one["group"]], code=plain_code(one["hexcode"]))
        for one in names
        if one.get("group") in places
    ]


def join(style: str, icons: dict[str, Any], chars: dict[str, str], concepts: list[Concept]) -> Iterator[Glyph]:
    """The drawings of a style that have a concept: by code points where the package has them, else by name."""
    by_code = {plain_code(code): name for code, name in chars.items()}
    for concept in concepts:
        for name in (by_code.get(concept.code), slug(concept.label)):
            icon = icons["icons"].get(name)
            if icon is not None and not icon.get("hidden"):
                yield Glyph(concept, style, as_svg(icon, icons))
                break


def as_svg(icon: dict[str, Any], icons: dict[str, Any]) -> str:
    """A whole drawing of an icon's body, in the middle of a square."""
    left, top, width, height = (
        float(icon.get(key, icons.get(key, default)))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


def draw(glyphs: list[Glyph], render: Render) -> tuple[list[Glyph], np.ndarray]:
    """(drawings whose picture is none of an earlier one's and not empty, their pictures (N, 32, 32, 3) uint8)."""
    kept, pictures, seen = [], [], set()
    for glyph in progress(glyphs, desc="emoji", unit="picture", leave=False):
        try:
            picture = decode(bytes(render(glyph.svg)), None, 3)
        except (UnreadableError, ValueError, RuntimeError) as error:
            raise UserError(f"{glyph.style}: {glyph.concept.label} cannot be rendered ({str(error)[:100]})") from error
        key = hashlib.sha256(picture.tobytes()).digest()
        if key not in seen and picture.min() < picture.max():
            seen.add(key)
            kept.append(glyph)
            pictures.append(picture)
    if not kept:
        raise UserError("no drawing has a name: the packages are not the ones that are expected")
    return kept, np.stack(pictures)


def held_out_flags(glyphs: list[Glyph]) -> list[int]:
    """1 for each picture of a fifth of the concepts, whatever its style: the same concept is never on both sides."""
    codes = sorted({glyph.concept.code for glyph in glyphs})
    chosen = {codes[index] for index in shuffled(len(codes), SEED)[: round(HELD_OUT * len(codes))].tolist()}
    return [int(glyph.concept.code in chosen) for glyph in glyphs]


def facts_of(glyphs: list[Glyph], licences: dict[str, str]) -> dict[str, Any]:
    """What stands beside the pictures: label, share and caption of each, and under which licence the drawings are."""
    return {
        "classes": list(GROUPS.values()),
        "labels": [glyph.concept.group for glyph in glyphs],
        "held_out": held_out_flags(glyphs),
        "captions": [f"{glyph.concept.label}, {glyph.style} style" for glyph in glyphs],
        "packages": {f"@iconify-json/{style}@{STYLES[style]}": licence for style, licence in licences.items()},
    }


def plain_code(code: str) -> str:
    """Code points in small letters without U+FE0F, which only asks for colour."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def slug(label: str) -> str:
    """A label as a name of an icon: "flag: Côte d'Ivoire" is "flag-cote-divoire"."""
    letters = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode().replace("'", "")
    return re.sub(r"[^a-z0-9]+", "-", letters).strip("-")


def _member(archive: Path, name: str, missing: Any = None) -> Any:
    """What a JSON file of a package holds; ``missing`` if the package has no such file."""
    try:
        with tarfile.open(archive) as package:
            try:
                file = package.extractfile(f"package/{name}")
            except KeyError:
                file = None
            if file is None:
                if missing is None:
                    raise UserError(f"{archive} has no {name}")
                return missing
            return json.loads(file.read())
    except FileNotFoundError as error:
        raise UserError(f"{archive} is not there; without --packages npm downloads it") from error
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{archive} is damaged ({str(error)[:100]}); get it again") from error


def _resvg() -> Render:
    """resvg-py's function.

    Raises:
        UserError: if it is not installed.
    """
    try:
        resvg = importlib.import_module("resvg_py")
    except ImportError as error:
        raise UserError('resvg-py, which draws the emoji, is missing: pip install "hd-trainer[emoji]"') from error

    def render(svg: str) -> bytes:
        return bytes(resvg.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))

    return render
