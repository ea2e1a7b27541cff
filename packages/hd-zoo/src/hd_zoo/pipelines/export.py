"""A student's folder for diffusers, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hd_zoo.adapters.dit import DiTNoise
from hd_zoo.adapters.sana import SanaField, export_sana_pipeline
from hd_zoo.networks.interval import AddedInterval, fold_added_interval
from hd_zoo.networks.transformer import DiffusionTransformer
from hd_zoo.pipelines.fold import to_diffusers_dit
from hd_zoo.pipelines.one_step import OneStep, one_step
from hd_zoo.sampling.jumps import sample_jumps
from hd_zoo.wrappers.wrapper import network_inside

#: Largest difference between the student's samples and the folded network's, in standard deviations of a sample [ours].
TOLERANCE = 1e-3


def pipeline_kind(student: nn.Module) -> str | None:
    """ "sana", "dit", or None for a student that is no such network. Needs no diffusers."""
    inside = network_inside(student)
    if isinstance(inside, SanaField):
        return "sana"
    return "dit" if isinstance(inside, (DiTNoise, DiffusionTransformer)) else None


def export_pipeline(student: nn.Module, folder: str | os.PathLike[str], **components: Any) -> Path:
    """Write a student of Sana or of DiT as a folder from which diffusers makes samples in one step.

    Sana's is for diffusers' own ``SanaPipeline``: :func:`hd_zoo.adapters.export_sana_pipeline`. DiT's comes with a
    pipeline of its own, ``pipeline.py``, since the stock one has a scheduler's step and always a VAE:

        pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
        pipeline(class_labels=[3, 7]).images

    No network of diffusers takes r. What is kept of the student is its jump from 1 to 0, with the embedding of t - r,
    and of this package's transformer that of t, in the biases: other times, several steps and further training need the
    student itself.

    Args:
        student: of Sana, of diffusers' DiT, or a :class:`hd_zoo.DiffusionTransformer` with DiT's settings; perhaps
            behind converters.
        folder: made if missing; written under a temporary name first.
        components: ``vae`` of a DiT on latents; of Sana ``vae``, ``text_encoder`` and ``tokenizer``.

    Raises:
        ValueError: for another network, a teacher, settings that do not fold, or if the folder exists.
        ModuleNotFoundError: without diffusers.
    """
    kind = pipeline_kind(student)
    if kind is None:
        raise ValueError(f"no pipeline is known for a {type(network_inside(student)).__name__}, but for Sana and DiT")
    if kind == "sana":
        return export_sana_pipeline(student, folder, **components)
    form = one_step(student)
    model, timestep = _folded(form)
    _check_equal(student, model, timestep, form)
    return _write_dit(model, timestep, form, Path(folder), **components)


def _folded(form: OneStep) -> tuple[nn.Module, float]:
    """The network of diffusers, and the timestep to show it."""
    network = form.network
    if isinstance(network, DiffusionTransformer):
        return to_diffusers_dit(network, form.t, form.r), 1000.0 * form.t
    if isinstance(network, AddedInterval) and isinstance(network.network, DiTNoise):
        field: Any = fold_added_interval(network, form.t - form.r)
        return field.model, 1000.0 * form.t
    raise ValueError(f"no pipeline is known for a {type(network).__name__} around a {type(network_inside(network))}")


@torch.no_grad()
def _check_equal(student: Any, model: Any, timestep: float, form: OneStep) -> None:
    """Raise ValueError if the folded network's samples are not the student's."""
    was_training = student.training
    student.eval()
    weight = next(student.parameters())
    noise = torch.linspace(-2, 2, 2 * model.config.in_channels * model.config.sample_size**2).reshape(
        2, *student.sample_shape
    )
    noise = noise.to(weight)
    labels = torch.tensor([0, max(0, student.classes - 1)], device=weight.device)
    cond: dict[str, Any] = {"labels": labels} if student.classes else {}
    expected = sample_jumps(student, noise, **cond)
    times = torch.full((2,), timestep, device=weight.device)
    out = model(form.input_scale * noise, timestep=times, class_labels=labels).sample[:, : noise.shape[1]]
    found = form.skip * noise - form.scale * out
    student.train(was_training)
    gap = float((found - expected).abs().max() / expected.float().std().clamp(min=1e-12))
    if not gap < TOLERANCE * (1 if weight.dtype in (torch.float32, torch.float64) else 100):
        raise ValueError(f"the network does not fold into one of diffusers: samples differ by {gap:.2g} deviations")


def _write_dit(model: nn.Module, timestep: float, form: OneStep, folder: Path, vae: Any = None) -> Path:
    from hd_zoo.pipelines.custom import OneStepPipeline

    if folder.exists():
        raise ValueError(f"{folder} exists; choose another name or remove it")
    pipeline = OneStepPipeline(
        transformer=model,
        vae=vae,
        skip=form.skip,
        scale=form.scale,
        input_scale=form.input_scale,
        timestep=timestep,
    )
    code = (resources.files("hd_zoo") / "pipelines" / "custom.py").read_text(encoding="utf-8")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        pipeline.save_pretrained(Path(temporary) / folder.name)
        (Path(temporary) / folder.name / "pipeline.py").write_text(code, encoding="utf-8")
        (Path(temporary) / folder.name).rename(folder)
    return folder
