"""From a teacher to the student that starts as its copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import hd_zoo
from hd_meanflow import total_derivative
from hd_trainer.context import Context
from hd_trainer.engine.draws import picture_noise, seeded
from hd_trainer.errors import UserError
from hd_trainer.networks.fields import first_line, is_of_zoo, is_student

#: Usual names of the module that makes an embedding of the time; the first that a network has is taken [ours].
TIME_EMBEDDINGS = (
    *("time_embedding", "time_embed", "time_mlp", "time_embedder", "timestep_embedder", "timestep_embedding"),
    *("t_embedder", "t_embedding", "t_embed", "t_mlp", "time_emb", "temb", "map_noise", "noise_embedding"),
)


def make_student(network: nn.Module, seed: int, interval_at: Sequence[str] = ()) -> nn.Module:
    """A trainable student that starts as ``network``'s copy; the new embedding's first layer is a function of the seed.

    The global generator is left alone: a run that is stopped before its first checkpoint starts again as it did. The
    student is in the network's own mode: what comes from elsewhere is trained without its dropout.

    Args:
        interval_at: modules of a network from elsewhere whose output stands for time; none given:
            :func:`guess_interval_at`.

    Raises:
        UserError: if the network has no such module.
    """
    with seeded(seed):
        if is_student(network) or (not interval_at and knows_its_student(network)):
            return hd_zoo.to_student(network).requires_grad_(True)
        names = interval_at or [guess_interval_at(network)]
        try:
            return hd_zoo.add_interval(network, [hd_zoo.layer_name(network, name) for name in names])
        except ValueError as error:
            raise UserError(f"trajectory.interval_at: {error}") from error


def knows_its_student(network: nn.Module) -> bool:
    """Whether hd_zoo.to_student knows where r enters: networks of hd_zoo and of diffusers, also behind a converter."""
    return is_of_zoo(network) or hasattr(hd_zoo.network_inside(network), "time_embedding_at")


def guess_interval_at(network: nn.Module) -> str:
    """The module of a network from elsewhere to whose output the embedding of (t - r) is added, by its name.

    The first of :data:`TIME_EMBEDDINGS` that the network has and that holds a linear layer; the outermost of several.

    Raises:
        UserError: if there is none, or several that lie equally deep.
    """
    inside = hd_zoo.network_inside(network)
    linear = {name for name, one in inside.named_modules() if any(isinstance(m, nn.Linear) for m in one.modules())}
    for usual in TIME_EMBEDDINGS:
        found = sorted((n for n in linear if n.rpartition(".")[2] == usual), key=lambda name: (name.count("."), name))
        alike = [name for name in found if name.count(".") == found[0].count(".")]
        if len(alike) > 1:
            raise UserError(
                f"several modules are called {usual} ({', '.join(alike[:4])}): name those at which r enters with "
                "--trajectory.interval-at"
            )
        if found:
            return found[0]
    known = ", ".join(name for name, _ in inside.named_children()) or "none"
    raise UserError(
        f"a student needs to be told the time r: name the module of this {type(inside).__name__} that returns the "
        f"time's embedding (B, width) with --trajectory.interval-at; its modules are {known[:300]}"
    )


def check_student(teacher: nn.Module, context: Context, interval_at: Sequence[str], derivative: Any) -> None:
    """A student of this teacher can be made, starts as its equal, and can be differentiated along the trajectory.

    Args:
        derivative: of the MeanFlow loss, "jvp" or "difference".

    Raises:
        UserError: if not.
    """
    student = make_student(teacher, context.seed, interval_at)
    if not interval_at and not knows_its_student(teacher):
        print(f"student: r enters at the teacher's module {guess_interval_at(teacher)} (--trajectory.interval-at)")
    batch = context.data.train.read(torch.zeros(1, dtype=torch.long)).to(context.device)
    cond: dict[str, Any] = batch.cond
    x = picture_noise(context.data.shape, 0, 1, context.device)
    t, r = x.new_full((1,), 0.8), x.new_full((1,), 0.3)
    try:
        with torch.no_grad():
            velocity = teacher(x, t, **cond)
            start = student(x, t, r, **cond)
        total_derivative(student, x, t, r, velocity, method=derivative, **cond)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no student can be made of this teacher (see --trajectory.interval-at and "
            f"--trajectory.meanflow.derivative): {first_line(error)}"
        ) from error
    scale = float(velocity.abs().max())
    gap = float((start - velocity).abs().max())
    if gap > 1e-3 * max(scale, 1e-3):
        raise UserError(
            f"two calls of this teacher for the same x and t differ by {gap:.2g} of {scale:.2g}: it must be a "
            "function of its arguments alone, without dropout or noise of its own"
        )
