"""Teachers of diffusers' format: folder or hub id -> velocity field, by what the scheduler's configuration says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hd_zoo.adapters.diffusers_field import KINDS, DiffusersField
from hd_zoo.adapters.dit import DiTNoise
from hd_zoo.adapters.sana import SanaField
from hd_zoo.wrappers.convert import DiffusedNoise
from hd_zoo.wrappers.convert.schedules import SCHEDULES, without_terminal_signal

#: The classes that convert, and where their weights lie in a pipeline's folder.
MODELS = (*KINDS, "DiTTransformer2DModel", "SanaTransformer2DModel")
SUBFOLDERS = ("transformer", "unet")
#: What schedulers call the network's prediction, and what DiffusedNoise does.
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"


def from_diffusers(
    source: str | os.PathLike[str] | nn.Module,
    *,
    scheduler: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """A frozen velocity field from a network of diffusers, by what it was trained to predict.

        teacher = from_diffusers("a/pipelines/folder")
        teacher = from_diffusers("stable-diffusion-v1-5/stable-diffusion-v1-5")
        teacher = from_diffusers(unet, scheduler=pipeline.scheduler.config)

    Read of the scheduler's configuration: the prediction (epsilon, v_prediction, sample, flow), the schedule (linear,
    scaled_linear, squaredcos_cap_v2 or trained betas, rescaled to zero terminal SNR or not) and the number of timesteps
    of training. Its settings for sampling (spacing, shift, clipping) are no part of the field. A flow's network is the
    field itself (:class:`DiffusersField`, :class:`SanaField`), another stands behind :class:`hd_zoo.DiffusedNoise`.

    Args:
        source: a pipeline's folder, a network's folder, a hub id of one of them, or the network itself: UNet2DModel,
            UNet2DConditionModel, DiT-, PixArt-, SD3- or SanaTransformer2DModel.
        scheduler: a scheduler's folder or configuration, where ``source`` is no pipeline's folder.
        subfolder: of the network in a pipeline's folder; None: "transformer" or "unet".
        dtype: of its weights.
        options: of diffusers' ``from_pretrained``.

    Raises:
        ModuleNotFoundError: without diffusers; for an id, without huggingface_hub.
        FileNotFoundError: if there is no such folder, network or scheduler in it.
        ValueError: for another network, prediction or scheduler.
    """
    if isinstance(source, nn.Module):
        model, settings = source, read_scheduler(scheduler)
    else:
        import diffusers

        folder = _local(source)
        part = _network_folder(folder, subfolder)
        name = _read(part / CONFIG).get("_class_name")
        if name not in MODELS:
            raise ValueError(f"{part / CONFIG} is of a {name}; those that convert are {', '.join(MODELS)}")
        settings = read_scheduler(folder if scheduler is None else scheduler)
        model = getattr(diffusers, name).from_pretrained(part, torch_dtype=dtype, **options)
    return velocity_field(model, settings).eval().requires_grad_(False)


def velocity_field(model: nn.Module, scheduler: Mapping[str, Any]) -> nn.Module:
    """The model's velocity field by a scheduler's configuration; see :func:`from_diffusers`."""
    name = type(model).__name__
    flow = is_flow(scheduler)
    steps = scheduler.get("num_train_timesteps", 1000)
    if name == "SanaTransformer2DModel":
        if not flow or steps != 1000:
            raise ValueError(f"a {name} predicts a flow over 1000 timesteps; the scheduler says otherwise")
        return SanaField(model)
    if name not in MODELS:
        raise ValueError(f"a network must be one of {', '.join(MODELS)}; got {name}")
    network = DiTNoise(model) if name == "DiTTransformer2DModel" else DiffusersField(model, float(steps))
    if flow:
        if isinstance(network, DiTNoise):
            raise ValueError(f"a {name} predicts noise; the scheduler says that it predicts a flow")
        return network
    if isinstance(network, DiTNoise) and steps != 1000:
        raise ValueError(f"a {name} has 1000 timesteps; the scheduler says {steps}")
    return DiffusedNoise(network, **diffusion(scheduler))


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is of a network that predicts our velocity."""
    name = str(scheduler.get("_class_name", ""))
    return (
        name.startswith("FlowMatch")
        or scheduler.get("prediction_type") == "flow_prediction"
        or bool(scheduler.get("use_flow_sigmas"))
    )


def diffusion(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """:class:`hd_zoo.DiffusedNoise`'s arguments by the configuration of a variance-preserving diffusion's scheduler.

    Raises:
        ValueError: for a scheduler without betas, or an unknown schedule or prediction.
    """
    name = scheduler.get("_class_name", "scheduler")
    if "beta_schedule" not in scheduler and scheduler.get("trained_betas") is None:
        raise ValueError(f"{name} is of no variance-preserving diffusion and no flow: it has no beta_schedule")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"{name}: prediction_type must be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
    zero = bool(scheduler.get("rescale_betas_zero_snr", False))
    found: dict[str, Any] = {"prediction": PREDICTIONS[prediction]}
    betas = scheduler.get("trained_betas")
    if betas is not None:
        signal = torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), dim=0)
        if zero:
            signal = without_terminal_signal(signal)
        return {**found, "alphas_cumprod": signal.tolist()}
    schedule = scheduler["beta_schedule"]
    if schedule not in SCHEDULES:
        raise ValueError(f"{name}: beta_schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
    return {
        **found,
        "schedule": schedule,
        "steps": scheduler.get("num_train_timesteps", 1000),
        "beta_start": scheduler.get("beta_start", 1e-4),
        "beta_end": scheduler.get("beta_end", 2e-2),
        "zero_terminal_snr": zero,
    }


def read_scheduler(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A scheduler's configuration, from its folder, its file, or as it is.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: without a source.
    """
    if source is None:
        raise ValueError("scheduler must be a scheduler's folder or configuration: it says what the network predicts")
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    for place in (path, path / SCHEDULER, path / "scheduler" / SCHEDULER):
        if place.is_file():
            return _read(place)
    raise FileNotFoundError(f"no {SCHEDULER} in {path}: it says what the network predicts; give scheduler=")


def _network_folder(folder: Path, subfolder: str | None) -> Path:
    """Where a pipeline's network lies, or the folder itself."""
    if subfolder is None and (folder / CONFIG).is_file():
        return folder
    names = SUBFOLDERS if subfolder is None else (subfolder,)
    for name in names:
        if (folder / name / CONFIG).is_file():
            return folder / name
    raise FileNotFoundError(f"no {CONFIG} in {folder}, nor in its {' or '.join(names)}")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no configuration")
    return found


def _local(source: str | os.PathLike[str]) -> Path:
    """The folder, or a snapshot of the repository on the hub: the network and the scheduler alone."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not isinstance(source, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
        raise FileNotFoundError(f"there is no folder {folder}")
    from huggingface_hub import snapshot_download

    patterns = [INDEX, CONFIG, SCHEDULER, "*.safetensors*", "scheduler/*"]
    patterns += [f"{name}/{what}" for name in SUBFOLDERS for what in ("*.json", "*.safetensors*")]
    return Path(snapshot_download(source, allow_patterns=patterns))
