"""What a transformer costs, counted from its settings: parameters, multiply-adds, memory of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hd_zoo.networks.transformer import DiffusionTransformer, GatedMLP
from hd_zoo.wrappers.convert import Converter


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one network; per sample where it says so.

    Attributes:
        parameters: trainable numbers; fixed positions are not counted.
        multiply_adds: of one forward pass of one sample, matrix products alone (a "GFLOP" of the DiT and SiT papers
            is 10^9 of these).
        weight_bytes: of the parameters.
        activation_bytes: about what autograd keeps of one sample for the backward pass, with fused attention and
            without recomputation (within a tenth of what it was seen to keep on a CPU in float32; RMSNorm in 16 bits,
            which PyTorch computes there in float32, kept up to 28 % more).
    """

    parameters: int
    multiply_adds: int
    weight_bytes: int
    activation_bytes: int

    def training_bytes(self, batch: int, *, copies: int = 5) -> int:
        """Of a training step: weights, gradients, two moments of Adam and an average (``copies``), activations."""
        return copies * self.weight_bytes + batch * self.activation_bytes


def model_cost(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> Cost:
    """Count a :class:`hd_zoo.DiffusionTransformer`, on any device ("meta" included), perhaps behind a converter.

    Args:
        dtype: of weights and activations.

    Raises:
        ValueError: for another network.
    """
    while isinstance(model, Converter):
        model = model.network
    if not isinstance(model, DiffusionTransformer):
        raise ValueError(f"a DiffusionTransformer is needed; got {type(model).__name__}")
    tokens = model.grid**2
    multiply_adds, numbers = 0, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            # Conditions are one vector a sample, everything else one a token.
            rows = 1 if "modulation" in name or "embed.mlp" in name else tokens
            passes = 2 if model.r_embedding == "decoupled" and name.startswith("time_embed") else 1
            multiply_adds += passes * rows * module.in_features * module.out_features
            numbers += passes * rows * module.in_features
    blocks: Any = model.blocks
    for block in blocks:
        width, hidden = block.attn.qkv.in_features, _hidden(block.mlp)
        multiply_adds += 2 * tokens**2 * width
        # Beside the inputs of linear maps: q, k, v; what the norms, the modulations and the gates multiply; the MLP
        # before its activation. RMSNorm and rotations go through more steps than one, each with a result.
        widths = 9.5 + 2 * isinstance(block.norm1, nn.RMSNorm) + 2 * (model.rotary is not None)
        widths += (
            0 if isinstance(block.attn.q_norm, nn.Identity) else 5 if isinstance(block.attn.q_norm, nn.RMSNorm) else 3
        )
        numbers += int(tokens * (widths * width + (3 if isinstance(block.mlp, GatedMLP) else 1) * hidden))
    parameters = sum(one.numel() for one in model.parameters())
    size = torch.empty((), dtype=dtype).element_size()
    return Cost(
        parameters=parameters,
        multiply_adds=multiply_adds,
        weight_bytes=size * parameters,
        activation_bytes=size * numbers,
    )


def _hidden(mlp: nn.Module) -> int:
    """Width between the two layers of a block's MLP."""
    if isinstance(mlp, GatedMLP):
        return mlp.out.in_features
    assert isinstance(mlp, nn.Sequential)
    first = mlp[0]
    assert isinstance(first, nn.Linear)
    return first.out_features
