"""The digits' split, and a data order that is a function of the step."""

from __future__ import annotations

from typing import Any

import pytest
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hd_trainer import UserError
from hd_trainer.data import batch_at, load_data, load_digits


def test_the_split_is_whole_disjoint_and_fixed(digits_data: Any) -> None:
    assert digits_data.train.shape == (1_437, 1, 8, 8)
    assert digits_data.held_out.shape == (360, 1, 8, 8)
    assert digits_data.shape == (1, 8, 8)
    both = torch.cat([digits_data.train, digits_data.held_out])
    labels = torch.cat([digits_data.train_labels, digits_data.held_out_labels])
    bunch = sklearn.datasets.load_digits()
    # Each image of the source appears once, with its label: no image is in both parts.
    ours = sorted((tuple(image), int(label)) for image, label in zip(both.flatten(1).tolist(), labels, strict=True))
    theirs = sorted(
        (tuple(image), int(label)) for image, label in zip((bunch.data / 8 - 1).tolist(), bunch.target, strict=True)
    )
    assert ours == theirs
    assert torch.equal(load_digits().held_out, digits_data.held_out)


def test_images_and_labels_keep_their_form(digits_data: Any) -> None:
    for images in (digits_data.train, digits_data.held_out):
        assert images.dtype == torch.float32
        assert images.min() == -1
        assert images.max() == 1
    assert len(digits_data.train.unique()) == digits_data.levels == 17
    assert digits_data.classes == tuple("0123456789")
    for labels in (digits_data.train_labels, digits_data.held_out_labels):
        assert labels.dtype == torch.int64
        # Every class is there, and none dominates: the split was drawn, not cut.
        assert torch.bincount(labels, minlength=10).min() > 0.07 * len(labels)


def test_class_names_are_in_label_order(digits_data: Any) -> None:
    means = torch.stack([digits_data.train[digits_data.train_labels == label].mean(0) for label in range(10)])
    # A zero is hollow, a one is not; only in the right order.
    assert means[digits_data.classes.index("0"), 0, 3:5, 3:5].mean() < -0.5
    assert means[digits_data.classes.index("1"), 0, 3:5, 3:5].mean() > 0


def test_data_by_name() -> None:
    assert load_data("digits").name == "digits"
    with pytest.raises(UserError, match=r"unknown data set 'digit'; known: digits"):
        load_data("digit")


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 40), batch=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_is_a_permutation(count: int, batch: int, seed: int) -> None:
    epochs = 3
    steps = -(-epochs * count // batch)
    stream = torch.cat([batch_at(step, batch, count, seed) for step in range(steps)])
    assert len(stream) == steps * batch
    for epoch in stream[: epochs * count].split(count):
        assert sorted(epoch.tolist()) == list(range(count))


def test_a_batch_is_a_function_of_the_step_alone() -> None:
    late = batch_at(57, 32, 100, 4)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    for step in (3, 57, 9):
        batch_at(step, 32, 100, 4)
    assert torch.equal(batch_at(57, 32, 100, 4), late)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(batch_at(57, 32, 100, 5), late)
    assert not torch.equal(batch_at(0, 100, 100, 4), batch_at(1, 100, 100, 4))


def test_a_batch_crosses_epochs() -> None:
    whole = torch.cat([batch_at(0, 10, 10, 0), batch_at(1, 10, 10, 0), batch_at(2, 10, 10, 0)])
    assert torch.equal(batch_at(0, 25, 10, 0), whole[:25])
    assert torch.equal(torch.cat([batch_at(step, 7, 10, 0) for step in range(4)]), whole[:28])
