"""``hub:ID``: images of the Hugging Face hub, or of a folder in its form, through the library datasets."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from hd_trainer import decoding
from hd_trainer.checks import short
from hd_trainer.data.byte_images import HELD_OUT, images_from_bytes
from hd_trainer.data.cache import Pictures, Room, cached_pictures
from hd_trainer.data.dataset import Dataset
from hd_trainer.data.source import a_share, a_size, a_switch, channels, split_options, tell_left_out, text
from hd_trainer.errors import UserError
from hd_trainer.progress import progress

OPTIONS = {
    "split": text,
    "config": text,
    "image": text,
    "label": text,
    "size": a_size,
    "channels": channels,
    "flip": a_switch,
    "held_out": a_share,
}


def load_hub(given: str) -> Dataset:
    """The data set of ``ID?split=train&config=...&image=COLUMN&label=COLUMN&size=32&channels=3&flip=true``.

    Raises:
        UserError: if the library is missing, or the data set is not there or holds no images.
    """
    place, options = split_options("hub", given, OPTIONS)
    if not place:
        raise UserError("hub: which data set? Name it: hub:OWNER/NAME")
    library = _library()
    table = _table(library, place, options)
    columns = table.features
    image = _column(place, columns, options.get("image"), library.Image, "image")
    label = _column(place, columns, options.get("label"), library.ClassLabel, "label")
    if image is None:
        raise UserError(f"hub:{place} has no column of images; it has {', '.join(columns)}")
    if label == image:
        raise UserError(f"hub:{place}: ?label= and ?image= name one column, {image}")
    name = f"hub:{place}"
    labels, classes = (None, ()) if label is None else _labels(name, table, label)
    raw = table.cast_column(image, library.Image(decode=False)).select_columns([image])
    found = _decoded(name, raw, image, options)
    tell_left_out(name, len(raw), ((f"row {row}", why) for row, why in found.unreadable.items()))
    return images_from_bytes(
        name,
        found.pixels,
        labels,
        rows=torch.tensor([row for row in range(len(raw)) if row not in found.unreadable], dtype=torch.long),
        classes=classes,
        flip=options.get("flip", False),
        held_out=options.get("held_out", HELD_OUT),
    )


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError('hub: needs the library datasets; run: pip install "hd-trainer[hub]"') from error


def _table(library: Any, place: str, options: dict[str, Any]) -> Any:
    try:
        return library.load_dataset(place, options.get("config"), split=options.get("split", "train"))
    except Exception as error:  # whatever the library and the network below it raise
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"hub:{place} cannot be loaded: {type(error).__name__}: {reason}") from error


def _column(place: str, columns: Any, asked: str | None, kind: type, what: str) -> str | None:
    """The column that was asked for, else the first of its kind."""
    if asked is not None and asked not in columns:
        raise UserError(f"hub:{place} has no column {short(asked)} for ?{what}=; it has {', '.join(columns)}")
    return asked or next((name for name, column in columns.items() if isinstance(column, kind)), None)


def _decoded(name: str, raw: Any, image: str, options: dict[str, Any]) -> Pictures:
    size, depth = options.get("size"), options.get("channels")

    def fill(room: Room) -> dict[int, str]:
        unreadable: dict[int, str] = {}
        shape = _shape(name, raw, image, size, depth)
        pixels = room(shape)
        for row in progress(range(len(raw)), desc="pictures", unit="picture", leave=False):
            try:
                picture = decoding.decode(_bytes(raw[row][image]), size, shape[2])
            except decoding.UnreadableError as error:
                unreadable[row] = str(error)
                continue
            if picture.shape != shape:
                raise UserError(
                    f"{name} has pictures of different sizes ({shape[1]}x{shape[0]}, row {row} "
                    f"{picture.shape[1]}x{picture.shape[0]}): choose a side with ?size=32"
                )
            pixels[row] = picture
        return unreadable

    return cached_pictures(["hub", name, raw._fingerprint, size, depth], len(raw), fill)


def _shape(name: str, raw: Any, image: str, size: int | None, depth: int | None) -> tuple[int, int, int]:
    """(height, width, channels): as asked for, else those of the first picture that can be read."""
    for row in range(len(raw)):
        try:
            (width, height), grey = decoding.read_head(_bytes(raw[row][image]))
        except decoding.UnreadableError:
            continue
        if size is None and width != height:
            raise UserError(f"{name} has pictures of {width}x{height}, not square: choose a side with ?size=32")
        return (size or height, size or width, depth or (1 if grey else 3))
    raise UserError(f"{name} holds no picture that can be read")


def _bytes(value: Any) -> bytes:
    """The file's bytes of an undecoded image."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return bytes(value["bytes"])
    path = value.get("path") if isinstance(value, dict) else None
    try:
        with open(path or "", "rb") as file:
            return file.read()
    except OSError as error:
        raise decoding.UnreadableError(f"no file {path}") from error


def _labels(name: str, table: Any, column: str) -> tuple[Tensor, tuple[str, ...]]:
    values = table[column][:]
    if not values or not all(isinstance(value, int) and 0 <= value < 100_000 for value in values):
        raise UserError(f"{name}: the column {column} must hold whole numbers from 0; choose another with ?label=")
    if len(set(values)) == 1:
        raise UserError(f"{name}: the column {column} holds one class; choose another with ?label=")
    names = getattr(table.features[column], "names", None)
    classes = tuple(str(one) for one in names or range(max(values) + 1))
    return torch.tensor(values), classes
