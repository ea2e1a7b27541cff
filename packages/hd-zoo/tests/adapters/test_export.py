"""A student as a folder that diffusers' own pipeline loads and runs in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hd_zoo import sample_jumps
from hd_zoo.adapters import AutoencoderCodec, SanaField, export_sana_pipeline, to_sana_student


@pytest.fixture
def autoencoder(diffusers: Any) -> Any:
    """A tiny AutoencoderDC, whose latents are half as wide and high as its pictures."""
    torch.manual_seed(0)
    sides = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_block_types"] = ("ResBlock", "ResBlock")
        sides[f"{side}_block_out_channels"] = (8, 8)
        sides[f"{side}_layers_per_block"] = (1, 1)
        sides[f"{side}_qkv_multiscales"] = ((), ())
    return diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.4, **sides).eval()


def test_the_deep_compression_autoencoder_is_a_codec(autoencoder: Any) -> None:
    codec, images = AutoencoderCodec(autoencoder), torch.randn(2, 3, 16, 16)
    latents = codec.encode(images)
    z = autoencoder.encode(images).latent
    torch.testing.assert_close(latents, 0.4 * z)
    torch.testing.assert_close(codec.decode(latents), autoencoder.decode(z).sample, atol=1e-4, rtol=1e-4)


def test_the_pipeline_runs_in_one_step(diffusers: Any, make_sana: Any, autoencoder: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    student = to_sana_student(SanaField(make_sana()))
    with torch.no_grad():
        student.model.time_embed.interval.mlp[2].weight.normal_(std=0.5)
    folder = export_sana_pipeline(student, tmp_path / "deep" / "one-step", vae=autoencoder)
    assert [path.name for path in folder.parent.iterdir()] == ["one-step"], "nothing temporary is left"

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    latents, prompt, mask = torch.randn(2, 4, 16, 16), torch.randn(2, 6, 12), torch.ones(2, 6)
    given = {"prompt_embeds": prompt, "prompt_attention_mask": mask, "latents": latents, "height": 32, "width": 32}
    run = {"num_inference_steps": 1, "guidance_scale": 1.0, "use_resolution_binning": False, "prompt": None}
    found = pipeline(**given, **run, output_type="latent").images
    expected = sample_jumps(student, latents, prompt=prompt, prompt_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    pictures = pipeline(**given, **run, output_type="pt").images
    decoded = AutoencoderCodec(autoencoder).decode(expected)
    torch.testing.assert_close(pictures, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)
