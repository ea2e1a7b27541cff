"""Teachers from elsewhere, each through both stages in seconds: a file of one's own, diffusers, official weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from trainer_helpers import hdistill, save_official, write_latents, write_unet

import hd_zoo
from hd_trainer.networks import read_network

CPU = torch.device("cpu")

#: The digits recipe in two steps a stage; the discriminator looks at what the teacher has.
STAGES_ALONE = [
    *("digits", "--smoke", "--precision", "fp32", "--distribution.discriminator.layers"),
    *("--trajectory.steps", "2", "--distribution.steps", "2", "--trajectory.batch", "8", "--distribution.batch", "8"),
    *("--evaluation.samples", "10", "--evaluation.teacher-steps", "2", "--evaluation.timing-repeats", "1"),
]


def run_all(out: Path, teacher: object, data: object, *flags: object) -> Any:
    """Both stages, evaluation, report, and a picture; what the run printed."""
    answer = hdistill("run", *STAGES_ALONE, "--teacher", teacher, "--data", data, "--out", out, *flags)
    assert answer.code == 0, answer.err
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["distribution", "trajectory"]
    rows = json.loads((out / "evaluation.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["held-out data", "teacher", "trajectory", "distribution"]
    again = (("sample", out, "--count", "3", "--out", out / "a.png"), ("evaluate", out), ("report", out))
    for command in again:
        found = hdistill(*command)
        assert found.code == 0, found.err
    assert (out / "report.html").stat().st_size > 10_000
    return answer


# ---- a network in a file of one's own


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    """A file whose function ``teacher`` returns a U-Net that predicts noise, behind its converter."""
    return write_unet(tmp_path / "mine.py")


def test_a_unet_in_a_file_goes_the_whole_way(unet: Path, tmp_path: Path) -> None:
    answer = run_all(tmp_path / "run", f"{unet}:teacher", "digits")
    assert "r enters at the teacher's module time_mlp" in answer.out
    config = json.loads((tmp_path / "run/trajectory/config.json").read_text())
    assert config["function"] == f"{unet}:teacher"
    assert config["interval_at"] == ["time_mlp"]
    with pytest.raises(ValueError, match="not a model of this package"):
        hd_zoo.from_pretrained(tmp_path / "run/trajectory")
    noted = json.loads((tmp_path / "run/sources.json").read_text())["teacher"]
    assert noted["source"] == f"{unet}:teacher"
    layers = json.loads((tmp_path / "run/distribution/discriminator.json").read_text())["layers"]
    assert layers == ["network.downs.0", "network.mid", "network.ups.0"]


def test_a_student_of_a_function_is_read_as_it_was_written(unet: Path, tmp_path: Path) -> None:
    run_all(tmp_path / "run", f"{unet}:teacher", "digits")
    folder = tmp_path / "run/distribution"
    student, weights = read_network(folder, CPU), load_file(folder / "model.safetensors")
    assert student.takes_r
    assert not student.training
    assert all(not parameter.requires_grad for parameter in student.parameters())
    assert {name: value.shape for name, value in student.state_dict().items()} == {
        name: value.shape for name, value in weights.items()
    }
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    # It moved away from its teacher, and what it says depends on r.
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.9, 0.9]), torch.tensor([1, 2])
    one, other = (student(x, t, torch.full((2,), r), labels=labels) for r in (0.0, 0.8))
    assert not torch.equal(one, other)


def test_a_changed_file_is_said(unet: Path, tmp_path: Path) -> None:
    """A comment more: the weights still fit. Another network: they do not."""
    run_all(tmp_path / "run", f"{unet}:teacher", "digits")
    text = unet.read_text()
    unet.write_text(text + "# a remark\n")
    found = hdistill("sample", tmp_path / "run", "--count", "2", "--out", tmp_path / "a.png")
    assert found.code == 0
    assert "mine.py has changed since the network in" in found.err
    unet.write_text(text.replace("WIDTH = 8", "WIDTH = 16"))
    found = hdistill("sample", tmp_path / "run", "--count", "2", "--out", tmp_path / "a.png")
    assert found.code == 2
    assert "do not fit what" in found.err.splitlines()[-1]
    unet.unlink()
    found = hdistill("sample", tmp_path / "run", "--count", "2", "--out", tmp_path / "a.png")
    assert found.code == 2
    assert "there is no such file: put it back" in found.line


def test_a_run_with_a_teacher_goes_on_with_it_alone(unet: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ("run", *STAGES_ALONE, "--data", "digits", "--out", out)
    run_all(out, f"{unet}:teacher", "digits")
    weights = (out / "distribution/model.safetensors").read_bytes()
    assert "done already" in hdistill(*command, "--teacher", f"{unet}:teacher").out
    assert "with other settings (teacher_source: None here" in hdistill(*command).line
    other = write_unet(tmp_path / "other.py", seed=1)
    assert "was begun from another teacher" in hdistill(*command, "--teacher", f"{other}:teacher").line
    # The same network by another name is the same teacher.
    unet.rename(tmp_path / "renamed.py")
    assert hdistill(*command, "--teacher", tmp_path / "renamed.py").code == 0
    assert (out / "distribution/model.safetensors").read_bytes() == weights


def test_a_runs_recipe_runs_again_and_its_folder_is_a_teacher(unet: Path, tmp_path: Path) -> None:
    run_all(tmp_path / "run", f"{unet}:teacher", "digits")
    assert hdistill("run", tmp_path / "run/recipe.json", "--out", tmp_path / "again").code == 0
    assert hdistill("run", *STAGES_ALONE, "--teacher", tmp_path / "run", "--out", tmp_path / "third").code == 0
    one, two, three = (
        (tmp_path / name / "distribution/model.safetensors").read_bytes() for name in ("run", "again", "third")
    )
    assert one == two == three


def test_there_is_no_teacher_to_train_where_one_is_given(unet: Path, tmp_path: Path) -> None:
    found = hdistill("train", "teacher", *STAGES_ALONE, "--teacher", unet, "--out", tmp_path / "run")
    assert found.code == 2
    assert "there is none to train" in found.line
    assert not (tmp_path / "run").exists()


def test_what_is_trained_is_in_evaluation_mode(tmp_path: Path) -> None:
    """A U-Net with dropout: its student, its fake score and a second run are functions of the seed alone."""
    unet = write_unet(tmp_path / "mine.py", dropout=0.5)
    for name in ("one", "two"):
        torch.manual_seed(hash(name) % 1000)
        run_all(tmp_path / name, unet, "digits")
    one, two = ((tmp_path / name / "distribution/model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_without_classes_on_data_with_classes(tmp_path: Path) -> None:
    unet = write_unet(tmp_path / "mine.py", classes=0)
    refused = hdistill("run", *STAGES_ALONE, "--teacher", unet, "--out", tmp_path / "no")
    assert refused.code == 2
    assert "leave the labels out with the data's option labels=false" in refused.line
    run_all(tmp_path / "run", unet, "digits?labels=false")


# ---- official weights

SIZES = {"image_size": 8, "channels": 4, "width": 32, "depth": 2, "num_heads": 2, "classes": 3}


@pytest.mark.parametrize("name", ["sit_s_2", "dit_s_2", "lightningdit_b_2", "repa_xl_2"])
def test_official_weights_go_the_whole_way(name: str, tmp_path: Path) -> None:
    options = "&".join(f"{key}={value}" for key, value in SIZES.items())
    file = save_official(hd_zoo.create_model(name, **SIZES), tmp_path / f"{name}.pt")
    data = write_latents(tmp_path / "latents.py")
    run_all(tmp_path / "run", f"{name}:{file}?{options}", f"{data}:data", "--trajectory.guidance.scale", "1.5")
    student = hd_zoo.from_pretrained(tmp_path / "run/distribution")
    assert isinstance(student, hd_zoo.DiffusedNoise) == name.startswith("dit")
    noted = json.loads((tmp_path / "run/sources.json").read_text())["teacher"]
    assert noted["source"] == f"{name}:{file}?{options}"


# ---- diffusers


@pytest.fixture
def diffusers() -> Any:
    """The library; its own import warnings are no concern of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


def pipeline_folder(folder: Path, part: str, model: Any, scheduler: Any) -> Path:
    """A pipeline's folder as that library writes it."""
    model.save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "DiffusionPipeline", part: ["diffusers", type(model).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def randomised(model: nn.Module) -> nn.Module:
    """Every weight moved: nothing hides behind zeros."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def test_a_dit_pipeline_of_diffusers_goes_the_whole_way(diffusers: Any, tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "patch_size": 2}
    shape = {"in_channels": 4, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 3}
    model = randomised(diffusers.DiTTransformer2DModel(**sizes, **shape))
    folder = pipeline_folder(tmp_path / "pipeline", "transformer", model, diffusers.DDIMScheduler())
    data = write_latents(tmp_path / "latents.py")
    run_all(tmp_path / "run", folder, f"{data}:data", "--distribution.guidance.scale", "2")
    assert isinstance(hd_zoo.from_pretrained(tmp_path / "run/distribution"), hd_zoo.DiffusedNoise)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_unet_of_diffusers_goes_the_whole_way(diffusers: Any, prediction: str, tmp_path: Path) -> None:
    """A network's folder, and its scheduler's beside it."""
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = randomised(diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **sizes, **blocks))
    model.save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler(prediction_type=prediction).save_pretrained(tmp_path / "steps")
    run_all(tmp_path / "run", f"{tmp_path / 'unet'}?scheduler={tmp_path / 'steps'}", "digits?labels=false")
    layers = json.loads((tmp_path / "run/distribution/discriminator.json").read_text())["layers"]
    assert len(layers) == 4
    assert all("_block" in layer for layer in layers)


# ---- what there is


def test_list_layers_marks_the_defaults(unet: Path) -> None:
    answer = hdistill("list", "layers", f"{unet}:teacher")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("*")][:-1] == ["downs.0", "mid", "ups.0"]
    assert any(line.split() == ["stem", "Conv2d", "8x8x8"] for line in lines)


def test_list_models_has_a_line_for_each() -> None:
    answer = hdistill("list", "models")
    assert [line.split()[0] for line in answer.out.splitlines()] == hd_zoo.list_models()
    (line,) = (line for line in answer.out.splitlines() if line.split()[0] == "sit_xl_2")
    assert "official weights: SiT-XL/2, 256" in line
    network = hd_zoo.create_model("sit_xl_2", device="meta")
    assert f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2f} M" in line
