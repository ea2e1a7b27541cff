"""Sana (arXiv 2410.10629), text to image: diffusers' ``SanaTransformer2DModel`` as teacher and two-time student."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hd_zoo.adapters.base import OfDiffusers
from hd_zoo.field import check_times
from hd_zoo.networks.embedding import TimeEmbedding
from hd_zoo.networks.interval import AddedInterval, fold_added_interval
from hd_zoo.wrappers.wrapper import network_inside


class SanaField(OfDiffusers):
    """``field(x, t, r=None, prompt=..., prompt_mask=None, guidance=None)``; Sana predicts our velocity at our time.

    The wrapped model is shown 1000 t ``timestep_scale``. r is ignored unless the model is a student's
    (:func:`to_sana_student`).

    Args of the call: x (B, C, h, w) latents; t and r (B,); prompt (B, L, E) embeddings of the text; prompt_mask
    (B, L), 1 for tokens that count; guidance (B,), for models distilled to take a scale (``guidance_embeds``), and for
    those alone.

    Raises:
        ValueError: for a model whose output is no velocity; in a call for times or guidance of another shape, for
            guidance that is missing or that the model does not take.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config: Any = model.config
        if config.out_channels not in (None, config.in_channels):
            raise ValueError(
                f"a velocity has its latents' channels: out_channels must be {config.in_channels}; "
                f"got {config.out_channels}"
            )
        self.model = model

    #: It takes prompts, no labels.
    classes, null_label = 0, None

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one sample at the size of training; others run too."""
        config = self.model.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def time_embedding_at(self) -> str:
        """Where :func:`hd_zoo.to_student` adds the interval."""
        return f"model.time_embed.{'' if self.model.config.guidance_embeds else 'emb.'}timestep_embedder"

    @property
    def takes_r(self) -> bool:
        """True for a student, False for a teacher."""
        return isinstance(self.model.time_embed, _TwoTimeEmbedding)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        r: Tensor | None = None,
        *,
        prompt: Tensor,
        prompt_mask: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        check_times(x, t, r)
        config = self.model.config
        scale = 1000 * config.timestep_scale
        times = scale * t
        if self.takes_r:
            times = torch.stack([times, torch.zeros_like(times) if r is None else scale * (t - r)], dim=1)
        takes_guidance = bool(config.guidance_embeds)
        shape = None if guidance is None else tuple(getattr(guidance, "shape", (type(guidance).__name__,)))
        if shape != (x.shape[:1] if takes_guidance else None):
            accepted = f"of shape ({x.shape[0]},)" if takes_guidance else "None, as the model has no guidance_embeds"
            raise ValueError(f"guidance must be {accepted}; got {shape}")
        if guidance is not None:
            guidance = guidance * config.guidance_embeds_scale
        out: Tensor = self.model(
            x,
            encoder_hidden_states=prompt,
            encoder_attention_mask=prompt_mask,
            timestep=times,
            guidance=guidance,
            return_dict=False,
        )[0]
        return out


class _TwoTimeEmbedding(nn.Module):
    """Sana's embedding of time with that of the interval added: (B, 2) times, t and t - r."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner: Any = inner
        self.interval = TimeEmbedding(width, 256, 1.0, zero_init=True)

    def forward(
        self,
        timestep: Tensor,
        guidance: Tensor | None = None,
        batch_size: int | None = None,
        hidden_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        extra: dict[str, Any] = {"batch_size": batch_size} if guidance is None else {"guidance": guidance}
        t, gap = timestep.unbind(dim=1)
        _, embedded = self.inner(t, hidden_dtype=hidden_dtype, **extra)
        embedded = embedded + self.interval(gap).to(embedded.dtype)
        return self.inner.linear(self.inner.silu(embedded)), embedded


def load_sana(source: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **options: Any) -> SanaField:
    """A teacher from a folder or hub id (``Efficient-Large-Model/Sana_600M_512px_diffusers``).

    In a pipeline's folder it lies under ``subfolder="transformer"``.

    Raises:
        ModuleNotFoundError: without diffusers.
    """
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel.from_pretrained(os.fspath(source), torch_dtype=dtype, **options)
    return SanaField(model).eval().requires_grad_(False)


def to_sana_student(teacher: SanaField) -> SanaField:
    """A two-time copy that equals the teacher at every r until it is trained; every parameter is trainable.

    The embedding of t - r, whose last layer is zero, is added to that of t.
    """
    student = copy.deepcopy(teacher)
    if not student.takes_r:
        model = student.model
        weight = next(model.parameters())
        embedding = _TwoTimeEmbedding(model.time_embed, model.proj_out.in_features)
        model.time_embed = embedding.to(weight.device, weight.dtype).train(model.training)
    return student.requires_grad_(True)


def export_sana_pipeline(student: Any, folder: str | os.PathLike[str], **components: Any) -> Path:
    """Write a student as a folder that diffusers' own ``SanaPipeline`` loads and runs in one step.

        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline(prompt, num_inference_steps=1, guidance_scale=1.0)

    One step asks for u(x, 1, 0) alone. There t - r is 1, its embedding a constant vector, and a constant added
    to the embedding of time is a bias of that embedding's last layer: folded into it, the student is a plain
    ``SanaTransformer2DModel``, and its Euler step from noise level 1 to 0 is x - u.

    Args:
        student: from :func:`to_sana_student` or :func:`hd_zoo.to_student`.
        folder: made if missing; written under a temporary name first.
        components: ``vae``, ``text_encoder`` and ``tokenizer`` of the teacher's pipeline; one that is left out must be
            given when the folder is loaded, if only as None.

    Raises:
        ValueError: for a teacher, a model with ``guidance_embeds``, or if the folder exists.
        ModuleNotFoundError: without diffusers (and the transformers library that its pipeline needs).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    if not student.takes_r:
        raise ValueError("a student of to_sana_student is needed; this field has one time")
    if network_inside(student).model.config.guidance_embeds:
        raise ValueError("the model has guidance_embeds, and diffusers' SanaPipeline passes it no guidance")
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, **components}
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; choose another name or remove it")
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    pipeline = SanaPipeline(transformer=fold_interval(student), scheduler=scheduler, **parts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        pipeline.save_pretrained(Path(temporary) / folder.name)
        (Path(temporary) / folder.name).rename(folder)
    return folder


@torch.no_grad()
def fold_interval(student: Any) -> nn.Module:
    """The plain ``SanaTransformer2DModel`` that at t = 1 equals the student's jump from 1 to 0; a copy."""
    if isinstance(student, AddedInterval):
        folded: nn.Module = fold_added_interval(student, 1.0).model  # type: ignore[assignment]
        return folded
    model: Any = copy.deepcopy(student.model)
    embedding = model.time_embed
    gap = torch.full((1,), 1000 * model.config.timestep_scale, device=model.proj_out.weight.device)
    constant = embedding.interval(gap)[0]
    inner = embedding.inner
    embedder = inner.timestep_embedder if hasattr(inner, "timestep_embedder") else inner.emb.timestep_embedder
    embedder.linear_2.bias.add_(constant)
    model.time_embed = inner
    plain: nn.Module = model.eval()
    return plain
