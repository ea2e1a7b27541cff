"""hd-trainer with your own images: a function that returns a data set.

    hdistill run digits --smoke --data examples/own_data.py --out runs/bars

The file's function `data` is called; `--data examples/own_data.py:other` calls another. Since the data has classes, a
small classifier is trained on them, and distances are measured in its features.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from hd_trainer import load_recipe
from hd_trainer.data import Dataset, images_from_arrays
from hd_trainer.pipeline import context_of, train_stage


def data() -> Dataset:
    """600 grey pictures of 8x8 pixels: a bar that lies, a bar that stands, a cross. Yours come from files."""
    generator = np.random.default_rng(0)
    images, labels = np.zeros((600, 8, 8), dtype=np.uint8), generator.integers(3, size=600)
    for image, label, (row, column) in zip(images, labels, generator.integers(1, 7, size=(600, 2)), strict=True):
        if label != 1:
            image[row, :] = 230
        if label != 0:
            image[:, column] = 230
    return images_from_arrays("bars", images, labels, classes=("lies", "stands", "cross"), held_out=0.1)


def main() -> Path:
    """From Python: the first stage alone, in its short form."""
    settings = dataclasses.replace(load_recipe("digits", smoke=True), data=f"{__file__}:data")
    context = context_of(settings)
    print(f"{len(context.data.train)} training images of shape {context.data.shape}, classes {context.data.classes}")
    with tempfile.TemporaryDirectory() as folder:
        train_stage("teacher", settings, context, Path(folder))
        print(*sorted(path.name for path in Path(folder, "teacher").iterdir()))
        return Path(folder)


if __name__ == "__main__":
    main()
