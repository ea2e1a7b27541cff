"""Students written as folders of diffusers: what those make in one step is what the student makes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hd_zoo
from hd_zoo import DiffusedNoise, EDMDenoiser, create_model, sample_jumps, seeded_noise, to_student
from hd_zoo.adapters import DiTNoise, SanaField, from_diffusers_dit
from hd_zoo.pipelines import export_pipeline, one_step, pipeline_kind


def shaken(student: nn.Module, std: float = 0.05) -> nn.Module:
    """The student with every weight moved at random, so that r, t and labels all matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return student.eval()


def ours(**settings: Any) -> nn.Module:
    """A small student of this package's transformer, in pixels."""
    return shaken(to_student(create_model("dit_nano_2", **{"classes": 10, **settings})), 0.1)


def noise_of(student: Any, count: int = 3) -> Tensor:
    return seeded_noise(student.sample_shape, range(count))


def loaded(diffusers: Any, folder: Path, **options: Any) -> Any:
    """The folder as a user loads it."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(folder), trust_remote_code=True, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


STUDENTS = {
    "pixels": lambda dit: ours(),
    "colour": lambda dit: ours(channels=3, image_size=16),
    "one class": lambda dit: ours(classes=0),
    "time scale": lambda dit: ours(time_scale=1000.0),
    "reversed time": lambda dit: ours(reversed_time=True),
    "SiT": lambda dit: shaken(
        to_student(create_model("sit_s_2", width=32, depth=2, num_heads=2, image_size=8, classes=10)), 0.1
    ),
    "learned variance": lambda dit: shaken(to_student(from_diffusers_dit(dit()))),
    "a diffusion, our network": lambda dit: shaken(to_student(DiffusedNoise(from_diffusers_dit(dit())))),
    "a diffusion, diffusers' network": lambda dit: shaken(to_student(DiffusedNoise(DiTNoise(dit())))),
    "v, no signal at the end": lambda dit: shaken(
        to_student(DiffusedNoise(DiTNoise(dit(out_channels=4)), prediction="v", zero_terminal_snr=True))
    ),
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_pipeline_makes_the_students_samples(diffusers: Any, make_dit: Any, kind: str, tmp_path: Path) -> None:
    student: Any = STUDENTS[kind](make_dit)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    folder = export_pipeline(student, tmp_path / "new" / "pipeline")
    assert os.listdir(tmp_path / "new") == ["pipeline"], "the temporary name is gone"
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    pipeline = loaded(diffusers, folder)
    noise, labels = noise_of(student), [1, 0, 9] if student.classes else [0, 0, 0]
    cond = {"labels": torch.tensor(labels)} if student.classes else {}
    expected = sample_jumps(student, noise, **cond)
    found = pipeline(class_labels=labels, latents=noise, output_type="latent").images
    torch.testing.assert_close(found, expected, atol=2e-4 * float(expected.std()), rtol=1e-4)
    # What the test would not see if the interval, the labels or the noise had no effect:
    assert (sample_jumps(student, noise, (1.0, 0.5, 0.0), **cond) - expected).abs().max() > 1e-2 * expected.std()
    if student.classes:
        assert (
            sample_jumps(student, noise, labels=torch.tensor([2, 3, 4])) - expected
        ).abs().max() > 1e-2 * expected.std()


def test_pictures_of_pixels(diffusers: Any, tmp_path: Path) -> None:
    student: Any = ours(channels=3, image_size=16)
    pipeline = loaded(diffusers, export_pipeline(student, tmp_path / "pipeline"))
    noise = noise_of(student, 2)
    expected = (sample_jumps(student, noise, labels=torch.tensor([3, 7])) / 2 + 0.5).clamp(0, 1)
    tensors = pipeline(class_labels=[3, 7], latents=noise, output_type="pt").images
    torch.testing.assert_close(tensors, expected, atol=1e-4, rtol=1e-4)
    pictures = pipeline(class_labels=[3, 7], latents=noise).images
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    drawn = [
        pipeline(class_labels=[1], generator=torch.Generator().manual_seed(s), output_type="pt") for s in (0, 0, 1)
    ]
    assert torch.equal(drawn[0].images, drawn[1].images)
    assert not torch.equal(drawn[0].images, drawn[2].images)


def test_latents_are_decoded_by_the_vae(diffusers: Any, make_dit: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4).eval()
    student: Any = STUDENTS["a diffusion, diffusers' network"](make_dit)
    noise, labels = noise_of(student, 2), torch.tensor([3, 7])
    whole = export_pipeline(student, tmp_path / "whole", vae=vae)
    with torch.no_grad():
        latents = sample_jumps(student, noise, labels=labels)
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    found = loaded(diffusers, whole)(class_labels=[3, 7], latents=noise, output_type="pt").images
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    bare = loaded(diffusers, export_pipeline(student, tmp_path / "bare"))
    with pytest.raises(ValueError, match="give the pipeline a vae, or output_type='latent'"):
        bare(class_labels=[3, 7], latents=noise)


def test_the_transformer_alone_is_diffusers_own(diffusers: Any, tmp_path: Path) -> None:
    folder = export_pipeline(ours(), tmp_path / "pipeline")
    model = diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    assert model.config.num_embeds_ada_norm == 10
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == [None, None]
    assert (folder / "pipeline.py").is_file()


@pytest.mark.parametrize("kind", ["to_student", "to_sana_student"])
def test_a_student_of_sana_by_either_way(
    diffusers: Any, make_sana: Any, trained: Any, kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    student: Any = trained() if kind == "to_sana_student" else shaken(to_student(SanaField(make_sana())))
    assert pipeline_kind(student) == "sana"
    folder = export_pipeline(student, tmp_path / "pipeline")
    parts = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    noise, prompt, mask = noise_of(student), torch.randn(3, 6, 12), torch.ones(3, 6)
    found = pipeline(
        prompt=None,
        latents=noise,
        prompt_embeds=prompt,
        prompt_attention_mask=mask,
        output_type="latent",
        num_inference_steps=1,
        guidance_scale=1.0,
        use_resolution_binning=False,
        height=32,
        width=32,
    ).images
    expected = sample_jumps(student, noise, prompt=prompt, prompt_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        ones = torch.ones(3)
        gap = student(noise, ones, ones, prompt=prompt) - student(noise, ones, 0 * ones, prompt=prompt)
    assert gap.abs().max() > 1e-3


def test_what_has_no_pipeline_is_refused(diffusers: Any, make_dit: Any, tmp_path: Path) -> None:
    for student, message in (
        (create_model("dit_nano_2", classes=10), "a student is needed"),
        (to_student(create_model("mlp_2d")), "no pipeline is known for a MLPField"),
        (to_student(create_model("dit_nano_2", classes=10), "decoupled"), "r_embedding must be 'added' or None"),
        (to_student(create_model("dit_nano_2", classes=10, qk_norm="rms")), "qk_norm must be None"),
        (to_student(create_model("dit_nano_2", classes=10, mlp_ratio=2.0)), "mlp_ratio must be 4.0"),
    ):
        with pytest.raises(ValueError, match=message):
            export_pipeline(student, tmp_path / "pipeline")
        assert not (tmp_path / "pipeline").exists()
    (tmp_path / "pipeline").mkdir()
    with pytest.raises(ValueError, match="exists; choose another name"):
        export_pipeline(ours(), tmp_path / "pipeline")


def test_a_network_that_does_not_fold_is_found_out(
    diffusers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that a slip would put into the wrong place never reach a folder."""
    from hd_zoo.pipelines import export

    right = export.to_diffusers_dit

    def wrong(*arguments: Any) -> Any:
        model: Any = right(*arguments)
        with torch.no_grad():
            model.transformer_blocks[0].norm1.linear.bias.add_(0.1)
        return model

    monkeypatch.setattr(export, "to_diffusers_dit", wrong)
    with pytest.raises(ValueError, match="does not fold into one of diffusers: samples differ"):
        export_pipeline(ours(), tmp_path / "pipeline")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["plain", "diffused", "edm", "v"])
def test_one_step_is_the_samplers_step(name: str) -> None:
    """Without diffusers: the factors and times found by the probe, put together by hand."""
    network: Any = create_model("dit_nano_2", classes=10)
    wrap = {
        "plain": lambda inner: inner,
        "diffused": DiffusedNoise,
        "edm": EDMDenoiser,
        "v": lambda inner: DiffusedNoise(inner, prediction="v", schedule="squaredcos_cap_v2"),
    }[name]
    student: Any = shaken(to_student(wrap(network)), 0.1).double()
    form = one_step(student)
    noise, labels = noise_of(student, 4).double(), torch.arange(4)
    times = [torch.full((4,), one, dtype=torch.float64) for one in (form.t, form.r)]
    with torch.no_grad():
        answer = form.network(form.input_scale * noise, *times, labels=labels)
    found = form.skip * noise - form.scale * answer
    torch.testing.assert_close(found, sample_jumps(student, noise, labels=labels), atol=1e-8, rtol=1e-8)
    if name == "plain":
        assert (form.skip, form.scale, form.input_scale, form.t, form.r) == (1.0, 1.0, 1.0, 1.0, 0.0)


def test_the_kind_is_known_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert pipeline_kind(DiffusedNoise(create_model("dit_nano_2"))) == "dit"
    assert pipeline_kind(create_model("mlp_2d")) is None
    with pytest.raises(ModuleNotFoundError):
        export_pipeline(ours(), "nowhere")
    assert not Path("nowhere").exists()
    assert hd_zoo.pipelines.OneStep.__dataclass_params__.frozen  # type: ignore[attr-defined]
