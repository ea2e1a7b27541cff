"""This package's transformer as diffusers' DiT without r: at the one pair of times of one step they are equal.

There the embeddings of t and of t - r are a constant vector, which goes into the bias of DiT's embedding of time.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from hd_zoo.blueprint import blueprint
from hd_zoo.networks.transformer import DiffusionTransformer

#: Between the two layers of a block's MLP: this package's names, and diffusers'.
ACTIVATIONS = {"gelu_tanh": "gelu-approximate", "silu": "linear-silu"}


@torch.no_grad()
def to_diffusers_dit(network: DiffusionTransformer, t: float, r: float) -> nn.Module:
    """diffusers' ``DiTTransformer2DModel`` that equals this package's transformer at times t and r, whatever timestep
    it is shown. A network without classes is one of a single class, number 0. Of a learned variance nothing is kept.

    Raises:
        ValueError: for settings that DiT lacks: rotary positions, norms of queries and keys, RMSNorm, another MLP, or
            r in the late blocks alone.
        ModuleNotFoundError: without diffusers.
    """
    from diffusers import DiTTransformer2DModel

    _, arguments = blueprint(network)
    _check_settings(arguments, network.r_embedding)
    blocks: list[Any] = list(network.blocks)
    width, num_heads = network.patch_embed.out_features, blocks[0].attn.num_heads
    channels, size, _ = network.sample_shape
    model: Any = DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=width // num_heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=len(blocks),
        sample_size=size,
        patch_size=network.patch,
        activation_fn=ACTIVATIONS[arguments.get("activation", "gelu_tanh")],
        num_embeds_ada_norm=network.classes or 1,
        norm_eps=1e-6,
    )
    weight = network.patch_embed.weight
    nn.Module.to(model, weight.device, weight.dtype)  # diffusers' own has a warning for every cast
    found = model.state_dict() | _ends(network)
    constant, labels = _embeddings(network, t, r)
    for index, block in enumerate(blocks):
        found |= {f"transformer_blocks.{index}.{name}": tensor for name, tensor in _block(block).items()}
        embedding = f"transformer_blocks.{index}.norm1.emb."
        last = f"{embedding}timestep_embedder.linear_2."
        found |= {f"{last}weight": torch.zeros_like(found[f"{last}weight"]), f"{last}bias": constant}
        found[f"{embedding}class_embedder.embedding_table.weight"] = labels
    model.load_state_dict({name: tensor.clone() for name, tensor in found.items()})
    plain: nn.Module = model.eval()
    return plain


def _check_settings(arguments: dict[str, Any], r_embedding: str | None) -> None:
    """Raises ValueError for what DiT has not."""
    for name, value, accepted in (
        ("norm", arguments.get("norm", "layer"), ("layer",)),
        ("qk_norm", arguments.get("qk_norm"), (None,)),
        ("rotary", bool(arguments.get("rotary", False)), (False,)),
        ("activation", arguments.get("activation", "gelu_tanh"), tuple(ACTIVATIONS)),
        ("mlp_ratio", float(arguments.get("mlp_ratio", 4.0)), (4.0,)),
        ("r_embedding", r_embedding, ("added", None)),
    ):
        if value not in accepted:
            raise ValueError(f"{name} must be {' or '.join(map(repr, accepted))} for a DiT of diffusers; got {value!r}")


def _embeddings(network: DiffusionTransformer, t: float, r: float) -> tuple[Tensor, Tensor]:
    """What stands for the times (C,), and for each label (classes + 1, C)."""
    weight = network.patch_embed.weight
    if network.reversed_time:
        t, r = 1 - t, 1 - r
    times = weight.new_tensor([t, t - r], dtype=torch.float64)
    constant = network.time_embed(times[:1])[0]
    if network.interval_embed is not None:
        constant = constant + network.interval_embed(times[1:])[0]
    table = network.label_embed
    return constant, weight.new_zeros(2, len(constant)) if table is None else table.weight


def _ends(network: DiffusionTransformer) -> dict[str, Tensor]:
    """The layers before and behind the blocks; diffusers' blocks share their embeddings with the last one."""
    head: Any = network.head
    channels, sign = network.sample_shape[0], -1.0 if network.reversed_time else 1.0
    sides = {"p": network.patch, "q": network.patch}

    def first_channels(rows: Tensor) -> Tensor:
        parts = rearrange(rows, "(p q c) ... -> p q c ...", **sides)[:, :, :channels]
        return sign * rearrange(parts, "p q c ... -> (p q c) ...")

    return {
        "pos_embed.proj.weight": rearrange(network.patch_embed.weight, "o (p q c) -> o c p q", **sides),
        "pos_embed.proj.bias": network.patch_embed.bias,
        "proj_out_1.weight": head.modulation[1].weight,
        "proj_out_1.bias": head.modulation[1].bias,
        "proj_out_2.weight": first_channels(head.linear.weight),
        "proj_out_2.bias": first_channels(head.linear.bias),
    }


def _block(block: Any) -> dict[str, Tensor]:
    """A block's layers by diffusers' names."""
    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for part, value in zip("qkv", getattr(block.attn.qkv, kind).chunk(3), strict=True):
            found[f"attn1.to_{part}.{kind}"] = value
        found[f"attn1.to_out.0.{kind}"] = getattr(block.attn.proj, kind)
        found[f"ff.net.0.proj.{kind}"] = getattr(block.mlp[0], kind)
        found[f"ff.net.2.{kind}"] = getattr(block.mlp[2], kind)
        found[f"norm1.linear.{kind}"] = getattr(block.modulation[1], kind)
    return found
