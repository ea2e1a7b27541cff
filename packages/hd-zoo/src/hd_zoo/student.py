"""From a teacher to the two-time student that starts as its exact copy."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from hd_zoo.registry import blueprint, build
from hd_zoo.wrappers.convert import Converter


def to_student(teacher: nn.Module, r_embedding: str = "added", *, early_blocks: int | None = None) -> nn.Module:
    """A network of (x, t, r) that equals ``teacher`` at r = t, and with "added" at every r, until it is trained.

    Args:
        teacher: a network of this package (from :func:`create_model` or :func:`from_pretrained`), perhaps behind
            a converter, which the student then stands behind as well.
        r_embedding: how r enters. "added" adds an embedding of (t - r) whose last layer is zero [ours]. "decoupled"
            shows t to the early part of the network and r to the late one, without new weights [arXiv 2510.24474];
            that one equals the teacher at r = t alone.
        early_blocks: of a transformer, for "decoupled": how many blocks are shown t. None is the teacher's own setting,
            or five of seven; 0 is none of them.

    Returns:
        A new network on the teacher's device and in its dtype, in the same mode, with every parameter
        trainable; no storage is shared. A teacher that takes r that way already (the student of an earlier
        stage) is copied. Otherwise the added embedding's first layer is drawn from the global generator.

    Raises:
        ValueError: if the network was not built by this package, for an unknown r_embedding, or for early_blocks
            without "decoupled".
    """
    if isinstance(teacher, Converter):
        inner = to_student(teacher.network, r_embedding, early_blocks=early_blocks)
        return type(teacher)(inner, **teacher.arguments).train(teacher.training)
    architecture, arguments = blueprint(teacher)
    wanted: dict[str, Any] = {**arguments, "r_embedding": r_embedding}
    if early_blocks is not None:
        if r_embedding != "decoupled":
            raise ValueError(f'early_blocks is for r_embedding="decoupled"; got {early_blocks} with {r_embedding!r}')
        wanted["early_blocks"] = early_blocks
    if arguments == wanted:
        return copy.deepcopy(teacher).requires_grad_(True)
    weight = next(teacher.parameters())
    # Cast before the weights are loaded: a float64 teacher must not pass through float32.
    student = build(architecture, wanted).to(weight.device, weight.dtype)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    foreign = [name for name in missing if not name.startswith("interval_embed.")]
    if foreign or unexpected:
        raise ValueError(f"the teacher's weights do not fit its student: {foreign + list(unexpected)}")
    return student.train(teacher.training)
