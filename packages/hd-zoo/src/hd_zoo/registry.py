"""Networks by name: ``create_model("dit_nano_2", classes=10)``; ``list_models()`` says what there is."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from typing import Any, get_type_hints

import torch
from torch import nn

from hd_zoo.networks.interval import AddedInterval
from hd_zoo.networks.mlp import MLPField
from hd_zoo.networks.transformer import DiffusionTransformer

#: What a ``config.json`` may name. Nothing else is ever constructed from a file.
ARCHITECTURES: dict[str, type[nn.Module]] = {
    "transformer": DiffusionTransformer,
    "mlp": MLPField,
    "added_interval": AddedInterval,
}

# Sizes of table 1 of arXiv 2212.09748.
_S = {"width": 384, "depth": 12, "num_heads": 6}
_B = {"width": 768, "depth": 12, "num_heads": 12}
_L = {"width": 1024, "depth": 24, "num_heads": 16}
_XL = {"width": 1152, "depth": 28, "num_heads": 16}

# What the networks of a family have in common. All are for ImageNet's 1,000 classes, on latents of 256 x 256 pictures.
_IMAGE_8 = {"image_size": 8, "channels": 1, "activation": "silu"}
_IMAGE_28 = {"image_size": 28, "channels": 1, "activation": "silu"}
_LATENT_8 = {"image_size": 32, "channels": 4, "classes": 1000}
_LATENT_16 = {"image_size": 16, "channels": 32, "classes": 1000, "activation": "swiglu", "norm": "rms", "rotary": True}
_SIT = {**_LATENT_8, "learned_variance": True, "reversed_time": True}
_DIT = {**_LATENT_8, "learned_variance": True, "time_scale": 1000.0}
_LIGHTNINGDIT = {**_LATENT_16, "reversed_time": True}
_REPA = _LATENT_8
_MEANFLOW = {**_LATENT_8, "r_embedding": "added"}
_DMF = {**_LATENT_8, "r_embedding": "decoupled"}


def _transformer(*settings: dict[str, Any], patch: int) -> tuple[str, dict[str, Any]]:
    return "transformer", {**{name: value for one in settings for name, value in one.items()}, "patch": patch}


#: Every name that :func:`create_model` knows. Where published weights of one come from is in :mod:`hd_zoo.sources`.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp_2d": ("mlp", {"features": 2, "width": 128, "depth": 3}),
    "dit_nano_2": _transformer(_IMAGE_8, {"width": 64, "depth": 4, "num_heads": 4}, patch=2),
    "dit_micro_4": _transformer(_IMAGE_28, {"width": 128, "depth": 4, "num_heads": 4}, patch=4),
    "dit_mini_4": _transformer(_IMAGE_28, {"width": 192, "depth": 6, "num_heads": 6}, patch=4),
    "sit_s_2": _transformer(_SIT, _S, patch=2),
    "sit_s_4": _transformer(_SIT, _S, patch=4),
    "sit_s_8": _transformer(_SIT, _S, patch=8),
    "sit_b_2": _transformer(_SIT, _B, patch=2),
    "sit_b_4": _transformer(_SIT, _B, patch=4),
    "sit_b_8": _transformer(_SIT, _B, patch=8),
    "sit_l_2": _transformer(_SIT, _L, patch=2),
    "sit_l_4": _transformer(_SIT, _L, patch=4),
    "sit_l_8": _transformer(_SIT, _L, patch=8),
    "sit_xl_2": _transformer(_SIT, _XL, patch=2),
    "sit_xl_4": _transformer(_SIT, _XL, patch=4),
    "sit_xl_8": _transformer(_SIT, _XL, patch=8),
    "dit_s_2": _transformer(_DIT, _S, patch=2),
    "dit_s_4": _transformer(_DIT, _S, patch=4),
    "dit_s_8": _transformer(_DIT, _S, patch=8),
    "dit_b_2": _transformer(_DIT, _B, patch=2),
    "dit_b_4": _transformer(_DIT, _B, patch=4),
    "dit_b_8": _transformer(_DIT, _B, patch=8),
    "dit_l_2": _transformer(_DIT, _L, patch=2),
    "dit_l_4": _transformer(_DIT, _L, patch=4),
    "dit_l_8": _transformer(_DIT, _L, patch=8),
    "dit_xl_2": _transformer(_DIT, _XL, patch=2),
    "dit_xl_4": _transformer(_DIT, _XL, patch=4),
    "dit_xl_8": _transformer(_DIT, _XL, patch=8),
    "lightningdit_b_1": _transformer(_LIGHTNINGDIT, _B, patch=1),
    "lightningdit_b_2": _transformer(_LIGHTNINGDIT, _B, patch=2),
    "lightningdit_l_1": _transformer(_LIGHTNINGDIT, _L, patch=1),
    "lightningdit_l_2": _transformer(_LIGHTNINGDIT, _L, patch=2),
    "lightningdit_xl_1": _transformer(_LIGHTNINGDIT, _XL, patch=1),
    "lightningdit_xl_2": _transformer(_LIGHTNINGDIT, _XL, patch=2),
    "repa_xl_2": _transformer(_REPA, _XL, patch=2),
    "meanflow_b_2": _transformer(_MEANFLOW, _B, patch=2),
    "meanflow_b_4": _transformer(_MEANFLOW, _B, patch=4),
    "meanflow_l_2": _transformer(_MEANFLOW, _L, patch=2),
    "meanflow_xl_2": _transformer(_MEANFLOW, _XL, patch=2),
    "dmf_xl_2": _transformer(_DMF, _XL, {"early_blocks": 20}, patch=2),
}


#: Those of this package alone; all others are published networks.
_OURS = ("mlp_2d", "dit_nano_2", "dit_micro_4", "dit_mini_4")


def list_models() -> list[str]:
    """The names that :func:`create_model` knows, sorted."""
    return sorted(_MODELS)


def published_models() -> list[str]:
    """Those of them that others have published, whose weights :func:`hd_zoo.load_published` reads; sorted."""
    return [name for name in list_models() if name not in _OURS]


def create_model(name: str, *, device: str | torch.device | None = None, **overrides: Any) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: one of :func:`list_models`. ``sit_xl_2`` and its kind are the published networks; ``dit_*`` predict
            noise of a diffusion, not velocity: :class:`hd_zoo.DiffusedNoise` makes a field of them. ``meanflow_*`` and
            ``dmf_*`` are students: they take r.
        device: where the weights are made; "meta" makes none, for counting.
        overrides: any argument of the architecture (``classes=10``, ``r_embedding="added"``, ``depth=6`` ...).

    Raises:
        ValueError: for an unknown name or argument (with the nearest known one), or impossible values.
    """
    if name not in _MODELS:
        known = list_models()
        raise ValueError(f"unknown model {name!r}{_nearest(name, known)}; known: {', '.join(known)}")
    architecture, defaults = _MODELS[name]
    return build(architecture, {**defaults, **overrides}, device=device)


def build(architecture: str, arguments: dict[str, Any], *, device: str | torch.device | None = None) -> nn.Module:
    """Construct ``ARCHITECTURES[architecture](**arguments)`` and note both on it, for :func:`blueprint`.

    A network among the arguments is itself given as ``{"architecture": ..., "arguments": ...}``.

    Raises:
        ValueError: for an unknown architecture or argument, or impossible values.
    """
    if architecture == "diffusers":  # the field notes both itself
        from hd_zoo.adapters.rebuild import rebuild

        return rebuild(arguments, device)
    if architecture not in ARCHITECTURES:
        names = ", ".join(sorted([*ARCHITECTURES, "diffusers"]))
        raise ValueError(f"unknown architecture {architecture!r}; known: {names}")
    cls = ARCHITECTURES[architecture]
    known = list(inspect.signature(cls).parameters)
    kinds = get_type_hints(cls.__init__)
    values = dict(arguments)
    for argument, value in arguments.items():
        if argument not in known:
            raise ValueError(
                f"unknown argument {argument!r} for {architecture!r}{_nearest(argument, known)}; "
                f"known: {', '.join(known)}"
            )
        # They come from files as well, and must go back into JSON: a Python int, not NumPy's, and no bool.
        kind = kinds[argument]
        if kind is nn.Module:
            values[argument] = _build_inside(argument, value, device)
        elif (isinstance(value, bool) and kind is not bool) or not isinstance(
            value, (int, float) if kind is float else kind
        ):
            name = getattr(kind, "__name__", kind)
            raise ValueError(f"argument {argument!r} of {architecture!r} must be {name}; got {value!r}")
    try:
        with torch.device(device) if device else contextlib.nullcontext():
            model = cls(**values)
    except (TypeError, RuntimeError) as error:  # an argument is missing; sizes beyond all memory
        raise ValueError(f"cannot build {architecture!r}: {error}") from error
    note(model, architecture, arguments)
    return model


def _build_inside(argument: str, value: Any, device: str | torch.device | None) -> nn.Module:
    """A network that is an argument of another one. It has none inside itself, so that files cannot nest for ever."""
    parts = value if isinstance(value, dict) else {}
    architecture, arguments = parts.get("architecture"), parts.get("arguments")
    typed = isinstance(architecture, str) and isinstance(arguments, dict)
    if parts.keys() != {"architecture", "arguments"} or not typed or architecture == "added_interval":
        raise ValueError(f"argument {argument!r} must be an architecture and its arguments; got {str(value)[:60]}")
    return build(parts["architecture"], parts["arguments"], device=device)


def most_blocks(arguments: dict[str, Any]) -> int:
    """The largest number of blocks that a configuration asks for anywhere: to be checked before it is built."""
    counts = [1]
    for name, value in arguments.items():
        inner = value if isinstance(value, list) and "layers" in name else [value]
        for one in inner:
            if isinstance(one, dict):
                counts.append(most_blocks(one))
            elif isinstance(one, int) and (name == "depth" or "layers" in name):
                counts.append(one)
    return max(counts)


def computed_buffers(model: nn.Module) -> list[str]:
    """Names of buffers that are in no file; a model made on the "meta" device has none of their values."""
    kept = model.state_dict().keys()
    return [name for name, _ in model.named_buffers() if name not in kept]


def note(model: nn.Module, architecture: str, arguments: dict[str, Any]) -> None:
    """Note on a network what it takes to :func:`build` it again."""
    model.architecture, model.arguments = architecture, dict(arguments)  # type: ignore[assignment]


def blueprint(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """(architecture, arguments) that :func:`build` noted on a network: all it takes to build it again.

    Raises:
        ValueError: for a network that was not built by this package.
    """
    architecture, arguments = getattr(model, "architecture", None), getattr(model, "arguments", None)
    if not isinstance(architecture, str) or not isinstance(arguments, dict):
        source = "create_model, to_student or from_pretrained"
        raise ValueError(f"a network from {source} is needed; got {type(model).__name__}")
    return architecture, arguments


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
