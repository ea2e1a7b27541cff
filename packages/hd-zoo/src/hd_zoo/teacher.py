"""Whether an object is a teacher: what it says about itself, and one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def check_teacher(teacher: Any, cond: dict[str, Tensor] | None = None, *, device: str | torch.device = "cpu") -> None:
    """Raise a ValueError of one line unless ``teacher`` keeps the contract: :class:`Field` and :class:`Described`.

    It must have ``sample_shape``, ``classes``, ``null_label`` and ``takes_r``, and answer noise with a finite
    tensor of its shape, for a time per sample. Call this at the door, before anything is trained on it.

    Args:
        teacher: any callable, ``teacher(x, t, **cond)``.
        cond: conditions for a batch of two (prompts ...); None: labels where it has classes.
        device: where its weights are.

    Raises:
        ValueError: that names what is missing or wrong.
    """
    name = type(teacher).__name__
    if not callable(teacher):
        raise ValueError(f"a teacher must be callable, teacher(x, t, **cond) -> velocity; a {name} is not")
    shape = _stated(teacher, "sample_shape", "the shape of one sample, such as (3, 32, 32)")
    if not isinstance(shape, (tuple, list)) or not shape or not all(_is_whole(size, 1) for size in shape):
        raise ValueError(f"{name}.sample_shape must be a tuple of ints >= 1; got {shape!r}")
    classes = _stated(teacher, "classes", "the number of its classes, 0 without labels")
    if not _is_whole(classes, 0):
        raise ValueError(f"{name}.classes must be an int >= 0; got {classes!r}")
    null = _stated(teacher, "null_label", 'the label for "no class", or None')
    if null is not None and not _is_whole(null, 0):
        raise ValueError(f"{name}.null_label must be an int >= 0 or None; got {null!r}")
    takes_r = _stated(teacher, "takes_r", "False for a network of t alone, True for one that uses r")
    if not isinstance(takes_r, bool):
        raise ValueError(f"{name}.takes_r must be True or False; got {takes_r!r}")
    if cond is None:
        cond = {"labels": torch.zeros(2, dtype=torch.long, device=device)} if classes else {}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=generator).to(device)
    _check_answer(teacher, x, torch.tensor([0.4, 0.8], device=device), cond)


def _check_answer(teacher: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> None:
    name, called = (
        type(teacher).__name__,
        f"x {tuple(x.shape)}, t {tuple(t.shape)}" + "".join(f", {one}" for one in cond),
    )
    try:
        answer = teacher(x, t, **cond)
    except Exception as error:  # whatever a foreign network runs into
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{name} fails when called with {called}: {type(error).__name__}: {cause}") from error
    if not isinstance(answer, Tensor):
        raise ValueError(f"{name} must return a tensor; got {type(answer).__name__} (unwrap it in a field of your own)")
    if answer.shape != x.shape:
        raise ValueError(f"{name} must return a velocity of x's shape {tuple(x.shape)}; got {tuple(answer.shape)}")
    if not bool(answer.isfinite().all()):
        raise ValueError(f"{name} returns NaN or infinity for standard normal x at t = 0.4 and 0.8")


def _stated(teacher: Any, attribute: str, meaning: str) -> Any:
    try:
        return getattr(teacher, attribute)
    except AttributeError as error:
        raise ValueError(
            f"a teacher says what it is: {type(teacher).__name__} has no {attribute} ({meaning})"
        ) from error


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
