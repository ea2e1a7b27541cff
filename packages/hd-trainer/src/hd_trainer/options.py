"""The flags of the small commands, and tyro's parser with errors of one line. It imports no PyTorch: help is quick."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from hd_trainer.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class SampleOptions:
    """Draw images with the weights of a stage."""

    folder: tyro.conf.Positional[Path]
    """a run's folder (its last stage is taken) or a stage's, e.g. runs/digits or runs/digits/teacher"""
    out: Path = Path("samples.png")
    """the picture to write; a name that ends in .npz: arrays arr_0 (uint8, NHWC) and arr_1 (labels), as ADM's"""
    count: int = 100
    """number of images; of a picture in rows of ten"""
    labels: tuple[int, ...] = ()
    """classes, repeated over the images; none given: all in turn"""
    seed: int = 0
    """of the noise; image i of a seed is the same picture at every count"""
    steps: int | None = None
    """jumps of a student (default 1) or Euler steps of a teacher (default 50)"""
    guidance_scale: float = 1.0
    """classifier-free guidance of a teacher; 1 is none"""
    device: str = "auto"
    """"auto", "cpu", "cuda" ..."""


@dataclass(frozen=True, kw_only=True)
class NewOptions:
    """Write a recipe file for your data: model, sizes, steps and batch by rules that stand beside them."""

    name: tyro.conf.Positional[str]
    """of the recipe, a Python name; `hdistill run NAME.py` then runs it"""
    data: str
    """data, as for `hdistill run`: folder:PATH, npz:FILE ...; see `hdistill list data`"""
    teacher: str | None = None
    """a teacher from elsewhere, as for `hdistill run`; none given: one is trained"""
    out: Path | None = None
    """the file to write; none given: NAME.py here"""
    minutes: float | None = None
    """the whole run, evaluation included; none given: 12 on a CPU, 60 on a GPU"""
    device: str = "auto"
    """the machine that it is for: "auto", "cpu", "cuda" ..."""


@dataclass(frozen=True)
class FolderOptions:
    """A run's folder."""

    folder: tyro.conf.Positional[Path]
    """made by `hdistill run`, e.g. runs/digits"""


@dataclass(frozen=True)
class LayersOptions:
    """Names of a teacher's modules that the discriminator can look at."""

    teacher: tyro.conf.Positional[str]
    """as after --teacher: FOLDER, sit_xl_2:FILE, a folder or hub id of diffusers, or file.py:function"""
    data: str | None = None
    """as after --data, for a teacher that needs conditions such as a prompt; none given: noise, and class 0"""
    every: bool = False
    """all modules, not the outer ones alone"""


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run again; or, with --against, pictures that anyone made."""

    path: tyro.conf.Positional[str]
    """a run's folder; with --against a folder of pictures (PATH?size=32 scales them) or an .npz (arr_0, uint8)"""
    against: str | None = None
    """what the pictures are compared with: as --data of `hdistill run`, or stats:FILE (ADM, EDM2, torch-fidelity)"""
    extractors: tuple[str, ...] = ()
    """as --evaluation.extractors of `hdistill run`; none given: the run's, or by the data"""
    out: Path | None = None
    """file for the numbers of pictures; none given: PATH.evaluation.json"""
    device: str = "auto"
    """"auto", "cpu", "cuda" ...; of pictures alone"""


@dataclass(frozen=True)
class ReportOptions:
    """Write a run's page again, or one page about several runs side by side."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """runs' folders, e.g. runs/digits, or runs/digits runs/gap"""
    out: Path | None = None
    """the page to write; none given: RUN/report.html, of several runs compare.html"""


@dataclass(frozen=True)
class ExportOptions:
    """Write a finished run as a folder to upload: weights, model card, samples, and a script that draws them."""

    folder: tyro.conf.Positional[Path]
    """the run's folder, e.g. runs/digits"""
    out: Path | None = None
    """folder to make; none given: RUN/export"""
    name: str | None = None
    """title of the model card; none given: that of the run's folder"""
    license: str | None = None
    """the hub's name of your licence for the weights, e.g. apache-2.0; none given: the card leaves it open"""


@dataclass(frozen=True, kw_only=True)
class EmojiOptions:
    """Build the emoji set, which `--data emoji` reads: drawings and names from npm, rendered by resvg-py."""

    out: Path | None = None
    """folder to make; none given: in the cache folder, where `--data emoji` looks for it"""
    packages: Path | None = None
    """folder with the packages as `npm pack` writes them; none given: npm downloads them, 28 MB"""


def parse(kind: type[T], arguments: list[str], program: str, default: T | None = None) -> T:
    """tyro's parser; its framed errors become the one line that every error of this command is.

    Raises:
        UserError: for arguments that do not fit.
    """
    flags = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    if twice := next((flag for flag in flags if flags.count(flag) > 1), None):
        raise UserError(f"{twice} is given more than once (try {program} --help)")
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed), _wide(not {"-h", "--help"} & set(arguments)):
            config = (tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed, tyro.conf.AvoidSubcommands)
            parsed: Any = tyro.cli(kind, args=arguments, prog=program, default=default, config=config)
            return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_unframed(framed.getvalue())} (try {program} --help)") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{error} (try {program} --help)") from error


@contextlib.contextmanager
def _wide(needed: bool) -> Iterator[None]:
    """Inside, tyro breaks no line of its frame: a message that is read back must not be broken within a word."""
    before = os.environ.get("COLUMNS")
    if needed:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if needed and before is None:
            del os.environ["COLUMNS"]
        elif needed and before is not None:
            os.environ["COLUMNS"] = before


def _unframed(text: str) -> str:
    """The message inside tyro's box, as one line; of suggested flags their names alone."""
    boxed = "╭" in text  # else stdout is not UTF-8: rules are hyphens, and the title is a section of its own
    parts: list[list[str]] = [[]]
    for line in (line.strip(" │╰╯") for line in text.splitlines() if not line.startswith("╭")):
        if line.strip("─-"):
            parts[-1].append(line)
        else:
            parts.append([])
    sections = [part for part in parts if part][0 if boxed else 1 :]
    message = " ".join(sections[0]).replace("Error parsing settings.", "")
    flags = [line.split()[0] for section in sections[1:] for line in section if line.startswith("--")]
    suggested = any(line.startswith("Perhaps you meant") for section in sections[1:] for line in section)
    return f"{message}; perhaps you meant {' or '.join(flags)}" if suggested and flags else message
