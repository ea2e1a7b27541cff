"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, 17 levels, in the wheel: no download."""

from __future__ import annotations

import sklearn.datasets
import torch

from hd_trainer.data.dataset import ImageData

HELD_OUT = 360
SPLIT_SEED = 2511


def load_digits() -> ImageData:
    """1,437 training and 360 held-out images in [-1, 1]; the split is fixed for good [ours]."""
    bunch = sklearn.datasets.load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    return ImageData(
        name="digits",
        train=images[train],
        train_labels=labels[train],
        held_out=images[held_out],
        held_out_labels=labels[held_out],
        classes=tuple("0123456789"),
        levels=17,
    )
