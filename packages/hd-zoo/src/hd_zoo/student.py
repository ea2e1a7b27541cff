"""From a teacher to the two-time student that starts as its exact copy."""

from __future__ import annotations

import copy

from torch import nn

from hd_zoo.convert import Converter
from hd_zoo.registry import blueprint, build


def to_student(teacher: nn.Module, r_embedding: str = "added") -> nn.Module:
    """A network of (x, t, r) that equals ``teacher`` at r = t, and with "added" at every r, until it is trained.

    Args:
        teacher: a network of this package (from :func:`create_model` or :func:`from_pretrained`), perhaps behind
            a converter, which the student then stands behind as well.
        r_embedding: how r enters. "added" adds an embedding of (t - r) whose last layer is zero [ours]. "decoupled"
            shows t to the early part of the network and r to the late one, without new weights [arXiv 2510.24474];
            that one equals the teacher at r = t alone.

    Returns:
        A new network on the teacher's device and in its dtype, in the same mode, with every parameter
        trainable; no storage is shared. A teacher that takes r that way already (the student of an earlier
        stage) is copied. Otherwise the added embedding's first layer is drawn from the global generator.

    Raises:
        ValueError: if the network was not built by this package, or for an unknown r_embedding.
    """
    if isinstance(teacher, Converter):
        inner = to_student(teacher.network, r_embedding)
        return type(teacher)(inner, **teacher.arguments).train(teacher.training)
    architecture, arguments = blueprint(teacher)
    if arguments.get("r_embedding") == r_embedding:
        return copy.deepcopy(teacher).requires_grad_(True)
    weight = next(teacher.parameters())
    # Cast before the weights are loaded: a float64 teacher must not pass through float32.
    student = build(architecture, {**arguments, "r_embedding": r_embedding}).to(weight.device, weight.dtype)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    foreign = [name for name in missing if not name.startswith("interval_embed.")]
    if foreign or unexpected:
        raise ValueError(f"the teacher's weights do not fit its student: {foreign + list(unexpected)}")
    return student.train(teacher.training)
