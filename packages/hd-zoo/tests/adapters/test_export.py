"""A two-time student of Sana folded into a plain network, and written for diffusers' own pipeline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hd_zoo import sample_jumps
from hd_zoo.adapters import AutoencoderCodec, SanaField, export_sana_pipeline, to_sana_student
from hd_zoo.adapters.sana import fold_interval

#: One step on latents of any size.
ONE_STEP: dict[str, Any] = {
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "use_resolution_binning": False,
    "height": 32,
    "width": 32,
}
NO_PARTS = {"vae": None, "text_encoder": None, "tokenizer": None}


@pytest.fixture
def pipelines(diffusers: Any) -> Any:
    """diffusers, where its pipelines can be imported."""
    pytest.importorskip("transformers")
    return diffusers


@pytest.fixture
def text_parts(pipelines: Any) -> dict[str, Any]:
    """A tokenizer of three words and a Gemma of one layer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "<bos>", "<unk>", "a", "red", "cube"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
    sizes = {"vocab_size": 6, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    encoder = transformers.Gemma2Model(transformers.Gemma2Config(**sizes, **heads, **tokens)).eval()
    return {
        "tokenizer": transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        "text_encoder": encoder,
    }


@torch.no_grad()
def jump(student: SanaField, x: Tensor, **cond: Tensor) -> Tensor:
    """x - u(x, 1, 0)."""
    ones = x.new_ones(x.shape[0])
    return x - student(x, ones, torch.zeros_like(ones), **cond)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("settings", [{}, {"timestep_scale": 0.001}, {"patch_size": 2}])
@pytest.mark.parametrize("guided", [False, True])
def test_folding_keeps_the_one_step_jump(trained: Any, guided: bool, settings: dict[str, Any]) -> None:
    student = trained(guidance_embeds=guided, **settings).train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    x, cond = torch.randn(3, 4, 8, 8), {"prompt": torch.randn(3, 6, 12)}
    if guided:
        cond["guidance"] = torch.full((3,), 4.5)
    folded = fold_interval(student)
    plain = SanaField(folded)
    assert plain.takes_r is False
    assert not folded.training
    torch.testing.assert_close(jump(plain, x, **cond), jump(student, x, **cond), atol=1e-5, rtol=1e-5)
    ones = torch.ones(3)
    with torch.no_grad():
        assert (student(x, ones, ones, **cond) - student(x, ones, 0 * ones, **cond)).abs().max() > 1e-3
    assert student.training
    assert student.takes_r
    assert student.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_folding_keeps_the_dtype(trained: Any) -> None:
    folded = fold_interval(trained().bfloat16())
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_the_pipeline_runs_the_jump_on_given_embeddings(
    pipelines: Any, trained: Any, scale: float, tmp_path: Path
) -> None:
    student = trained(timestep_scale=scale)
    folder = export_sana_pipeline(student, str(tmp_path / "new" / "pipeline"))
    assert folder == tmp_path / "new" / "pipeline"
    assert os.listdir(tmp_path / "new") == ["pipeline"], "the temporary name is gone"
    pipeline = quiet(pipelines.DiffusionPipeline.from_pretrained(folder, **NO_PARTS))
    assert type(pipeline) is pipelines.SanaPipeline
    x, prompt, mask = torch.randn(3, 4, 8, 8), torch.randn(3, 6, 12), torch.ones(3, 6)
    mask[0, 2:] = 0
    given = {"prompt_embeds": prompt, "prompt_attention_mask": mask}
    found = pipeline(prompt=None, latents=x, output_type="latent", **given, **ONE_STEP).images
    torch.testing.assert_close(found, jump(student, x, prompt=prompt, prompt_mask=mask), atol=1e-5, rtol=1e-5)


def test_a_complete_pipeline_makes_pictures_of_text(
    pipelines: Any, trained: Any, make_dc: Any, text_parts: dict[str, Any], tmp_path: Path
) -> None:
    """As the docstring has it: nothing but the folder, and a prompt."""
    student, autoencoder = trained(), make_dc()
    folder = export_sana_pipeline(student, tmp_path / "pipeline", vae=autoencoder, **text_parts)
    pipeline = quiet(pipelines.DiffusionPipeline.from_pretrained(folder))
    x, text = torch.randn(1, 4, 8, 8), {"max_sequence_length": 8, "complex_human_instruction": None}
    prompt, mask, *_ = pipeline.encode_prompt("a red cube", False, **text)
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    latents = pipeline("a red cube", latents=x, output_type="latent", **text, **ONE_STEP).images
    torch.testing.assert_close(latents, jump(student, x, prompt=prompt, prompt_mask=mask), atol=1e-5, rtol=1e-5)
    images = pipeline("a red cube", latents=x, output_type="pt", **text, **ONE_STEP).images
    decoded = AutoencoderCodec(autoencoder).decode(latents)
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_a_teacher_is_refused(pipelines: Any, make_sana: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a student of to_sana_student is needed"):
        export_sana_pipeline(SanaField(make_sana()), tmp_path / "new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_nothing_is_overwritten(pipelines: Any, trained: Any, kind: str, tmp_path: Path) -> None:
    old = tmp_path / "old"
    if kind == "folder":
        old.mkdir()
        (old / "kept.txt").write_text("kept")
    else:
        old.write_text("kept")
    with pytest.raises(ValueError, match="old exists; choose another name or remove it"):
        export_sana_pipeline(trained(), old)
    assert os.listdir(tmp_path) == ["old"]
    assert (old / "kept.txt" if kind == "folder" else old).read_text() == "kept"


def test_a_failed_write_leaves_nothing(
    pipelines: Any, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = pipelines.SanaPipeline.save_pretrained

    def fail(self: Any, folder: str, **options: Any) -> None:
        save(self, folder, **options)
        raise OSError("no space left")

    monkeypatch.setattr(pipelines.SanaPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        export_sana_pipeline(trained(), tmp_path / "new")
    assert os.listdir(tmp_path) == []


def test_unknown_components_are_refused_before_anything_is_written(
    pipelines: Any, trained: Any, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="unet"):
        export_sana_pipeline(trained(), tmp_path / "new", unet=None)
    assert os.listdir(tmp_path) == []


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
