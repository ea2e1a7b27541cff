"""The one form in which every data set reaches a stage: splits that give batches of samples with their conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hd_trainer.checks import check_whole, short
from hd_trainer.errors import UserError

#: Fewer samples than this in a split cannot be measured.
FEWEST = 4

#: Numbers that are float at a time while a split is checked: 64 MB.
CHECKED_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples and what they are conditioned on."""

    x: Tensor
    """(B, ...) float32"""
    cond: dict[str, Tensor]
    """conditions by name, the batch first in each; passed to networks as ``**cond``"""

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(x=self.x.to(device), cond={name: value.to(device) for name, value in self.cond.items()})


class Split(Protocol):
    """Samples that can be read by their number."""

    def __len__(self) -> int: ...

    def read(self, index: Tensor) -> Batch:
        """The samples of ``index`` (B,) int64, in that order, on the CPU."""

    def cond(self, index: Tensor) -> dict[str, Tensor]:
        """Their conditions alone."""


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """A split that is two tensors or more."""

    x: Tensor
    """(N, ...) float32"""
    conditions: dict[str, Tensor] = field(default_factory=dict)
    """by name, N first in each"""

    def __post_init__(self) -> None:
        for name, value in self.conditions.items():
            if len(value) != len(self.x):
                raise UserError(f"{len(self.x)} samples have {len(value)} {name}: each needs one")

    def __len__(self) -> int:
        return len(self.x)

    def read(self, index: Tensor) -> Batch:
        """See :class:`Split`."""
        return Batch(x=self.x[index], cond=self.cond(index))

    def cond(self, index: Tensor) -> dict[str, Tensor]:
        """See :class:`Split`."""
        return {name: value[index] for name, value in self.conditions.items()}


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images or latents, split once and for all. What it holds is checked when it is made.

    Raises:
        UserError: one line for what is wrong with it.
    """

    name: str
    """as in ``load_data(name)``"""
    train: Split
    """(C, H, W) samples, images in [-1, 1]: what every network is trained on, and the metrics' reference"""
    held_out: Split
    """as ``train``; seen by no network, the metric's own included"""
    classes: tuple[str, ...] = ()
    """name of each class, where the condition ``labels`` is one; () for none"""
    null: dict[str, Any] = field(default_factory=dict)
    """for each condition what stands for "no condition": a number, or a tensor that broadcasts to one entry"""
    grey_levels: int = 256
    """values of a stored pixel; generated images are rounded to them before they are measured"""
    decode: Callable[[Tensor], Tensor] | None = None
    """latents (B, C, H, W) -> images (B, 3, H', W') in [-1, 1], for pictures; None: samples are shown as they are"""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise UserError(f"the name of a data set must be text; got {short(self.name)}")
        check_whole(low=2, high=65536, grey_levels=self.grey_levels)
        for name, split in (("train", self.train), ("held_out", self.held_out)):
            if len(split) < FEWEST:
                raise UserError(
                    f"data set {self.name!r}: {name} holds {len(split)} sample(s); at least {FEWEST} are needed"
                )
            _check_split(self, name, split)
        held_out = _first(self.held_out).x
        if held_out.shape[1:] != self.shape:
            raise UserError(
                f"data set {self.name!r}: held_out has samples {tuple(held_out.shape[1:])}, train {self.shape}"
            )
        _check_null(self)
        _check_decoder(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, (channels, height, width)."""
        return tuple(_first(self.train).x.shape[1:])

    @property
    def reference(self) -> Split:
        """The training samples that measurements compare with: without the mirrored ones, where there are any."""
        split: Split = getattr(self.train, "unflipped", self.train)
        return split

    @property
    def holds_images(self) -> bool:
        """Whether the samples are images themselves, grey or in colour, rather than latents."""
        return self.decode is None and self.shape[0] in (1, 3)


class Unlabelled:
    """A split without its condition ``labels``; see :func:`without_labels`."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getattr__(self, name: str) -> Any:
        """What some splits have beside the contract."""
        if name not in ("are_all_alike", "captions", "unflipped"):
            raise AttributeError(name)
        found = getattr(self.split, name)
        return Unlabelled(found) if name == "unflipped" else found

    def __len__(self) -> int:
        return len(self.split)

    def read(self, index: Tensor) -> Batch:
        """See :class:`Split`."""
        batch = self.split.read(index)
        return Batch(x=batch.x, cond=_not_labels(batch.cond))

    def cond(self, index: Tensor) -> dict[str, Tensor]:
        """See :class:`Split`."""
        return _not_labels(self.split.cond(index))


def without_labels(data: Dataset) -> Dataset:
    """The same samples without classes, for networks that take none; other conditions stay."""
    return dataclasses.replace(
        data,
        train=Unlabelled(data.train),
        held_out=Unlabelled(data.held_out),
        classes=(),
        null=_not_labels(data.null),
    )


def _not_labels(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "labels"}


def pictures(data: Dataset, samples: Tensor) -> Tensor:
    """Samples as something to look at: decoded, where the data set has a decoder."""
    return samples if data.decode is None else data.decode(samples)


def read_all(split: Split, limit: int | None = None) -> Batch:
    """The whole split in one batch, or its first ``limit`` samples."""
    return split.read(torch.arange(len(split) if limit is None else min(limit, len(split))))


def grid_conditions(data: Dataset, rows: int, columns: int = 10) -> dict[str, Tensor]:
    """Conditions of a picture of ``rows`` rows: a column for each class, at most ``columns`` of them, evenly spaced.

    Without classes: those of the first held-out samples.
    """
    if data.classes:
        number = len(data.classes)
        shown = (
            torch.tensor([i * number // columns for i in range(columns)]) if number > columns else torch.arange(number)
        )
        return {"labels": shown.repeat(rows)}
    return data.held_out.cond(torch.arange(rows * columns) % len(data.held_out))


def _first(split: Split) -> Batch:
    return split.read(torch.zeros(1, dtype=torch.long))


def _check_split(data: Dataset, name: str, split: Split) -> None:
    """Every sample once, in chunks; of images kept as bytes, whose values cannot be wrong, one and all conditions."""
    where = f"data set {data.name!r}: {name}"
    if (are_all_alike := getattr(split, "are_all_alike", None)) is None:
        _check_values(data, where, split, torch.arange(len(split)))
        return
    if are_all_alike():
        raise UserError(f"{where} is one value everywhere: there is nothing to learn")
    batch, index = _first(split), torch.arange(len(split))
    if batch.x.ndim != 4 or 0 in batch.x.shape:
        raise UserError(f"{where} must be of shape (N, C, H, W); got {tuple(batch.x.shape)}")
    _check_conditions(data, where, len(split), split.cond(index))


def _check_values(data: Dataset, where: str, split: Split, indices: Tensor) -> None:
    low, high, shape = float("inf"), float("-inf"), None
    x = _first(split).x
    at_once = max(1, min(4096, CHECKED_AT_ONCE // max(1, x[0].numel()))) if isinstance(x, Tensor) and x.ndim else 1
    for index in indices.split(at_once):
        batch = split.read(index)
        x = batch.x
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise UserError(f"{where} must be float32 tensors; got {kind} (images_from_arrays converts)")
        if x.ndim != 4 or 0 in x.shape:
            raise UserError(f"{where} must be of shape (N, C, H, W); got {tuple(x.shape)}")
        if shape is not None and x.shape[1:] != shape:
            raise UserError(f"{where} has samples of different shapes, {tuple(shape)} and {tuple(x.shape[1:])}")
        shape = x.shape[1:]
        if not bool(torch.isfinite(x).all()):
            raise UserError(f"{where} has values that are not finite")
        low, high = min(low, float(x.min())), max(high, float(x.max()))
        _check_conditions(data, where, len(batch), batch.cond)
    if data.holds_images and not (low >= -1 - 1e-4 and high <= 1 + 1e-4):
        raise UserError(f"{where} must lie in [-1, 1]; got [{low:.4g}, {high:.4g}]")
    if low == high:
        raise UserError(f"{where} is {low:.4g} everywhere: there is nothing to learn")


def _check_conditions(data: Dataset, where: str, size: int, cond: dict[str, Tensor]) -> None:
    if cond.keys() != data.null.keys():
        raise UserError(
            f"{where} has the conditions {sorted(cond)}, null names {sorted(data.null)}: they must be the same"
        )
    for name, value in cond.items():
        if not isinstance(value, Tensor) or len(value) != size:
            got = f"{len(value)} entries" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{where}: the condition {name} must be a tensor with an entry per sample; got {got}")
    if ("labels" in cond) != bool(data.classes):
        raise UserError(f"{where}: the condition labels and the names of classes go together; got {data.classes}")
    if data.classes:
        labels, number = cond["labels"], len(data.classes)
        if labels.dtype != torch.long or labels.ndim != 1:
            raise UserError(f"{where}: labels must be int64 of shape (N,); got {labels.dtype} {tuple(labels.shape)}")
        if not bool(((labels >= 0) & (labels < number)).all()):
            raise UserError(
                f"{where}: labels must lie in 0..{number - 1} for {number} classes; "
                f"got {int(labels.min())}..{int(labels.max())}"
            )


def _check_null(data: Dataset) -> None:
    """What stands for "no condition" fits the condition."""
    if data.classes and data.null["labels"] != len(data.classes):
        raise UserError(
            f"data set {data.name!r}: null of labels must be {len(data.classes)}, the number of classes; "
            f"got {short(data.null['labels'])}"
        )
    for name, value in _first(data.train).cond.items():
        try:
            torch.as_tensor(data.null[name], dtype=value.dtype).expand_as(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"data set {data.name!r}: null of {name} must be a number, or a tensor that broadcasts to "
                f"{tuple(value.shape[1:])}; got {short(data.null[name])}"
            ) from error


def _check_decoder(data: Dataset) -> None:
    if data.decode is None:
        return
    where = f"data set {data.name!r}: decode"
    try:
        images = data.decode(_first(data.train).x)
    except Exception as error:  # a user's code
        raise UserError(f"{where} failed on one sample: {type(error).__name__}: {error}") from error
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) != 1 or images.shape[1] not in (1, 3):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise UserError(f"{where} must give images (B, 1 or 3, H, W); got {got}")
