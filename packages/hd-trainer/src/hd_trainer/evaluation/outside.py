"""Others' samples in the same table: a folder of pictures or an .npz, against a data set or published statistics."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hd_trainer.data import Dataset, images_from_bytes, load_data
from hd_trainer.data.folder import LARGE, decode_here, decode_once, find_pictures
from hd_trainer.data.npz import as_pixels, read_array
from hd_trainer.data.source import a_size, existing, split_options, tell_left_out
from hd_trainer.engine.parallel import check_single_process, choose_device
from hd_trainer.errors import UserError
from hd_trainer.evaluation.extractors import extract_parts, load_extractors
from hd_trainer.evaluation.measure import FEWEST_OF_A_HALF, Meter
from hd_trainer.evaluation.pixels import AT_ONCE, as_measured, stored
from hd_trainer.evaluation.reference import MANIFOLD, Reference
from hd_trainer.evaluation.rows import PIXELS, SCORES, Row, format_rows, write_rows
from hd_trainer.evaluation.statistics import read_statistics
from hd_trainer.files import make_folder

STATISTICS = "stats:"


def evaluate_pictures(
    place: str,
    against: str,
    extractors: tuple[str, ...] = (),
    out: Path | None = None,
    device: str = "auto",
) -> list[Row]:
    """Measure pictures that anyone made; print the table and write it beside them.

    Args:
        place: a folder, with ``?size=32`` if its pictures are of other sizes, or an .npz with ``arr_0`` or ``images``,
            uint8, and labels if there are any.
        against: as ``--data``, or ``stats:FILE``.
        extractors: by name; () chooses by the data.
        out: file to write; None: ``PATH.evaluation.json``.

    Raises:
        UserError: for whatever is wrong with them, in one line.
    """
    check_single_process()
    target = choose_device(device)
    path = Path(split_options("evaluate", place, {"size": a_size})[0]).expanduser()
    written = out or path.parent / f"{path.name}.evaluation.json"
    if against.startswith(STATISTICS):
        rows, names, facts = _against_statistics(place, Path(against.removeprefix(STATISTICS)), extractors, target)
    else:
        rows, names, facts = _against_data(place, load_data(against), extractors, target)
    make_folder(written.parent)
    facts = {"samples": place, "against": against, **facts, "torch": torch.__version__, "device": target.type}
    write_rows(written, rows, facts)
    print(format_rows(rows, names))
    print(f"Wrote {written}")
    return rows


def _against_data(
    place: str, data: Dataset, names: tuple[str, ...], device: torch.device
) -> tuple[list[Row], list[str], dict[str, Any]]:
    if not data.holds_images:
        raise UserError(f"pictures can be measured against pictures alone; the data set {data.name!r} holds latents")
    pixels, labels = read_pictures(place, data.shape[0], data.classes)
    shape = (pixels.shape[3], *pixels.shape[1:3])
    if shape != data.shape:
        raise UserError(
            f"{place} has pictures of {_words(shape)}, the data set {data.name!r} of {_words(data.shape)}"
            + ("" if place.endswith(".npz") else f"; scale them, as in {place.partition('?')[0]}?size={data.shape[1]}")
        )
    found = load_extractors(names, data, device)
    meter = Meter(data, found)
    samples = torch.cat([stored(data, _floats(pixels[i : i + AT_ONCE])) for i in range(0, len(pixels), AT_ONCE)])
    floor = meter.held_out(len(samples))
    halves = meter.halves(len(samples)) if floor.samples < len(samples) else None
    cond = {} if labels is None else {"labels": labels}
    row = Row(
        name=_name(place),
        steps=0,
        calls=0,
        images_per_second=None,
        samples=len(samples),
        **meter.measure(samples, cond),
    )
    facts = {
        "extractors": [one.facts() for one in found],
        "reference_samples": len(data.reference),
        "neighbour_samples": min(MANIFOLD, len(data.reference)),
    }
    return [floor, *([halves] if halves else []), row], meter.names, facts


def _against_statistics(
    place: str, path: Path, names: tuple[str, ...], device: torch.device
) -> tuple[list[Row], list[str], dict[str, Any]]:
    """A Fréchet distance alone: statistics have no samples whose neighbours could be asked for."""
    if len(names) != 1:
        raise UserError(
            "statistics belong to one extractor: name it, e.g. --extractors inception:FILE; "
            f"got {' '.join(names) or 'none'}"
        )
    pixels, _ = read_pictures(place, None, ())
    data = images_from_bytes("samples", pixels)
    extractor = load_extractors(names, data, device)[0]
    reference = Reference(extractor, read_statistics(path, extractor.width), None)
    parts = (as_measured(data, _floats(pixels[i : i + AT_ONCE])) for i in range(0, len(pixels), AT_ONCE))
    features, _ = extract_parts(extractor, parts)
    scores: dict[str, Any] = dict.fromkeys((*SCORES, *PIXELS))
    scores["fd"] = reference.distances(features)["fd"]
    row = Row(name=_name(place), steps=0, calls=0, images_per_second=None, samples=len(pixels), **scores)
    return [row], [extractor.name], {"extractors": [extractor.facts()]}


def read_pictures(place: str, channels: int | None, classes: tuple[str, ...]) -> tuple[np.ndarray, Tensor | None]:
    """((N, H, W, C) uint8, labels (N,) int64 or None) of a folder or an .npz.

    Args:
        channels: that a folder's pictures are read with; None: grey if all of them are.
        classes: names of the data's classes: a folder's sub-folders of these names are labels.

    Raises:
        UserError: if there are none, or fewer than 10.
    """
    place, options = split_options("evaluate", place, {"size": a_size})
    labels: Tensor | None = None
    if place.endswith(".npz"):
        if options:
            raise UserError(f"{place}: ?size= is for folders; an .npz is measured as it is")
        path = existing("evaluate", place, "file")
        pixels, labels = _from_npz(path, len(classes))
    else:
        root = existing("evaluate", place, "folder")
        files, numbers, names = find_pictures(root)
        decode = decode_once if sum(file.stat().st_size for file in files) > LARGE else decode_here
        found = decode(root, files, options.get("size"), channels)
        tell_left_out(str(root), len(files), ((files[row].name, why) for row, why in found.unreadable.items()))
        kept = [row for row in range(len(files)) if row not in found.unreadable]
        pixels = found.pixels if len(kept) == len(files) else found.pixels[kept]
        if names and set(names) <= set(classes):
            labels = torch.tensor([classes.index(names[numbers[row]]) for row in kept], dtype=torch.long)
    if len(pixels) < FEWEST_OF_A_HALF:
        raise UserError(f"{place} holds {len(pixels)} picture(s); at least {FEWEST_OF_A_HALF} are needed")
    return pixels, labels


def _from_npz(path: Path, classes: int) -> tuple[np.ndarray, Tensor | None]:
    arrays = {}
    for what, names in (("images", ("images", "arr_0")), ("labels", ("labels", "arr_1"))):
        for name in names:
            if what not in arrays and _holds(path, name):
                arrays[what] = read_array(path, name)
    if "images" not in arrays:
        raise UserError(f"{path} needs an array images or arr_0 of uint8 pictures")
    pixels, labels = as_pixels(path, arrays["images"]), arrays.get("labels")
    if labels is None or not classes:
        return pixels, None
    fits = labels.shape == (len(pixels),) and labels.dtype.kind in "iu"
    if not fits or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(f"{path}: labels must be {len(pixels)} integers from 0 to {classes - 1}")
    return pixels, torch.from_numpy(labels.astype(np.int64))


def _holds(path: Path, name: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{name}.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no .npz archive ({error})") from error


def _floats(pixels: np.ndarray) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.moveaxis(pixels, 3, 1).astype(np.float32)) / 127.5 - 1


def _name(place: str) -> str:
    """Of a row: the last part of the path."""
    return Path(place.partition("?")[0]).name or place


def _words(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]} in {'grey' if shape[0] == 1 else 'colour'}"
