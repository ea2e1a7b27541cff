"""Data sets: samples with their conditions, by name or from a function of one's own."""

from __future__ import annotations

import importlib
import re

from hd_trainer.checks import short
from hd_trainer.data.arrays import images_from_arrays
from hd_trainer.data.byte_images import ByteImages, images_from_bytes
from hd_trainer.data.dataset import Batch, Dataset, InMemory, Split, grid_conditions, pictures, read_all, without_labels
from hd_trainer.data.digits import load_digits
from hd_trainer.errors import UserError
from hd_trainer.user_code import call, is_function, load_function

__all__ = [
    "SOURCES",
    "Batch",
    "ByteImages",
    "Dataset",
    "InMemory",
    "Split",
    "grid_conditions",
    "images_from_arrays",
    "images_from_bytes",
    "load_data",
    "load_digits",
    "pictures",
    "read_all",
    "without_labels",
]

#: What can be asked for. The loaders of those that take a place are imported when they are.
SOURCES = {
    "digits": "scikit-learn's digits, 1,797 grey images of 8x8, 10 classes: in the wheel",
    "fashion": "Fashion-MNIST, 70,000 grey images of 28x28, 10 classes: of Debian's package, or fashion:FOLDER",
    "emoji": "emoji of 7 styles in colour, 32x32, 9 classes, a caption each: made by `hdistill emoji`; or emoji:FOLDER",
    "folder:PATH": "a folder of pictures, or of one sub-folder for each class; ?size=32 &channels= &flip= &held_out=",
    "npz:FILE": "arrays `images` or `arr_0` (uint8) and, if there are classes, `labels`; ?flip= &held_out=",
    "hub:ID": "a data set of images of the Hugging Face hub, with the extra [hub]; ?split=train &image= &label= ...",
    "FILE.py:FUNCTION": "what a function of yours returns: a hd_trainer.data.Dataset",
}


def load_data(name: str) -> Dataset:
    """A data set by one of the names of :data:`SOURCES`.

    ``path/to/file.py:function`` is called; the function's name is ``data`` if not given. The option ``labels=false``,
    which all kinds have, leaves the classes out: ``digits?labels=false``.

    Raises:
        UserError: for an unknown name, or whatever is wrong with what it names, in one line.
    """
    name, labels = _labels_option(name)
    dataset = _load(name)
    return dataset if labels else without_labels(dataset)


def _labels_option(name: str) -> tuple[str, bool]:
    """(the name without the option ``labels``, its value)."""
    found = re.search(r"[?&]labels=([^&]*)", name)
    if found is None:
        return name, True
    if found[1] not in ("true", "false"):
        raise UserError(f"{name}: labels must be true or false; got {short(found[1])}")
    before, after = name[: found.start()], name[found.end() :]
    # What follows the first option is the first one now.
    return before + ("?" + after[1:] if found[0].startswith("?") and after else after), found[1] == "true"


def _load(name: str) -> Dataset:
    if is_function(name):
        dataset: Dataset = call(load_function(name, default="data"), name, Dataset)
        return dataset
    # A kind, then a colon and a place, or options at once: fashion?flip=true.
    parts = re.fullmatch(r"(\w+)(?::|(?=\?)|$)(.*)", name, re.DOTALL)
    kind, place = parts.groups() if parts else ("", "")
    if kind == "digits" and not place:
        return load_digits()
    if kind not in _LOADERS:
        raise UserError(f"unknown data set {name!r}; known: {', '.join(SOURCES)} (see hdistill list data)")
    module, function = _LOADERS[kind]
    found: Dataset = getattr(importlib.import_module(module), function)(place)
    return found


_LOADERS = {
    "fashion": ("hd_trainer.data.fashion", "load_fashion"),
    "emoji": ("hd_trainer.data.emoji", "load_emoji"),
    "folder": ("hd_trainer.data.folder", "load_folder"),
    "npz": ("hd_trainer.data.npz", "load_npz"),
    "hub": ("hd_trainer.data.hub", "load_hub"),
}
