"""Official checkpoints of SiT, DiT, LightningDiT and REPA, read into the networks of this package.

    teacher = load_published("SiT-XL-2-256x256.pt", "sit_xl_2")

Nothing is unpickled but tensors (``weights_only=True``). The families share their names of weights: one table serves.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from hd_zoo.convert import DiffusedNoise
from hd_zoo.networks.embedding import grid_embedding
from hd_zoo.networks.transformer import DiffusionTransformer
from hd_zoo.registry import create_model

#: Where training loops keep the weights in a checkpoint, the averaged ones first.
AVERAGED, CURRENT = ("ema", "model_ema", "ema_state_dict"), ("model", "state_dict", "net")

#: (their name, ours) for what has one name; then for what stands in every block.
_NAMES = (
    (r"x_embedder\.proj\.", "patch_embed."),
    (r"t_embedder\.mlp\.", "time_embed.mlp."),
    (r"y_embedder\.embedding_table\.", "label_embed."),
    (r"final_layer\.linear\.", "head.linear."),
    (r"final_layer\.norm_final\.", "head.norm."),
    (r"final_layer\.adaLN_modulation\.", "head.modulation."),
    (r"(blocks\.\d+\.)adaLN_modulation\.", r"\1modulation."),
    (r"(blocks\.\d+\.)mlp\.fc1\.", r"\1mlp.0."),
    (r"(blocks\.\d+\.)mlp\.fc2\.", r"\1mlp.2."),
    (r"(blocks\.\d+\.)mlp\.w12\.", r"\1mlp.gate_and_value."),
    (r"(blocks\.\d+\.)mlp\.w3\.", r"\1mlp.out."),
)
#: Parts that only training used (REPA's projectors), or that follow from the settings (tables of rotations).
_DROPPED = re.compile(r"projectors\.|feat_rope\.|ln_.*|rope\.")


def load_published(path: str | os.PathLike[str], name: str, *, averaged: bool = True, **overrides: Any) -> nn.Module:
    """A field in evaluation mode from an official checkpoint.

    Args:
        path: ``.pt``, ``.pth`` or ``.ckpt`` (tensors alone are read, whatever else it holds is refused), or
            ``.safetensors``.
        name: of the network, ``sit_*``, ``dit_*`` or ``lightningdit_*`` of :func:`hd_zoo.list_models`. A REPA
            checkpoint is ``sit_*`` with ``reversed_time=False, learned_variance=False``: its t = 0 is data.
        averaged: take the moving average where the file has one beside the current weights.
        overrides: of the network, e.g. ``image_size=64`` for 512 pixels.

    Returns:
        For ``dit_*`` the network behind :class:`hd_zoo.DiffusedNoise`, otherwise the network: both are velocity
        fields of ours.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no weights, or others than the network's: with every missing and unexpected name.
    """
    model = create_model(name, device="meta", **overrides)
    if not isinstance(model, DiffusionTransformer):
        raise ValueError(f"name must be sit_*, dit_* or lightningdit_*; got {name!r}")
    weights = convert_weights(read_weights(path, averaged=averaged), model)
    model.load_state_dict(weights, assign=True)
    return (DiffusedNoise(model) if name.startswith("dit_") else model).eval()


def read_weights(path: str | os.PathLike[str], *, averaged: bool = True) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, out of whichever nesting, without a wrapper's prefix ("module.").

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as tensors, or holds none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    found: Any
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            # The settings that training scripts of these families store beside the weights are a plain Namespace.
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as weights alone: {error}") from error
    for place in (*AVERAGED, *CURRENT) if averaged else (*CURRENT, *AVERAGED):
        if isinstance(found, dict) and isinstance(found.get(place), dict):
            found = found[place]
            break
    if not isinstance(found, dict) or not any(isinstance(one, Tensor) for one in found.values()):
        raise ValueError(f"{path} holds no weights by name")
    prefix = re.compile(r"^(module\.|_orig_mod\.)+")
    return {prefix.sub("", name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def convert_weights(found: dict[str, Tensor], model: DiffusionTransformer) -> dict[str, Tensor]:
    """Official names and shapes -> those of ``model``, which may be on the meta device.

    Raises:
        ValueError: with every unexpected name and wrong shape, and every missing name in our spelling; or if the
            fixed positions are not the sines and cosines that they should be.
    """
    expected = model.state_dict()
    weights: dict[str, Tensor] = {}
    problems = []
    for theirs, tensor in found.items():
        if _DROPPED.match(theirs):
            continue
        if theirs == "pos_embed":
            problems += _check_positions(tensor, model)
            continue
        ours = theirs
        for pattern, name in _NAMES:
            ours = re.sub(rf"^{pattern}", name, ours)
        if ours == "patch_embed.weight" and tensor.ndim == 4:
            tensor = rearrange(tensor, "o c p q -> o (p q c)")
        if ours not in expected:
            problems.append(f"unexpected {theirs}")
        elif tensor.shape != expected[ours].shape:
            problems.append(f"{theirs} has shape {tuple(tensor.shape)}, not {tuple(expected[ours].shape)}")
        weights[ours] = tensor.float().contiguous()
    fixed = {"positions": grid_embedding(model.patch_embed.out_features, model.grid, model.grid)}
    if model.rotary is not None:
        fixed["rotary"] = model.make_rotary()
    problems += [f"missing {name}" for name in expected.keys() - weights.keys() - fixed.keys()]
    if problems:
        raise ValueError(f"these are not the weights of this network: {'; '.join(sorted(problems))}")
    return weights | fixed


def _check_positions(found: Tensor, model: DiffusionTransformer) -> list[str]:
    ours = grid_embedding(model.patch_embed.out_features, model.grid, model.grid)
    if found.shape != (1, *ours.shape):
        return [f"pos_embed has shape {tuple(found.shape)}, not {(1, *ours.shape)}"]
    gap = (found[0].float() - ours).abs().max().item()
    return [] if gap < 1e-3 else [f"pos_embed differs from the fixed sines and cosines by {gap:.3g}"]
