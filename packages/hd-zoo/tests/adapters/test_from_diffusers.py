"""from_diffusers: folders that pipelines wrote, read as velocity fields, against the schedulers' own steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo_helpers import randomised

from hd_zoo import (
    DiffusedNoise,
    Guidance,
    check_teacher,
    from_pretrained,
    sample_jumps,
    sample_ode,
    save_pretrained,
    to_student,
)
from hd_zoo.adapters import DiffusersField, DiTNoise, SanaField, from_diffusers, to_sana_student
from hd_zoo.wrappers.convert import alphas_cumprod

DOWN_UP = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def make_unet(diffusers: Any, **settings: Any) -> Any:
    sizes = {"in_channels": 2, "out_channels": 2, "attention_head_dim": 4}
    return diffusers.UNet2DModel(**{**UNET, **DOWN_UP, **sizes, **settings}).eval()


def make_text_unet(diffusers: Any, **settings: Any) -> Any:
    sizes = {"in_channels": 4, "out_channels": 4, "attention_head_dim": 2, "cross_attention_dim": 12}
    return diffusers.UNet2DConditionModel(**{**UNET, **CROSS, **sizes, **settings}).eval()


def make_pixart(diffusers: Any, **settings: Any) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2}
    rest = {"cross_attention_dim": 16, "sample_size": 8, "caption_channels": 12, "use_additional_conditions": False}
    return diffusers.PixArtTransformer2DModel(**{**sizes, **rest, **settings}).eval()


def make_sd3(diffusers: Any, **settings: Any) -> Any:
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8}
    rest = {"num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16}
    more = {"pooled_projection_dim": 10, "pos_embed_max_size": 8}
    return diffusers.SD3Transformer2DModel(**{**sizes, **rest, **more, **settings}).eval()


def prompt(batch: int = 3) -> dict[str, Tensor]:
    return {"prompt": torch.randn(batch, 5, 12)}


#: Name -> (folder of the network in a pipeline, the network, its scheduler, conditions by our names)
CASES: dict[str, tuple[str, Callable[..., Any], tuple[str, dict[str, Any]], Callable[[], dict[str, Tensor]]]] = {
    "unet": ("unet", make_unet, ("DDPMScheduler", {}), dict),
    "unet, classes, cosine": (
        "unet",
        lambda d: make_unet(d, num_class_embeds=4),
        ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}),
        lambda: {"labels": torch.arange(3)},
    ),
    "text unet": (
        "unet",
        make_text_unet,
        ("PNDMScheduler", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        prompt,
    ),
    "text unet, v": (
        "unet",
        make_text_unet,
        (
            "DDIMScheduler",
            {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
        prompt,
    ),
    "pixart": (
        "transformer",
        make_pixart,
        ("DPMSolverMultistepScheduler", {}),
        lambda: {**prompt(), "prompt_mask": torch.tensor([[1, 1, 1, 0, 0]] * 3)},
    ),
    "sd3": (
        "transformer",
        make_sd3,
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        lambda: {**prompt(), "pooled_prompt": torch.randn(3, 10)},
    ),
}


def write_pipeline(diffusers: Any, folder: Path, name: str) -> tuple[Any, Any]:
    """The network and the scheduler of a case, written as a pipeline's folder."""
    subfolder, make, (scheduler_name, settings), _ = CASES[name]
    torch.manual_seed(0)
    model, scheduler = make(diffusers), getattr(diffusers, scheduler_name)(**settings)
    model.save_pretrained(folder / subfolder)
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "DiffusionPipeline", subfolder: ["diffusers", type(model).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return model, scheduler


def by_their_names(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    theirs = {
        "prompt": "encoder_hidden_states",
        "prompt_mask": "encoder_attention_mask",
        "labels": "class_labels",
        "pooled_prompt": "pooled_projections",
    }
    return {theirs[name]: value for name, value in cond.items()}


@pytest.mark.parametrize("name", [name for name in CASES if name != "sd3"])
def test_an_euler_step_is_the_schedulers_own_ddim_step(diffusers: Any, name: str, tmp_path: Path) -> None:
    model, scheduler = write_pipeline(diffusers, tmp_path, name)
    field, cond = from_diffusers(tmp_path), CASES[name][3]()
    assert isinstance(field, DiffusedNoise)
    settings = {key: scheduler.config[key] for key in ("beta_schedule", "beta_start", "beta_end", "prediction_type")}
    ddim = diffusers.DDIMScheduler(
        **settings,
        clip_sample=False,
        set_alpha_to_one=False,
        rescale_betas_zero_snr=scheduler.config.get("rescale_betas_zero_snr", False),
    )
    ddim.set_timesteps(10)
    for step in ddim.timesteps[[0, 1, 5, 8]].tolist():
        signal, after = ddim.alphas_cumprod[step], ddim.alphas_cumprod[step - 100]
        a, s, a_next, s_next = signal.sqrt(), (1 - signal).sqrt(), after.sqrt(), (1 - after).sqrt()
        t, t_next = s / (a + s), s_next / (a_next + s_next)
        if t > field.t_end:
            continue
        x = torch.randn(3, *field.sample_shape)
        z = (a + s) * x
        with torch.no_grad():
            answer = model(z, timestep=torch.full((3,), step), **by_their_names(cond)).sample[:, : x.shape[1]]
            expected = ddim.step(answer, step, z).prev_sample
            found = (a_next + s_next) * (x + (t_next - t) * field(x, t.expand(3), **cond))
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, atol=2e-3 * scale, rtol=0)


def test_an_euler_step_is_the_schedulers_own_flow_step(diffusers: Any, tmp_path: Path) -> None:
    model, scheduler = write_pipeline(diffusers, tmp_path, "sd3")
    field, cond = from_diffusers(tmp_path), CASES["sd3"][3]()
    assert isinstance(field, DiffusersField)
    scheduler.set_timesteps(5)
    x = torch.randn(3, *field.sample_shape)
    with torch.no_grad():
        for i, step in enumerate(scheduler.timesteps):
            answer = model(x, timestep=step.expand(3), **by_their_names(cond)).sample
            expected = scheduler.step(answer, step, x).prev_sample
            sigma, after = scheduler.sigmas[i], scheduler.sigmas[i + 1]
            found = x + (after - sigma) * field(x, sigma.expand(3), **cond)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            x = expected


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_a_full_teacher(diffusers: Any, name: str, tmp_path: Path) -> None:
    """Frozen, described, sampled, and made a student that equals it and learns."""
    model, _ = write_pipeline(diffusers, tmp_path, name)
    teacher: Any = from_diffusers(tmp_path)
    cond = CASES[name][3]()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.sample_shape == (model.config.in_channels, 8, 8)
    assert teacher.classes == (4 if "classes" in name else 0)
    assert teacher.takes_r is False
    check_teacher(teacher, {name: value[:2] for name, value in cond.items()})
    x, t = torch.randn(3, *teacher.sample_shape), torch.tensor([0.2, 0.5, 0.9])
    velocity = teacher(x, t, t / 2, **cond)
    assert velocity.shape == x.shape
    assert velocity.isfinite().all()
    assert sample_ode(teacher, torch.randn_like(x), steps=2, **cond).isfinite().all()
    student: Any = to_student(teacher)
    assert student.takes_r
    assert torch.equal(student(x, t, t / 2, **cond), velocity)
    student(x, t, t / 2, **cond).square().mean().backward()
    assert all(p.grad is not None for n, p in student.named_parameters() if "interval_embed" in n)
    assert sample_jumps(student, torch.randn_like(x), **cond).isfinite().all()


@pytest.mark.usefixtures("all_double")
@pytest.mark.parametrize("name", CASES)
def test_the_jvp_of_the_student_is_a_difference_quotient(diffusers: Any, name: str, tmp_path: Path) -> None:
    """Also through group norms whose inputs are not contiguous."""
    write_pipeline(diffusers, tmp_path, name)
    student: Any = to_student(from_diffusers(tmp_path).double())
    for module in student.modules():
        if getattr(module, "interval_embed", None) is not None:
            randomised(module.interval_embed, std=0.3)
    cond = {k: v.double() if v.is_floating_point() else v for k, v in CASES[name][3]().items()}
    x, t = torch.randn(3, *student.sample_shape, dtype=torch.float64), torch.tensor([0.203, 0.507, 0.811]).double()
    r, way = t / 3, (torch.randn_like(x), torch.ones_like(t), torch.full_like(t, -0.5))
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        _, slope = torch.func.jvp(lambda *point: student(*point, **cond), (x, t, r), way)
        h = 1e-7
        ahead = student(*(p + h * d for p, d in zip((x, t, r), way, strict=True)), **cond)
        behind = student(*(p - h * d for p, d in zip((x, t, r), way, strict=True)), **cond)
    scale = slope.abs().max().item()
    torch.testing.assert_close(slope, (ahead - behind) / (2 * h), atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_teacher_and_student_survive_a_file(diffusers: Any, name: str, tmp_path: Path) -> None:
    """By the model's class and configuration; its random numbers are left alone."""
    write_pipeline(diffusers, tmp_path, name)
    teacher: Any = from_diffusers(tmp_path)
    student = randomised(to_student(teacher), std=0.02)
    cond = CASES[name][3]()
    x, t = torch.randn(3, *teacher.sample_shape), torch.tensor([0.2, 0.5, 0.9])
    for network, r in ((teacher, None), (student.eval(), t / 3)):
        folder = save_pretrained(network, tmp_path / f"takes_r_{network.takes_r}")
        state = torch.get_rng_state()
        again: Any = from_pretrained(folder)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(again(x, t, r, **cond), network(x, t, r, **cond))
        assert (again.takes_r, again.sample_shape) == (network.takes_r, network.sample_shape)
        assert to_student(again).takes_r


def test_dit_and_sana_survive_a_file(make_dit: Any, make_sana: Any, tmp_path: Path) -> None:
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0.2, 0.5, 0.9])
    sana, cond = SanaField(make_sana()), prompt()
    fields = [(DiffusedNoise(DiTNoise(make_dit())), {}), (sana, cond), (to_sana_student(sana), cond)]
    fields += [(to_student(field), conditions) for field, conditions in fields[:2]]
    for i, (field, conditions) in enumerate(fields):
        network = randomised(field, std=0.02).eval()
        again = from_pretrained(save_pretrained(network, tmp_path / str(i)))
        assert torch.equal(again(x, t, t / 3, **conditions), network(x, t, t / 3, **conditions))
        assert again.takes_r is field.takes_r


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"model": "AutoencoderKL"},
            "a model of diffusers must be one of DiTTransformer2DModel, .*got 'AutoencoderKL'",
        ),
        ({"config": 3}, "a model of diffusers must be one of"),
        ({"more": 3}, "a model of diffusers must be one of"),
        ({"time_scale": -1}, "time_scale must be a number > 0; got '-1'"),
        ({"config": {"_name_or_path": "x"}}, "holds private entries"),
        ({"config": {"block_out_channels": 3}}, "cannot build a UNet2DModel"),
        ({"config": {"layers_per_block": 10**9}}, "1000000000 blocks"),
    ],
)
def test_folders_of_ours_that_are_wrong(
    diffusers: Any, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save_pretrained(DiffusersField(make_unet(diffusers)), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["arguments"] |= arguments
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_dit_and_sana(diffusers: Any, make_dit: Any, make_sana: Any, tmp_path: Path) -> None:
    for name, model, scheduler in (
        ("dit", make_dit(), diffusers.DDIMScheduler(beta_end=0.015)),
        (
            "sana",
            make_sana(),
            diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        ),
    ):
        model.save_pretrained(tmp_path / name / "transformer")
        scheduler.save_pretrained(tmp_path / name / "scheduler")
    dit: Any = from_diffusers(tmp_path / "dit")
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0.2, 0.5, 0.9])
    expected = DiffusedNoise(DiTNoise(make_dit()), beta_end=0.015)
    torch.testing.assert_close(dit(x, t), expected(x, t))
    sana: Any = from_diffusers(tmp_path / "sana")
    cond = prompt()
    torch.testing.assert_close(sana(x, t, **cond), SanaField(make_sana())(x, t, **cond))
    for teacher, conditions in ((dit, {}), (sana, cond)):
        assert torch.equal(to_student(teacher)(x, t, t / 2, **conditions), teacher(x, t, **conditions))


def test_the_network_alone_with_a_schedulers_configuration(diffusers: Any, tmp_path: Path) -> None:
    model, scheduler = write_pipeline(diffusers, tmp_path, "unet")
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([0.3, 0.7])
    expected = from_diffusers(tmp_path)(x, t)
    for found in (
        from_diffusers(model, scheduler=scheduler.config),
        from_diffusers(tmp_path / "unet", scheduler=tmp_path / "scheduler"),
        from_diffusers(str(tmp_path / "unet"), scheduler=tmp_path),
        from_diffusers(tmp_path, subfolder="unet"),
    ):
        torch.testing.assert_close(found(x, t), expected)
    assert from_diffusers(tmp_path, dtype=torch.bfloat16)(x.bfloat16(), t).dtype == torch.bfloat16


def test_trained_betas(diffusers: Any) -> None:
    betas = torch.linspace(1e-3, 0.3, 20).tolist()
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=20, trained_betas=betas)
    field: Any = from_diffusers(make_unet(diffusers), scheduler=scheduler.config)
    assert field.arguments["alphas_cumprod"] == pytest.approx(scheduler.alphas_cumprod.tolist(), rel=1e-5)
    assert field.network.time_scale == 20


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules_are_diffusers_own(diffusers: Any, schedule: str, zero: bool) -> None:
    theirs = diffusers.DDIMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero).alphas_cumprod
    found = torch.tensor(alphas_cumprod(schedule, zero_terminal_snr=zero))
    torch.testing.assert_close(found, theirs, atol=1e-6, rtol=2e-3)


def test_an_id_of_the_hub(diffusers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pipeline(diffusers, tmp_path, "unet")
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert from_diffusers("someone/something").sample_shape == (2, 8, 8)
    ((name, patterns),) = asked
    assert name == "someone/something"
    assert "unet/*.safetensors*" in patterns
    assert not any("*.bin" in pattern or pattern == "*" for pattern in patterns), "safetensors alone"


def test_guidance_doubles_every_condition(diffusers: Any) -> None:
    settings = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    model = make_text_unet(diffusers, **settings, projection_class_embeddings_input_dim=6 * 4 + 10)
    field = from_diffusers(model, scheduler=diffusers.DDIMScheduler().config)
    cond = {**prompt(), "text_embeds": torch.randn(3, 10), "time_ids": torch.rand(3, 6)}
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0.2, 0.5, 0.9])
    empty = {"prompt": torch.zeros(1, 5, 12), "text_embeds": torch.zeros(1, 10)}
    plain = field(x, t, **cond)
    without = field(x, t, **{**cond, **{k: v.expand_as(cond[k]) for k, v in empty.items()}})
    found = Guidance(field, 4.0, null=empty)(x, t, **cond)
    torch.testing.assert_close(found, without + 4 * (plain - without), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, without)


SCHEDULER: dict[str, Any] = {"_class_name": "DDPMScheduler", "beta_schedule": "linear"}


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (None, "scheduler must be a scheduler's folder or configuration"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler is of no variance-preserving diffusion and no flow"),
        ({**SCHEDULER, "beta_schedule": "sigmoid"}, "beta_schedule must be one of linear, .*; got 'sigmoid'"),
        (
            {**SCHEDULER, "prediction_type": "x"},
            "prediction_type must be one of epsilon, v_prediction, sample; got 'x'",
        ),
    ],
)
def test_schedulers_that_do_not_convert(diffusers: Any, scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_diffusers(make_unet(diffusers), scheduler=scheduler)


def test_networks_that_do_not_convert(diffusers: Any, make_dit: Any, make_sana: Any) -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    for model, scheduler, message in (
        (nn.Linear(2, 2), SCHEDULER, "a network must be one of UNet2DModel, .*; got Linear"),
        (make_dit(), flow, "DiTTransformer2DModel predicts noise; the scheduler says that it predicts a flow"),
        (make_dit(), {**SCHEDULER, "num_train_timesteps": 500}, "has 1000 timesteps; the scheduler says 500"),
        (make_sana(), SCHEDULER, "SanaTransformer2DModel predicts a flow over 1000 timesteps"),
        (make_unet(diffusers, time_embedding_type="fourier"), SCHEDULER, "'positional' convert; got 'fourier'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_diffusers(model, scheduler=scheduler)
    with pytest.raises(ValueError, match="model must be one of UNet2DModel"):
        DiffusersField(nn.Linear(2, 2))


def test_folders_that_do_not_convert(diffusers: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        from_diffusers(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*, nor in its transformer or unet"):
        from_diffusers(tmp_path)
    make_unet(diffusers).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no scheduler_config\.json in .*; give scheduler="):
        from_diffusers(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match=r"config\.json is of a AutoencoderKL; those that convert are UNet2DModel"):
        from_diffusers(tmp_path, scheduler=SCHEDULER)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        from_diffusers(tmp_path, scheduler=SCHEDULER)


def test_conditions_that_are_missing_or_unknown(diffusers: Any) -> None:
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    field = DiffusersField(make_text_unet(diffusers))
    with pytest.raises(ValueError, match="a UNet2DConditionModel needs the condition prompt in every call"):
        field(x, t)
    with pytest.raises(ValueError, match=r"takes the conditions prompt, .*; got text"):
        field(x, t, **prompt(2), text=torch.zeros(2))
    with pytest.raises(ValueError, match="needs the condition labels in every call"):
        DiffusersField(make_unet(diffusers, num_class_embeds=3))(x[:, :2], t)
    with pytest.raises(ValueError, match=r"the model returns shape \(2, 3, 8, 8\) for x of shape \(2, 2, 8, 8\)"):
        DiffusersField(make_unet(diffusers, out_channels=3))(x[:, :2], t)
    with pytest.raises(ValueError, match=r"t must have shape \(2,\); got \(\)"):
        field(x, torch.tensor(0.5), **prompt(2))
