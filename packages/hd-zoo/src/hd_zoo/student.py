"""From a teacher to the two-time student that starts as its exact copy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from hd_zoo.blueprint import blueprint, note
from hd_zoo.networks.interval import AddedInterval, find_modules
from hd_zoo.registry import build
from hd_zoo.wrappers.convert import Converter
from hd_zoo.wrappers.guidance import Guidance


def to_student(teacher: nn.Module, r_embedding: str = "added", *, early_blocks: int | None = None) -> nn.Module:
    """A network of (x, t, r) that equals ``teacher`` at r = t, and with "added" at every r, until it is trained.

    Args:
        teacher: a network of this package (from :func:`create_model` or :func:`from_pretrained`), perhaps behind
            a converter, which the student then stands behind as well. Or one that says where its time embedding is,
            ``time_embedding_at`` (and ``time_embedding_repeated``), as those of ``hd_zoo.adapters`` do: it gets what
            :func:`add_interval` adds there.
        r_embedding: how r enters. "added" adds an embedding of (t - r) whose last layer is zero [ours]. "decoupled"
            shows t to the early part of the network and r to the late one, without new weights [arXiv 2510.24474];
            that one equals the teacher at r = t alone.
        early_blocks: of a transformer, for "decoupled": how many blocks are shown t. None is the teacher's own setting,
            or five of seven; 0 is none of them.

    Returns:
        A new network on the teacher's device and in its dtype, in the same mode, with every parameter
        trainable; no storage is shared. A teacher that takes r that way already (the student of an earlier stage, also
        one of :func:`add_interval`) is copied. Otherwise the added embedding's first layer is drawn from the global
        generator.

    Raises:
        ValueError: if the network was not built by this package, for an unknown r_embedding, or for early_blocks
            without "decoupled".
    """
    if isinstance(teacher, Converter):
        inner = to_student(teacher.network, r_embedding, early_blocks=early_blocks)
        return behind(teacher, inner)
    if isinstance(teacher, AddedInterval) and r_embedding == "added":
        return copy.deepcopy(teacher).requires_grad_(True)
    at: Any = getattr(teacher, "time_embedding_at", None)
    if at is not None:
        if r_embedding != "added":
            raise ValueError(f'r_embedding must be "added" for a {type(teacher).__name__}; got {r_embedding!r}')
        if getattr(teacher, "takes_r", False):
            return copy.deepcopy(teacher).requires_grad_(True)
        return add_interval(teacher, at, repeated=getattr(teacher, "time_embedding_repeated", False))
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


def behind(converter: Converter, network: nn.Module) -> Converter:
    """The network behind a converter as this one; every module inside keeps its own mode."""
    converted = type(converter)(network, **converter.arguments)
    converted.training = converter.training
    return converted


def add_interval(
    network: nn.Module,
    at: str | Sequence[str] = "time_embedding",
    *,
    width: int | None = None,
    time_scale: float = 1.0,
    frequencies: int = 64,
    repeated: bool = False,
) -> nn.Module:
    """A network of (x, t, r) from any network of (x, t), to which it is equal at every r until it is trained.

        student = add_interval(teacher)                          # a network with a module "time_embedding"
        student = add_interval(teacher, "model.time_embedding")  # a network in a wrapper
        student = add_interval(dit, "model.transformer_blocks.*.norm1.emb", repeated=True)  # diffusers' DiT

    An embedding of (t - r) whose last layer is zero is added to what the named module returns [ours]. It is by forward
    hooks that are there for good, so the network's code, layers and weights stay what they were, and the result works
    under torch.compile, torch.func.jvp, DDP and copy.deepcopy. ``r=None`` is r = t: the embedding of 0 is added.

    Args:
        network: a field of t, called as ``network(x, t, **cond)``; where it returns an object, its ``sample`` is
            taken. Behind a converter the student stands behind the same converter, and is shown times by its clock.
        at: the module whose output stands for time, as ``network.named_modules()`` spells it, or several; a ``*`` in a
            name stands for any text. It returns a tensor (B, width): not the sinusoids but what the network's MLP
            makes of them, alone or with other conditions added.
        width: of that tensor. None: ``out_features`` of the last ``nn.Linear`` in the module; a wrong guess is an error
            at the first call.
        time_scale: factor on (t - r) before its sinusoids; it multiplies du/dr. Fits times in [0, 1].
        frequencies: number of sinusoids.
        repeated: True: the module may run several times per call, always for the same times.

    Returns:
        A new network on the network's device, in its dtype and mode, with every parameter trainable and
        ``takes_r = True``; no storage is shared. The new embedding's first layer is drawn from the global generator.
        A student of this function is copied as it is. Around a network of this package it goes through
        :func:`hd_zoo.save_pretrained`; around another one, keep ``student.state_dict()`` and load it into
        ``add_interval(teacher, at)``.

    Raises:
        ValueError: for a name that the network lacks (with the nearest), an unknown width, guidance, or a network
            that takes r already.
    """
    if isinstance(network, Guidance):
        raise ValueError("network: a student is made of the field inside Guidance: add_interval(guidance.field, ...)")
    if isinstance(network, AddedInterval):
        return copy.deepcopy(network).requires_grad_(True)
    names = list(find_modules(network, at))
    if isinstance(network, Converter):
        inner = add_interval(
            network.network,
            [name.removeprefix("network.") for name in names],
            width=width,
            time_scale=time_scale,
            frequencies=frequencies,
            repeated=repeated,
        )
        return behind(network, inner)
    if getattr(network, "takes_r", False):
        raise ValueError(f"network: this {type(network).__name__} takes r already; to_student copies it")
    settings: dict[str, Any] = {
        "width": width,
        "time_scale": float(time_scale),
        "frequencies": frequencies,
        "repeated": repeated,
    }
    student = AddedInterval(copy.deepcopy(network), names, **settings)
    weight = next(student.network.get_submodule(names[0]).parameters(), None)
    if weight is None:
        weight = next(student.network.parameters())
    student.interval_embed.to(weight.device, weight.dtype)
    try:
        architecture, arguments = blueprint(network)
    except ValueError:  # not of this package: it is kept as a state_dict
        pass
    else:
        inside = {"architecture": architecture, "arguments": arguments}
        note(student, "added_interval", {"network": inside, "at": names, **settings})
    student.interval_embed.train(network.training)
    student.training = network.training
    return student.requires_grad_(True)
