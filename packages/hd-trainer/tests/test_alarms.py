"""What says that a stage has failed, while it trains and at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trainer_helpers import perturbed_teacher, prepare_task, tiny_settings

from hd_trainer.context import Context
from hd_trainer.engine.loop import LoopSettings, train
from hd_trainer.files import read_records
from hd_trainer.pipeline import context_of
from hd_trainer.stages import STAGES
from hd_trainer.stages.alarms import alarms_of, compare_with_real, deviation, find_alarms, roughness


@pytest.fixture(scope="module")
def context() -> Context:
    return context_of(tiny_settings())


def real(context: Context) -> Tensor:
    """Other real images than those that samples are compared with."""
    return context.data.held_out.read(torch.arange(60)).x


def test_deviation_and_roughness_of_images_known_in_closed_form() -> None:
    """Checkerboards of -1 and 1, half of them inverted: neighbours differ by 2, a pixel is as often -1 as 1."""
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)[None]
    images = torch.stack([board, -board])
    assert roughness(images) == 2.0
    assert deviation(images) == pytest.approx(2**0.5)
    assert deviation(board.expand(5, 1, 8, 8)) == 0.0
    assert roughness(torch.ones(3, 1, 8, 8)) == 0.0
    assert roughness(torch.arange(4.0).expand(2, 1, 1, 4)) == 1.0


def test_real_images_are_like_real_ones(context: Context) -> None:
    found = compare_with_real(context)(real(context))
    assert found["samples_deviation"] == pytest.approx(1.0, abs=0.15)
    assert found["samples_roughness"] == pytest.approx(1.0, abs=0.15)
    assert find_alarms("distribution", found) == {}


FAILURES: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("collapse", lambda images: images[:1].expand(60, -1, -1, -1)),
    ("collapse", lambda images: images.mean(dim=0, keepdim=True) + 0.2 * images),
    ("noise", lambda images: 3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))),
]


@pytest.mark.parametrize(("kind", "break_them"), FAILURES)
def test_broken_samples_are_named(kind: str, break_them: Callable[[Tensor], Tensor], context: Context) -> None:
    found = compare_with_real(context)(break_them(real(context)))
    assert list(find_alarms("distribution", found)) == [kind]


def test_a_discriminator_that_won_is_named() -> None:
    assert find_alarms("distribution", {"discriminator_accuracy": 0.985}) == {}
    sentence = find_alarms("distribution", {"discriminator_accuracy": 0.995})["discriminator"]
    assert "right in 99.5% of the cases" in sentence
    assert "gan-weight" in sentence


def test_what_a_stage_begins_with_is_no_alarm_before_its_end() -> None:
    alike, noise = {"samples_deviation": 0.1}, {"samples_roughness": 9.0}
    expected = {"teacher": [False, False], "trajectory": [False, True], "distribution": [True, True]}
    for stage in STAGES:
        assert [bool(find_alarms(stage, one, at_end=False)) for one in (alike, noise)] == expected[stage]
        assert find_alarms(stage, alike)
        assert find_alarms(stage, noise)


def test_the_loop_says_each_kind_once_and_the_record_keeps_it(
    context: Context, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_settings()
    task = prepare_task("distribution", tiny, context, perturbed_teacher(tiny, context))
    broken = replace(task, sample=lambda: torch.zeros(60, *context.data.shape))
    train(broken, tmp_path, LoopSettings(log_every=2, checkpoint_every=2))
    assert capsys.readouterr().err.count("warning: samples are nearly alike") == 1
    assert read_records(tmp_path / "metrics.jsonl")[-1]["samples_deviation"] == 0.0
    assert [line.split(":")[0] for line in alarms_of("distribution", tmp_path)][:1] == ["samples are nearly alike"]


def test_a_folder_without_a_training_has_no_alarms(tmp_path: Path) -> None:
    assert alarms_of("distribution", tmp_path) == []
