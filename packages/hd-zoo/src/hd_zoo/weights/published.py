"""Official checkpoints of SiT, DiT, LightningDiT, REPA, MeanFlow and DMF, read into the networks of this package.

    teacher = load_published("SiT-XL-2-256x256.pt", "sit_xl_2")

The families share their names of weights: one table serves. Where each comes from is in :mod:`hd_zoo.sources`.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from hd_zoo.networks.embedding import grid_embedding
from hd_zoo.networks.transformer import DiffusionTransformer
from hd_zoo.registry import create_model, published_models
from hd_zoo.weights.checkpoints import read_weights
from hd_zoo.weights.unwrap import check_finite
from hd_zoo.weights.words import listed, one_line
from hd_zoo.wrappers.convert import DiffusedNoise

#: (their name, ours) for what has one name; then for what stands in every block.
_NAMES = (
    (r"x_embedder\.proj\.", "patch_embed."),
    (r"t_embedder\.mlp\.", "time_embed.mlp."),
    (r"r_embedder\.mlp\.", "interval_embed.mlp."),
    (r"y_embedder\.embedding_table\.", "label_embed."),
    (r"final_layer\.linear\.", "head.linear."),
    (r"final_layer\.norm_final\.", "head.norm."),
    (r"final_layer\.adaLN_modulation\.", "head.modulation."),
    (r"(blocks\.\d+\.)adaLN_modulation\.", r"\1modulation."),
    (r"(blocks\.\d+\.)mlp\.fc1\.", r"\1mlp.0."),
    (r"(blocks\.\d+\.)mlp\.fc2\.", r"\1mlp.2."),
    (r"(blocks\.\d+\.attn\.[qk]_norm\.)scale$", r"\1weight"),
    (r"(blocks\.\d+\.)mlp\.w12\.", r"\1mlp.gate_and_value."),
    (r"(blocks\.\d+\.)mlp\.w3\.", r"\1mlp.out."),
)
#: Parts that only training used (REPA's projectors, DMF's weight of the loss), or that follow from the settings (tables
#: of rotations).
_DROPPED = re.compile(r"projectors\.|logvar_linear\.|feat_rope\.|ln_.*|rope\.")


def load_published(path: str | os.PathLike[str], name: str, *, averaged: bool = True, **overrides: Any) -> nn.Module:
    """A field in evaluation mode from an official checkpoint.

    Args:
        path: ``.pt``, ``.pth`` or ``.ckpt`` of ``torch.save`` (tensors alone are read, whatever else it holds is
            refused), or ``.safetensors``.
        name: of the network, a published one of :func:`hd_zoo.list_models`: ``sit_*``, ``dit_*``, ``lightningdit_*``,
            ``repa_*``, or a student of two times, ``meanflow_*`` and ``dmf_*``.
        averaged: take the moving average where the file has one beside the current weights.
        overrides: of the network, e.g. ``image_size=64`` for 512 pixels.

    Returns:
        For ``dit_*`` the network behind :class:`hd_zoo.DiffusedNoise`, otherwise the network: both are velocity
        fields of ours, and take r where the published network does.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no weights, or others than the network's, with the first names at fault and a hint
            where the layout is known; or if they are not finite. One line.
    """
    if name not in published_models():
        create_model(name, device="meta")  # an unknown name has its own message
        raise ValueError(f"name must be that of a published network ({', '.join(_families())}); got {name!r}")
    model = create_model(name, device="meta", **overrides)
    assert isinstance(model, DiffusionTransformer)
    found = read_weights(path, averaged=averaged, dropped=_DROPPED)
    try:
        weights = convert_weights(found, model)
    except ValueError as error:
        raise ValueError(f"{one_line(path)}: {error}") from error
    model.load_state_dict(weights, assign=True)
    return (DiffusedNoise(model) if name.startswith("dit_") else model).eval()


def _families() -> list[str]:
    return sorted({f"{name.split('_')[0]}_*" for name in published_models()})


def convert_weights(found: dict[str, Tensor], model: DiffusionTransformer) -> dict[str, Tensor]:
    """Official names and shapes -> those of ``model``, which may be on the meta device.

    Raises:
        ValueError: with the first unexpected names, wrong shapes and missing names in our spelling; if the fixed
            positions are not the sines and cosines that they should be; or if a number is not finite.
    """
    expected = model.state_dict()
    matched: dict[str, Tensor] = {}
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
        shape = tensor.shape
        if ours == "patch_embed.weight" and tensor.ndim == 4:
            tensor = rearrange(tensor, "o c p q -> o (p q c)")
        if ours not in expected:
            problems.append(f"unexpected {theirs}")
        elif tensor.shape != expected[ours].shape:
            problems.append(f"{theirs} has shape {tuple(shape)}, not {tuple(expected[ours].shape)}")
        matched[ours] = tensor
    fixed = {"positions": grid_embedding(model.patch_embed.out_features, model.grid, model.grid)}
    if model.rotary is not None:
        fixed["rotary"] = model.make_rotary()
    problems += [f"missing {name}" for name in expected.keys() - matched.keys() - fixed.keys()]
    if problems:
        hint = _hint(found, model)
        raise ValueError(f"{hint}these are not the weights of this network: {listed(problems)}")
    # Only now is anything copied: what the network has, and no more.
    weights = {name: tensor.float().contiguous() for name, tensor in matched.items()}
    check_finite(weights)
    return weights | fixed


def _hint(found: dict[str, Tensor], model: DiffusionTransformer) -> str:
    """What is known of a file that does not fit, before the list of names."""
    if any(name.endswith(("kernel", "_flax_embedding.embedding")) for name in found):
        return "a JAX checkpoint (MeanFlow's official one), whose layout is not read here; "
    if not any(re.match(r"blocks\.\d+\.attn\.qkv\.", name) for name in found):
        return "no transformer of these families (py-meanflow's CIFAR-10 network is a U-Net); "
    if model.r_embedding != "added" and any(name.startswith("r_embedder.") for name in found):
        return 'the file has an embedding of t - r (MeanFlow): meanflow_*, or r_embedding="added", reads it; '
    first: Any = model.blocks[0]
    norms = [name for name in found if re.match(r"blocks\.\d+\.attn\.q_norm\.", name)]
    kind = "layer" if any(name.endswith(".bias") for name in norms) else "rms"
    if norms and not isinstance(first.attn.q_norm, nn.LayerNorm if kind == "layer" else nn.RMSNorm):
        return f'the file normalises queries and keys: qk_norm="{kind}" reads it; '
    return ""


def _check_positions(found: Tensor, model: DiffusionTransformer) -> list[str]:
    ours = grid_embedding(model.patch_embed.out_features, model.grid, model.grid)
    if found.shape != (1, *ours.shape):
        return [f"pos_embed has shape {tuple(found.shape)}, not {(1, *ours.shape)}"]
    gap = (found[0].float() - ours).abs().max().item()
    # Half a step of the file's own precision at 1, where it is coarser than what sines in float32 can differ by.
    tolerance = max(1e-3, torch.finfo(found.dtype).eps / 2)
    return [] if gap < tolerance else [f"pos_embed differs from the fixed sines and cosines by {gap:.3g}"]
