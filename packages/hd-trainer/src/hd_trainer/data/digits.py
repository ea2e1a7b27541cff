"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, 17 levels, in the wheel: no download."""

from __future__ import annotations

import torch
from torch import Tensor

from hd_trainer.data.dataset import Dataset, InMemory
from hd_trainer.engine.draws import shuffled

HELD_OUT = 360
SPLIT_SEED = 2511


def load_digits() -> Dataset:
    """1,437 training and 360 held-out images in [-1, 1]; the split is fixed for good [ours]."""
    import sklearn.datasets  # a second of import time, for this data set alone

    bunch = sklearn.datasets.load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(bunch.target).long()
    order = shuffled(len(images), SPLIT_SEED)

    def take(index: Tensor) -> InMemory:
        return InMemory(x=images[index], conditions={"labels": labels[index]})

    return Dataset(
        name="digits",
        train=take(order[HELD_OUT:]),
        held_out=take(order[:HELD_OUT]),
        classes=tuple("0123456789"),
        null={"labels": 10},
        grey_levels=17,
    )
