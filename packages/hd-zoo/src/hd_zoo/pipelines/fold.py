"""This package's transformer as diffusers' DiT without r: at the one pair of times of one step they are equal.

There the embeddings of t and of t - r are a constant vector, which goes into the bias of DiT's embedding of time.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import nn

from hd_zoo.blueprint import blueprint
from hd_zoo.networks.transformer import DiffusionTransformer

#: Between the two layers of a block's MLP: this package's names, and diffusers'.
ACTIVATIONS = {"gelu_tanh": "gelu-approximate", "silu": "linear-silu"}


@torch.no_grad()
def to_diffusers_dit(network: DiffusionTransformer, t: float, r: float) -> nn.Module:
    """diffusers' ``DiTTransformer2DModel`` that equals this package's transformer at times t and r, whatever timestep
    it is shown. A network without classes is one of a single class, number 0.

    Raises:
        ValueError: for settings that DiT lacks: rotary positions, norms of queries and keys, RMSNorm, another MLP, or
            r in the late blocks alone.
        ModuleNotFoundError: without diffusers.
    """
    from diffusers import DiTTransformer2DModel

    _, arguments = blueprint(network)
    blocks: list[Any] = list(network.blocks)
    width, depth, heads = network.patch_embed.out_features, len(blocks), blocks[0].attn.num_heads
    channels, size, _ = network.sample_shape
    activation = arguments.get("activation", "gelu_tanh")
    for name, value, accepted in (
        ("norm", arguments.get("norm", "layer"), ("layer",)),
        ("qk_norm", arguments.get("qk_norm"), (None,)),
        ("rotary", bool(arguments.get("rotary", False)), (False,)),
        ("activation", activation, tuple(ACTIVATIONS)),
        ("mlp_ratio", float(arguments.get("mlp_ratio", 4.0)), (4.0,)),
        ("r_embedding", network.r_embedding, ("added", None)),
    ):
        if value not in accepted:
            raise ValueError(f"{name} must be {' or '.join(map(repr, accepted))} for a DiT of diffusers; got {value!r}")
    model: Any = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=depth,
        sample_size=size,
        patch_size=network.patch,
        activation_fn=ACTIVATIONS[activation],
        num_embeds_ada_norm=network.classes or 1,
        norm_eps=1e-6,
    )
    weight = network.patch_embed.weight
    nn.Module.to(model, weight.device, weight.dtype)  # diffusers' own has a warning for every cast
    if network.reversed_time:
        t, r = 1 - t, 1 - r
    times = weight.new_tensor([t, t - r], dtype=torch.float64)
    constant = network.time_embed(times[:1])[0]
    if network.interval_embed is not None:
        constant = constant + network.interval_embed(times[1:])[0]
    labels = weight.new_zeros(2, width) if network.label_embed is None else network.label_embed.weight
    head: Any = network.head
    sign = -1.0 if network.reversed_time else 1.0
    side = {"p": network.patch, "q": network.patch}

    def first_channels(rows: torch.Tensor) -> torch.Tensor:
        """Of a learned variance nothing is kept."""
        parts = rearrange(rows, "(p q c) ... -> p q c ...", **side)[:, :, :channels]
        return sign * rearrange(parts, "p q c ... -> (p q c) ...")

    found = model.state_dict()
    found |= {
        "pos_embed.proj.weight": rearrange(weight, "o (p q c) -> o c p q", **side),
        "pos_embed.proj.bias": network.patch_embed.bias,
        "proj_out_1.weight": head.modulation[1].weight,
        "proj_out_1.bias": head.modulation[1].bias,
        "proj_out_2.weight": first_channels(head.linear.weight),
        "proj_out_2.bias": first_channels(head.linear.bias),
    }
    for index, block in enumerate(blocks):
        theirs = f"transformer_blocks.{index}."
        time = f"{theirs}norm1.emb.timestep_embedder.linear_2."
        found[f"{time}weight"] = torch.zeros_like(found[f"{time}weight"])
        found[f"{time}bias"] = constant
        found[f"{theirs}norm1.emb.class_embedder.embedding_table.weight"] = labels
        for kind in ("weight", "bias"):
            for part, value in zip("qkv", getattr(block.attn.qkv, kind).chunk(3), strict=True):
                found[f"{theirs}attn1.to_{part}.{kind}"] = value
            found[f"{theirs}attn1.to_out.0.{kind}"] = getattr(block.attn.proj, kind)
            found[f"{theirs}ff.net.0.proj.{kind}"] = getattr(block.mlp[0], kind)
            found[f"{theirs}ff.net.2.{kind}"] = getattr(block.mlp[2], kind)
            found[f"{theirs}norm1.linear.{kind}"] = getattr(block.modulation[1], kind)
    model.load_state_dict({name: tensor.clone() for name, tensor in found.items()})
    plain: nn.Module = model.eval()
    return plain
