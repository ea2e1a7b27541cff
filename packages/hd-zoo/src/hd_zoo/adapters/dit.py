"""diffusers' ``DiTTransformer2DModel`` as a field, and its weights in this package's own transformer."""

from __future__ import annotations

import os
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from hd_zoo.adapters.rebuild import OfDiffusers
from hd_zoo.field import check_times, labels_or_null
from hd_zoo.networks.embedding import grid_embedding
from hd_zoo.networks.transformer import DiffusionTransformer
from hd_zoo.registry import build
from hd_zoo.wrappers.convert import DiffusedNoise


class DiTNoise(OfDiffusers):
    """The wrapped model's noise: ``network(z, i / 1000, labels=...)``, what :class:`hd_zoo.DiffusedNoise` expects.

    Its own dropout of labels is off, also in training mode: which labels a student sees is the loop's business.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for module in model.modules():  # in training mode it would replace a tenth of the labels
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0  # type: ignore[assignment]

    #: Where :func:`hd_zoo.to_student` adds the interval: each block embeds the time, the first one for the output too.
    time_embedding_at, time_embedding_repeated = "model.transformer_blocks.*.norm1.emb", True

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one sample."""
        config = self.model.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.model.config.num_embeds_ada_norm)

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.classes

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, *, labels: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,) in [0, 1), labels (B,) int64 or None: the null class. r is ignored.

        Raises:
            ValueError: for times or labels of another shape or dtype.
        """
        check_times(x, t, r)
        return self._outputs(x, t, labels)[:, : x.shape[1]]

    def with_variance(self, x: Tensor, t: Tensor, *, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The noise, and what the model says of the reverse step's variance, about [-1, 1]: both of x's shape.

        Raises:
            ValueError: for times or labels of another shape or dtype, or a model that says nothing of it.
        """
        check_times(x, t, None)
        noise, *variance = self._outputs(x, t, labels).split(x.shape[1], dim=1)
        if not variance:
            raise ValueError("the model has no variance: its out_channels are its in_channels")
        return noise, variance[0]

    def _outputs(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        labels = labels_or_null(labels, x, self.null_label)
        out: Tensor = self.model(x, timestep=1000 * t, class_labels=labels, return_dict=False)[0]
        return out


def load_diffusers_dit(
    source: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **options: Any
) -> nn.Module:
    """A velocity field from a folder or hub id that holds a ``DiTTransformer2DModel`` (``facebook/DiT-XL-2-256``).

    Args:
        source: where it is; in a pipeline's folder it lies under ``subfolder="transformer"``.
        dtype: of its weights.
        options: of diffusers' ``from_pretrained``.

    Raises:
        ModuleNotFoundError: without diffusers.
    """
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(os.fspath(source), torch_dtype=dtype, **options)
    return DiffusedNoise(DiTNoise(model)).eval().requires_grad_(False)


def from_diffusers_dit(model: nn.Module) -> DiffusionTransformer:
    """The same network as a :class:`hd_zoo.DiffusionTransformer`, from which a student can be made.

    diffusers keeps an embedding of time and label in every block; in converted official weights all are copies.
    Equal to the original for ``norm_eps`` 1e-6, DiT's own; 1e-5, diffusers' default, changes about 3e-6 of the output.

    Raises:
        ValueError: if the blocks' embeddings differ, or for settings that the transformer lacks.
    """
    config: Any = model.config
    if config.activation_fn != "gelu-approximate" or not config.attention_bias or config.norm_elementwise_affine:
        raise ValueError("only DiT's own settings convert: gelu-approximate, attention_bias, no affine norms")
    out = config.out_channels or config.in_channels
    for name, value, fits, accepted in (
        ("norm_eps", config.norm_eps, 0 < config.norm_eps <= 1e-5, "at most 1e-5"),
        ("out_channels", out, out in (config.in_channels, 2 * config.in_channels), "in_channels or twice as many"),
        ("num_embeds_ada_norm", config.num_embeds_ada_norm, (config.num_embeds_ada_norm or 0) >= 1, ">= 1"),
    ):
        if not fits:
            raise ValueError(f"{name} must be {accepted} to convert; got {value}")
    found = model.state_dict()
    arguments = {
        "image_size": config.sample_size,
        "channels": config.in_channels,
        "patch": config.patch_size,
        "width": config.num_attention_heads * config.attention_head_dim,
        "depth": config.num_layers,
        "num_heads": config.num_attention_heads,
        "classes": config.num_embeds_ada_norm,
        "learned_variance": out == 2 * config.in_channels,
        "time_scale": 1000.0,
        "inclusive_frequencies": True,
    }
    ours = build("transformer", arguments, device="meta")
    assert isinstance(ours, DiffusionTransformer)
    shared = "transformer_blocks.0.norm1.emb."
    for name, tensor in found.items():
        if ".norm1.emb." in name and not torch.equal(tensor, found[shared + name.split(".norm1.emb.")[1]]):
            raise ValueError(f"{name} differs from the first block's: this network has one embedding for all")
    weights = {
        "patch_embed.weight": rearrange(found["pos_embed.proj.weight"], "o c p q -> o (p q c)"),
        "label_embed.weight": found[shared + "class_embedder.embedding_table.weight"],
        "positions": grid_embedding(arguments["width"], ours.grid, ours.grid).to(found["proj_out_2.weight"]),
    }
    names = {
        "patch_embed.bias": "pos_embed.proj.bias",
        **{f"time_embed.mlp.{i}.{kind}": f"{shared}timestep_embedder.linear_{j}.{kind}"
           for i, j in ((0, 1), (2, 2)) for kind in ("weight", "bias")},
        **{f"head.{a}.{kind}": f"{b}.{kind}"
           for a, b in (("modulation.1", "proj_out_1"), ("linear", "proj_out_2")) for kind in ("weight", "bias")},
    }  # fmt: skip
    for index in range(config.num_layers):
        mine, theirs = f"blocks.{index}.", f"transformer_blocks.{index}."
        for kind in ("weight", "bias"):
            parts = [found[f"{theirs}attn1.to_{part}.{kind}"] for part in "qkv"]
            weights[f"{mine}attn.qkv.{kind}"] = torch.cat(parts)
            names[f"{mine}attn.proj.{kind}"] = f"{theirs}attn1.to_out.0.{kind}"
            names[f"{mine}mlp.0.{kind}"] = f"{theirs}ff.net.0.proj.{kind}"
            names[f"{mine}mlp.2.{kind}"] = f"{theirs}ff.net.2.{kind}"
            names[f"{mine}modulation.1.{kind}"] = f"{theirs}norm1.linear.{kind}"
    weights |= {mine: found[theirs] for mine, theirs in names.items()}
    ours.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    return ours.train(model.training)
