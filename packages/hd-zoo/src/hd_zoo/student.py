"""From a teacher to the two-time student that starts as its exact copy."""

from __future__ import annotations

import copy

from torch import nn

from hd_zoo.registry import build


def to_student(teacher: nn.Module, interval: str = "added") -> nn.Module:
    """A network of (x, t, r) that equals ``teacher`` at every r until it is trained.

    Args:
        teacher: a network of this package (from :func:`create_model` or :func:`from_pretrained`).
        interval: how r enters; "added" adds an embedding of (t - r) whose last layer is zero [ours].

    Returns:
        A new network on the teacher's device and in its dtype; no storage is shared. A teacher that has the
        interval already (the student of an earlier stage) is copied as it is.

    Raises:
        ValueError: if the network was not built by this package, or for an unknown interval.
    """
    if not hasattr(teacher, "arguments"):
        raise ValueError(f"to_student needs a network of hd_zoo; got {type(teacher).__name__}")
    if teacher.arguments.get("interval") == interval:
        return copy.deepcopy(teacher)
    student = build(teacher.architecture, {**teacher.arguments, "interval": interval})
    weight = next(teacher.parameters())
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    foreign = [name for name in missing if not name.startswith("interval_embed.")]
    if foreign or unexpected:
        raise ValueError(f"the teacher's weights do not fit its student: {foreign + list(unexpected)}")
    return student.to(device=weight.device, dtype=weight.dtype).train(teacher.training)
