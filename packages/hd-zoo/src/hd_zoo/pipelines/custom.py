"""One step of a distilled DiT. This file lies in the pipeline's folder as ``pipeline.py``, where diffusers finds it.

    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    pictures = pipeline(class_labels=[3, 7]).images

The sample is ``skip * noise - scale * transformer(input_scale * noise, timestep)``, decoded where there is a vae.
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class OneStepPipeline(DiffusionPipeline):
    _optional_components = ["vae"]  # noqa: RUF012  (diffusers' own form)

    def __init__(
        self,
        transformer: Any,
        vae: Any = None,
        skip: float = 1.0,
        scale: float = 1.0,
        input_scale: float = 1.0,
        timestep: float = 1000.0,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(skip=skip, scale=scale, input_scale=input_scale, timestep=timestep)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any,
        generator: Any = None,
        latents: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """class_labels: a class for each picture. output_type: "pil", "np", "pt" ([0, 1]) or "latent"."""
        model, config = self.transformer, self.config
        labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
        shape = (len(labels), model.config.in_channels, model.config.sample_size, model.config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=model.dtype)
        times = torch.full((len(labels),), config.timestep, device=latents.device)
        out = model(config.input_scale * latents, timestep=times, class_labels=labels).sample
        images = config.skip * latents - config.scale * out[:, : shape[1]]
        if output_type != "latent" and self.vae is not None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            images = self.vae.decode(images / self.vae.config.scaling_factor + shift).sample
        if output_type != "latent":
            if images.shape[1] not in (1, 3):
                raise ValueError("these are latents: give the pipeline a vae, or output_type='latent'")
            images = (images / 2 + 0.5).clamp(0, 1)
        if output_type in ("pil", "np"):
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
