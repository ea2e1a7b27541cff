"""``emoji``: pictures of 32x32 in colour with a class and a caption, built once by ``hdistill emoji`` and read here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hd_trainer.data.byte_images import SPLIT_SEED, from_rows
from hd_trainer.data.dataset import Dataset
from hd_trainer.data.source import a_switch, cache_folder, existing, split_options
from hd_trainer.engine.draws import shuffled
from hd_trainer.errors import UserError
from hd_trainer.files import read_json

IMAGES, FACTS = "images.npy", "emoji.json"
HOW_TO_BUILD = "build the set with: hdistill emoji"


def default_folder() -> Path:
    """Where the set is built, and looked for."""
    return cache_folder() / "emoji-32"


def load_emoji(text: str) -> Dataset:
    """The set in ``FOLDER?flip=true``; no folder: where ``hdistill emoji`` has put it.

    The classes are Unicode's groups. Held out are all pictures of a fifth of the concepts, in every style: the same
    concept drawn in another style is no independent picture. Captions are in ``train.captions``.

    Raises:
        UserError: if it is not built, or damaged.
    """
    place, options = split_options("emoji", text, {"flip": a_switch})
    folder = existing("emoji", place, "folder") if place else default_folder()
    if not (folder / FACTS).is_file():
        raise UserError(f"{folder} holds no emoji set; {HOW_TO_BUILD}{f' --out {folder}' if place else ''}")
    facts = read_json(folder / FACTS)
    try:
        pixels = np.load(folder / IMAGES, mmap_mode="r", allow_pickle=False)
        labels, held_out = (torch.tensor([int(one) for one in facts[name]]) for name in ("labels", "held_out"))
        captions, classes = (tuple(str(one) for one in facts[name]) for name in ("captions", "classes"))
        number = len(captions)
        fits = pixels.dtype == np.uint8 and pixels.ndim == 4 and len(pixels) == len(labels) == len(held_out) == number
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        fits = False
    if not fits:
        raise UserError(f"the emoji set in {folder} is damaged; {HOW_TO_BUILD} --out {folder}")
    # They lie sorted by style; whoever looks at the first few must see all of them.
    order = shuffled(number, SPLIT_SEED)
    return from_rows(
        "emoji",
        pixels,
        order[held_out[order] == 0],
        order[held_out[order] != 0],
        labels,
        classes=classes,
        flip=options.get("flip", False),
        captions=captions,
    )
