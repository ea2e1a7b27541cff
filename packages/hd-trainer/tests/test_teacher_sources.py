"""What a person can get wrong after ``--teacher``: one line, exit code 2, nothing written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from trainer_helpers import hdistill, save_official, write_latents, write_unet

import hd_zoo
from hd_trainer import Settings, UserError
from hd_trainer.context import Context
from hd_trainer.data import grid_conditions, load_data
from hd_trainer.networks import (
    GuidanceSettings,
    check_student,
    guided,
    load_teacher,
    make_student,
    read_network,
    resolve,
    source_digest,
)
from hd_trainer.stages.discriminator import DiscriminatorSettings, check_layers, tap_layers
from hd_trainer.user_code import load_function

CPU = torch.device("cpu")


def own_file(folder: Path, body: str) -> str:
    """A file of a person's own, whose function ``teacher`` is this code, as a source."""
    path = folder / "mine.py"
    path.write_text(f"import torch\nfrom torch import nn\n\n{body}\n")
    return f"{path}:teacher"


def own_field(folder: Path, answer: str = "0 * x", **facts: Any) -> str:
    """A field that says ``facts`` of itself and answers with an expression of x and t."""
    known: dict[str, Any] = {"sample_shape": (1, 8, 8), "classes": 10, "null_label": 10, "takes_r": False}
    said = "\n".join(f"    {name} = {value!r}" for name, value in {**known, **facts}.items() if value != "left out")
    return own_file(
        folder,
        f"class Mine(nn.Module):\n{said}\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.time_embed = nn.Linear(1, 4)\n"
        "        self.blocks = nn.ModuleList([nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)])\n"
        "    def forward(self, x, t, labels=None):\n"
        "        c = self.time_embed(t[:, None])\n"
        "        for block in self.blocks:\n            x = block(x) + c.mean()\n"
        f"        return {answer}\n\n"
        "def teacher():\n    torch.manual_seed(0)\n    return Mine()\n",
    )


def student_folder(folder: Path) -> str:
    return str(hd_zoo.save_pretrained(hd_zoo.create_model("dit_nano_2", classes=10, r_embedding="added"), folder / "a"))


def zoo_folder(folder: Path, name: str = "dit_nano_2", **settings: Any) -> str:
    return str(hd_zoo.save_pretrained(hd_zoo.create_model(name, **{"classes": 10, **settings}), folder / "a"))


def empty_folder(folder: Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


def foreign_folder(folder: Path) -> str:
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    return str(folder)


def official_file(folder: Path, options: str = "", name: str = "sit_s_2") -> str:
    sizes = {"image_size": 8, "channels": 1, "width": 32, "depth": 1, "num_heads": 2, "classes": 10}
    file = save_official(hd_zoo.create_model("sit_s_2", **sizes), folder / "a.pt")
    return f"{name}:{file}{options}"


SMALL = "?image_size=8&channels=1&width=32&depth=1&num_heads=2"

WRONG: dict[str, tuple[Callable[[Path], str], str]] = {
    "nothing there": (lambda _: "nowhere", "no network 'nowhere': there is no such folder. A teacher is one of"),
    "an empty folder": (empty_folder, "no config.json in"),
    "another shape": (lambda f: zoo_folder(f, "dit_micro_4"), "is for samples (1, 28, 28) of 10 classes, the data set"),
    "other classes": (lambda f: zoo_folder(f, classes=3), "is for samples (1, 8, 8) of 3 classes, the data set"),
    "no classes": (lambda f: zoo_folder(f, classes=0), "leave the labels out with the data's option labels=false"),
    "a student": (student_folder, "is a student (it takes r): a teacher is what it was distilled from"),
    "a file that is not there": (lambda f: f"{f / 'no.py'}:teacher", "no file"),
    "a file that raises": (lambda f: own_file(f, "raise OSError('no disk')"), "cannot be imported: OSError: no disk"),
    "a file that exits": (lambda f: own_file(f, "raise SystemExit(3)"), "cannot be imported: SystemExit: 3"),
    "a file without it": (lambda f: own_file(f, "def other():\n    return 1"), "has no function 'teacher'"),
    "a function that raises": (lambda f: own_file(f, "def teacher():\n    return 1 / 0"), "raised ZeroDivisionError"),
    "a number": (lambda f: own_file(f, "def teacher():\n    return 7"), "Module; got int"),
    "a class": (lambda f: own_file(f, "def teacher():\n    return nn.Linear"), "Module; got type"),
    "a function that wants arguments": (lambda f: own_file(f, "def teacher(x):\n    return x"), "raised TypeError"),
    "no time": (lambda f: own_file(f, "def teacher():\n    return nn.Linear(2, 2)"), "Linear has no sample_shape"),
    "no takes_r": (lambda f: own_field(f, takes_r="left out"), "Mine has no takes_r (False for a network of t alone"),
    "another answer": (lambda f: own_field(f, "x.flatten(1)"), "must return a velocity of x's shape"),
    "no tensor": (lambda f: own_field(f, "(x, x)"), "must return a tensor; got tuple"),
    "NaN": (lambda f: own_field(f, "x * float('nan')"), "returns NaN or infinity"),
    "noise of its own": (lambda f: own_field(f, "x + torch.randn_like(x)"), "a function of its arguments alone"),
    "in half precision": (
        lambda f: own_file(f, f"{Path(own_field(f).partition(':')[0]).read_text()}\n_t = teacher\n"
                           "def teacher():\n    return _t().half()"),
        "fails when called with",
    ),
    "a name that is not known": (lambda f: official_file(f, SMALL, "sit_s_3"), "unknown model 'sit_s_3' (did you mean"),
    "a name without official weights": (lambda f: official_file(f, name="dit_nano_2"), "that of a published network"),
    "a file of other sizes": (lambda f: official_file(f, ""), "these are not the weights of this network"),
    "an option twice": (lambda f: official_file(f, SMALL + "&depth=1"), "option depth needs one value"),
    "an unknown option": (lambda f: official_file(f, SMALL + "&widht=3"), "unknown argument 'widht'"),
    "an official file that is not there": (lambda f: f"sit_xl_2:{f / 'no.pt'}", "no.pt"),
    "published students": (
        lambda f: official_file(f, SMALL + "&r_embedding=added", "sit_s_2"),
        "these are not the weights of this network: missing interval_embed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_teacher_is_one_line_and_writes_nothing(case: str, tmp_path: Path) -> None:
    make, message = WRONG[case]
    source = make(tmp_path)
    layers = "--distribution.discriminator.layers"
    answer = hdistill("run", "digits", "--smoke", layers, "--teacher", source, "--out", tmp_path / "out")
    assert answer.code == 2
    assert message in answer.line
    assert not (tmp_path / "out").exists()


def test_folders_of_diffusers_without_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = ("run", "digits", "--smoke", "--out", tmp_path / "out", "--teacher")
    answer = hdistill(*run, foreign_folder(tmp_path))
    assert (answer.code, "is of a FluxTransformer2DModel; those that convert are" in answer.line) == (2, True)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    assert "no scheduler_config.json in" in hdistill(*run, tmp_path).line
    assert "unknown option 'schedule'; known: scheduler, subfolder" in hdistill(*run, f"{tmp_path}?schedule=1").line
    answer = hdistill(*run, "nobody/no-such-network")
    assert answer.code == 2
    assert "there is no such folder, and as an id of the hub it fails with" in answer.line
    assert not (tmp_path / "out").exists()


def test_two_flags_for_one_teacher(tmp_path: Path) -> None:
    answer = hdistill("run", "digits", "--teacher", "a", "--teacher-weights", "b", "--out", tmp_path / "out")
    assert (answer.code, "give one of them" in answer.line) == (2, True)


def test_layers_of_the_recipes_own_network(tmp_path: Path) -> None:
    """The digits recipe names blocks of its transformer: another network lacks them, and the line says what to do."""
    unet = write_unet(tmp_path / "mine.py")
    answer = hdistill("run", "digits", "--smoke", "--teacher", unet, "--out", tmp_path / "out")
    assert answer.code == 2
    assert "no module 'network.blocks.1'" in answer.line
    assert "give --distribution.discriminator.layers without a name for evenly spaced blocks" in answer.line


# ---- where a source is


def test_a_source_is_known_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    assert resolve("mine.py:teacher") == f"{tmp_path}/mine.py:teacher"
    assert resolve("sit_xl_2:a/b.pt?depth=2") == f"sit_xl_2:{tmp_path}/a/b.pt?depth=2"
    assert resolve("mine?subfolder=unet") == f"{tmp_path}/mine?subfolder=unet"
    assert resolve("owner/name") == "owner/name"


def test_the_hash_of_a_source_is_that_of_its_weights(tmp_path: Path) -> None:
    """Another file with the same network has it too; another weight or another schedule has not."""
    sources = {
        "one": write_unet(tmp_path / "one.py"),
        "same": write_unet(tmp_path / "same.py"),
        "seed": write_unet(tmp_path / "seed.py", seed=1),
        "schedule": write_unet(tmp_path / "schedule.py"),
    }
    sources["schedule"].write_text(sources["one"].read_text().replace("1000, schedule", "500, schedule"))
    hashes = {name: source_digest(f"{path}:teacher") for name, path in sources.items()}
    assert hashes["one"] == hashes["same"]
    assert len(set(hashes.values())) == 3


def test_what_lies_beside_a_file_can_be_imported(tmp_path: Path) -> None:
    """As with ``python file.py``; and its classes know their module, which dataclasses look up."""
    (tmp_path / "beside_the_teacher.py").write_text("WIDTH = 3\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport beside_the_teacher\n\n"
        "@dataclass\nclass Sizes:\n    width: int = beside_the_teacher.WIDTH\n\n"
        "def teacher():\n    return Sizes()\n"
    )
    assert load_function(f"{file}:teacher", default="teacher")().width == 3


# ---- students, layers, guidance


class Net(nn.Module):
    """A field of vectors-as-images with chosen names for its parts."""

    sample_shape, classes, null_label, takes_r = (1, 8, 8), 10, None, False

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        for part in self.children():
            x = x + part(t[:, None]).mean(dim=1)[:, None, None, None]
        return x


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 4), nn.SiLU(), nn.Linear(4, 4))


def test_r_enters_at_the_usual_name_or_where_it_is_said() -> None:
    x, t, r = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.9]), torch.tensor([0.1, 0.2])
    for parts, at, expected in (
        ({"t_embedder": mlp(), "time_embed": mlp()}, (), "time_embed"),
        ({"t_embedder": mlp(), "clock": mlp()}, ("clock",), "clock"),
    ):
        teacher = Net(**parts).requires_grad_(False)
        student = make_student(teacher, 3, at)
        assert list(student.at) == [expected]
        assert torch.equal(student(x, t, r), teacher(x, t))
        assert all(parameter.requires_grad for parameter in student.parameters())
        behind = make_student(hd_zoo.NoisePrediction(teacher), 3, at)
        assert list(behind.network.at) == [expected]


def test_a_student_that_cannot_be_guessed() -> None:
    with pytest.raises(
        UserError, match=r"name the module of this Net .*--trajectory\.interval-at; its modules are clock"
    ):
        make_student(Net(clock=mlp()), 0)
    with pytest.raises(UserError, match=r"several modules are called time_mlp \(a\.time_mlp, b\.time_mlp\)"):
        make_student(Net(a=Net(time_mlp=mlp()), b=Net(time_mlp=mlp())), 0)
    with pytest.raises(
        UserError, match=r"trajectory\.interval_at: at: the network has no module 'clok'; nearest: clock"
    ):
        make_student(Net(clock=mlp()), 0, ("clok",))


class Rounded(Net):
    """No forward derivative: the answer carries no tangent."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x, t, labels).detach()


def test_a_teacher_of_which_no_student_can_be_trained_is_refused_at_the_door(context: Context) -> None:
    teacher = Rounded(time_mlp=mlp()).requires_grad_(False)
    with pytest.raises(UserError, match=r"--trajectory\.meanflow\.derivative\): the field's output carries no tangent"):
        check_student(teacher, context, (), "jvp")
    check_student(teacher, context, (), "difference")


def test_layers_are_evenly_spaced_blocks_unless_named(context: Context) -> None:
    teacher = hd_zoo.create_model("dit_nano_2", classes=10, depth=8, width=16).requires_grad_(False)
    default = tap_layers(DiscriminatorSettings(), teacher)
    assert default.names == ("blocks.1", "blocks.3", "blocks.5", "blocks.7")
    behind = tap_layers(DiscriminatorSettings(), hd_zoo.DiffusedNoise(teacher))
    assert behind.names == tuple(f"network.{name}" for name in default.names)
    assert tap_layers(DiscriminatorSettings(layers=("blocks.2",)), teacher).names == ("blocks.2",)
    with pytest.raises(UserError, match=r"discriminator\.layers: found no repeated blocks in this Net"):
        tap_layers(DiscriminatorSettings(), Net(stem=nn.Linear(1, 4)))


def test_layers_that_do_not_see_the_samples_are_refused(context: Context) -> None:
    """Of a network without repeated blocks the only list of like modules may be its time embedding."""
    with pytest.raises(UserError, match=r"time_mlp\.0 puts out the same for two different samples; name other modules"):
        check_layers(DiscriminatorSettings(), context, Net(time_mlp=mlp()))
    idle: Any = hd_zoo.create_model("dit_nano_2", classes=10, depth=1, width=16)
    idle.time_embed.add_module("sinusoids", nn.Identity())
    with pytest.raises(UserError, match=r"discriminator\.layers: module 'time_embed\.sinusoids' did not run"):
        check_layers(DiscriminatorSettings(layers=("time_embed.sinusoids",)), context, idle)


def test_guidance_needs_a_label_for_no_class() -> None:
    on, null = GuidanceSettings(scale=2.0), {"labels": 10}
    with pytest.raises(UserError, match='needs a teacher with a label for "no class"'):
        guided(Net(), on, null)
    field = Net()
    field.null_label = 0  # type: ignore[assignment]
    guidance: Any = guided(field, on, null)
    assert guidance.null == {"labels": 0}
    assert guided(Net(), GuidanceSettings(), null) is not None


def test_guidance_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    source = own_field(tmp_path, "x", null_label=None)
    flags = ("--distribution.discriminator.layers", "--distribution.guidance.scale", "2")
    answer = hdistill("run", "digits", "--smoke", "--teacher", source, *flags, "--out", tmp_path / "out")
    assert (answer.code, "null_label" in answer.line) == (2, True)
    assert not (tmp_path / "out").exists()


# ---- labels=false


def test_labels_are_left_out_of_any_data(tmp_path: Path) -> None:
    latents = write_latents(tmp_path / "latents.py")
    for text in ("digits", f"{latents}:data"):
        with_labels, without = load_data(text), load_data(f"{text}?labels=false")
        assert (without.classes, without.null, without.name) == ((), {}, with_labels.name)
        assert without.held_out.cond(torch.arange(3)) == {}
        index = torch.tensor([3, 1])
        assert torch.equal(without.train.read(index).x, with_labels.train.read(index).x)
        assert grid_conditions(without, 2) == {}
        assert load_data(f"{text}?labels=true").classes == with_labels.classes
    with pytest.raises(UserError, match="labels must be true or false; got 'no'"):
        load_data("digits?labels=no")


def test_an_option_before_and_behind_it_stays(tmp_path: Path) -> None:
    from trainer_helpers import drawn, save_pictures

    for name in ("a", "b"):
        save_pictures(tmp_path / "pictures" / name, drawn(8))
    for options in ("size=8&labels=false&flip=true", "labels=false&size=8&flip=true", "size=8&flip=true&labels=false"):
        data = load_data(f"folder:{tmp_path / 'pictures'}?{options}")
        assert data.shape == (3, 8, 8)
        assert data.classes == ()
        assert len(data.train) == 2 * len(data.reference)


# ---- settings


def test_the_source_is_a_setting_like_another(settings: Settings) -> None:
    from hd_trainer.settings import settings_from_json, to_json

    given = dataclasses.replace(settings, teacher_source="owner/name")
    assert settings_from_json(json.loads(json.dumps(to_json(given))), "here").teacher_source == "owner/name"
    older = {name: value for name, value in to_json(settings).items() if name != "teacher_source"}
    assert settings_from_json(older, "here").teacher_source is None
    with pytest.raises(UserError, match="teacher_source must name a teacher"):
        dataclasses.replace(settings, teacher_source="")


def test_half_a_folder_of_ours_is_no_teacher(tmp_path: Path) -> None:
    folder = Path(zoo_folder(tmp_path))
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="does not fit its config"):
        read_network(str(folder), CPU)


def test_a_teacher_is_frozen_and_in_evaluation_mode(tmp_path: Path, context: Context) -> None:
    for source in (zoo_folder(tmp_path), own_field(tmp_path, "x"), official_file(tmp_path, f"{SMALL}&classes=10")):
        network = load_teacher(source, context.data, CPU)
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
