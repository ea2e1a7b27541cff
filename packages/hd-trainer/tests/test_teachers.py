"""Teachers from elsewhere, each through both stages in seconds: a file of one's own, diffusers, official weights."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from trainer_helpers import contents, hdistill, save_official, write_latents, write_unet

import hd_zoo
from hd_trainer.networks import is_student, read_network

#: Each case is a whole run.
pytestmark = pytest.mark.slow

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with such a file, ``mine.py``, and a finished ``run`` of it; shared, so nothing in it is changed."""
    folder = tmp_path_factory.mktemp("unet")
    answer = run_all(folder / "run", f"{write_unet(folder / 'mine.py')}:teacher", "digits")
    assert "r enters at the teacher's module time_mlp" in answer.out
    return folder


@pytest.mark.slow
def test_a_unet_in_a_file_goes_the_whole_way(finished: Path) -> None:
    teacher = f"{finished / 'mine.py'}:teacher"
    config = json.loads((finished / "run/trajectory/config.json").read_text())
    assert (config["function"], config["interval_at"]) == (teacher, ["time_mlp"])
    with pytest.raises(ValueError, match="not a model of this package"):
        hd_zoo.from_pretrained(finished / "run/trajectory")
    assert json.loads((finished / "run/sources.json").read_text())["teacher"]["source"] == teacher
    layers = json.loads((finished / "run/distribution/discriminator.json").read_text())["layers"]
    assert layers == ["network.downs.0", "network.mid", "network.ups.0"]
    assert f"--teacher {teacher}" in (finished / "run/report.html").read_text()


@pytest.mark.slow
def test_a_student_of_a_function_is_read_as_it_was_written(finished: Path) -> None:
    folder = finished / "run/distribution"
    student, weights = read_network(folder, CPU), load_file(folder / "model.safetensors")
    assert is_student(student)
    assert not student.training
    assert all(not parameter.requires_grad for parameter in student.parameters())
    assert student.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    # What it says depends on r: the embedding of (t - r) was trained.
    x, t, labels = torch.ones(2, 1, 8, 8), torch.tensor([0.9, 0.9]), torch.tensor([1, 2])
    one, other = (student(x, t, torch.full((2,), r), labels=labels) for r in (0.0, 0.8))
    assert not torch.equal(one, other)


@pytest.mark.slow
def test_a_changed_file_is_said(finished: Path, tmp_path: Path) -> None:
    """A remark more: the weights still fit. Another network: they do not. No file: there is no network."""
    folder = shutil.copytree(finished / "run/distribution", tmp_path / "distribution")
    text, config = (finished / "mine.py").read_text(), json.loads((folder / "config.json").read_text())
    file = tmp_path / "mine.py"
    (folder / "config.json").write_text(json.dumps({**config, "function": f"{file}:teacher"}))
    sample = ("sample", folder, "--count", "2", "--out", tmp_path / "a.png")
    file.write_text(text)
    assert not hdistill(*sample).err
    file.write_text(text + "# a remark\n")
    found = hdistill(*sample)
    assert (found.code, found.err.count("mine.py has changed since")) == (0, 1)
    file.write_text(text.replace("WIDTH = 8", "WIDTH = 16"))
    found = hdistill(*sample)
    assert found.code == 2
    assert "do not fit what" in found.err.splitlines()[-1]
    file.unlink()
    found = hdistill(*sample)
    assert (found.code, "there is no such file: put it back" in found.line) == (2, True)


@pytest.mark.slow
def test_a_run_with_a_teacher_goes_on_with_it_alone(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished / "run", out)
    command = ("train", "distribution", *STAGES_ALONE, "--data", "digits", "--out", out)
    before = contents(out)
    assert "done already" in hdistill(*command, "--teacher", f"{finished / 'mine.py'}:teacher").out
    # The same network in another place is the same teacher, another one is not.
    same, other = write_unet(tmp_path / "same.py"), write_unet(tmp_path / "other.py", seed=1)
    assert "done already" in hdistill(*command, "--teacher", same).out
    (out / "recipe.json").write_bytes(before["recipe.json"])
    assert contents(out) == before
    assert "was begun from another teacher" in hdistill(*command, "--teacher", other).line
    no_teacher = ("train", "trajectory", *STAGES_ALONE, "--data", "digits", "--out", out)
    assert "no config.json in" in hdistill(*no_teacher).line
    assert "with other settings (teacher_source: None here" in hdistill("run", *no_teacher[2:]).line
    assert contents(out) == before


@pytest.mark.slow
def test_a_runs_recipe_runs_again_and_its_folder_is_a_teacher(finished: Path, tmp_path: Path) -> None:
    for command in (("trajectory", finished / "run/recipe.json"), ("trajectory", *STAGES_ALONE)):
        out = tmp_path / str(len(command))
        teacher = ("--teacher", finished / "run") if len(command) > 2 else ()
        answer = hdistill("train", *command, *teacher, "--out", out)
        assert answer.code == 0, answer.err
        weights = [(folder / "trajectory/model.safetensors").read_bytes() for folder in (out, finished / "run")]
        assert weights[0] == weights[1]


def test_there_is_no_teacher_to_train_where_one_is_given(unet: Path, tmp_path: Path) -> None:
    found = hdistill("train", "teacher", *STAGES_ALONE, "--teacher", unet, "--out", tmp_path / "run")
    assert found.code == 2
    assert "there is none to train" in found.line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_network_with_dropout_is_trained_without_it(tmp_path: Path) -> None:
    """Student and fake score are functions of the seed alone, whatever the global generator has drawn before."""
    unet = write_unet(tmp_path / "mine.py", dropout=0.5)
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        out = tmp_path / str(seed)
        for stage in ("trajectory", "distribution"):
            answer = hdistill("train", stage, *STAGES_ALONE, "--teacher", unet, "--out", out)
            assert answer.code == 0, answer.err
        weights.append((out / "distribution/model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_without_classes_on_data_with_classes(tmp_path: Path) -> None:
    unet = write_unet(tmp_path / "mine.py", classes=0)
    command = ("train", "trajectory", *STAGES_ALONE, "--teacher", unet, "--out", tmp_path / "run")
    refused = hdistill(*command)
    assert refused.code == 2
    assert "leave the labels out with the data's option labels=false" in refused.line
    assert not (tmp_path / "run").exists()
    assert hdistill(*command, "--data", "digits?labels=false").code == 0


PROMPTED = """
import torch
from torch import nn

from hd_trainer.data import Dataset, InMemory


class Prompted(nn.Module):
    sample_shape, classes, null_label, takes_r = (1, 4, 4), 0, None, False

    def __init__(self):
        super().__init__()
        self.time_embed = nn.Linear(1, 8)
        self.text = nn.Linear(5, 8)
        self.blocks = nn.ModuleList([nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)])

    def forward(self, x, t, *, prompt):
        c = self.time_embed(t[:, None]) + self.text(prompt.mean(dim=1))
        return self.blocks[1](self.blocks[0](x) + c[:, :, None, None])


def teacher():
    return Prompted()


def data():
    generator = torch.Generator().manual_seed(0)
    x, prompt = torch.rand(24, 1, 4, 4, generator=generator), torch.randn(24, 3, 5, generator=generator)
    parts = [InMemory(x=x[part], conditions={"prompt": prompt[part]}) for part in (slice(0, 12), slice(12, 24))]
    return Dataset(name="texts", train=parts[0], held_out=parts[1], null={"prompt": torch.zeros(3, 5)})
"""


@pytest.mark.slow
def test_conditions_of_any_name_reach_the_teacher(tmp_path: Path) -> None:
    """Embeddings of a text, which the data has: the stages, evaluation and report pass them on by their name."""
    file = tmp_path / "mine.py"
    file.write_text(PROMPTED)
    source = ("--teacher", f"{file}:teacher", "--data", f"{file}:data", "--trajectory.guidance.scale", "2")
    answer = hdistill("run", *STAGES_ALONE, *source, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    # No command line says a text.
    answer = hdistill("sample", tmp_path / "run", "--out", tmp_path / "a.png")
    assert (answer.code, "is not sampled by labels alone" in answer.line) == (2, True)
    refused = hdistill("run", *STAGES_ALONE, "--teacher", source[1], "--data", "digits", "--out", tmp_path / "no")
    assert refused.code == 2
    layers = hdistill("list", "layers", source[1])
    assert (layers.code, "with --data it is given the data's conditions" in layers.line) == (2, True)
    assert "* blocks.0 " in hdistill("list", "layers", source[1], "--data", source[3]).out


# ---- official weights

SIZES = {"image_size": 8, "channels": 4, "width": 32, "depth": 2, "num_heads": 2, "classes": 3}


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_dit_pipeline_of_diffusers_goes_the_whole_way(diffusers: Any, tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "patch_size": 2}
    shape = {"in_channels": 4, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 3}
    model = randomised(diffusers.DiTTransformer2DModel(**sizes, **shape))
    folder = pipeline_folder(tmp_path / "pipeline", "transformer", model, diffusers.DDIMScheduler())
    data = write_latents(tmp_path / "latents.py")
    run_all(tmp_path / "run", folder, f"{data}:data", "--distribution.guidance.scale", "2")
    assert isinstance(hd_zoo.from_pretrained(tmp_path / "run/distribution"), hd_zoo.DiffusedNoise)


@pytest.mark.slow
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


@pytest.mark.slow
def test_list_models_has_a_line_for_each() -> None:
    answer = hdistill("list", "models")
    assert [line.split()[0] for line in answer.out.splitlines()] == hd_zoo.list_models()
    (line,) = (line for line in answer.out.splitlines() if line.split()[0] == "sit_xl_2")
    assert "official weights: SiT-XL/2, 256" in line
    network = hd_zoo.create_model("sit_xl_2", device="meta")
    assert f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2f} M" in line
