"""The command that converts official checkpoints, run as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from einops import rearrange

import hd_zoo

TOOL = Path(__file__).resolve().parent.parent / "tools" / "convert_checkpoint.py"
SMALL = {"image_size": 8, "width": 24, "depth": 2, "num_heads": 2, "classes": 5}
OFFICIAL = {
    "patch_embed.": "x_embedder.proj.",
    "time_embed.": "t_embedder.",
    "label_embed.": "y_embedder.embedding_table.",
    "head.": "final_layer.",
    "modulation.": "adaLN_modulation.",
    "mlp.0.": "mlp.fc1.",
    "mlp.2.": "mlp.fc2.",
}


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def network() -> torch.nn.Module:
    """Small, with weights everywhere."""
    model = hd_zoo.create_model("sit_s_2", **SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def checkpoint(network: torch.nn.Module, tmp_path: Path) -> Path:
    """Its weights by their official names, as the official training loop stores them."""
    weights = {}
    for name, tensor in network.state_dict().items():
        for ours, theirs in OFFICIAL.items():
            name = name if ours == "mlp.0." and name.startswith("time_embed") else name.replace(ours, theirs)
        name = name.replace("t_embedder.mlp.fc1.", "t_embedder.mlp.0.").replace(
            "t_embedder.mlp.fc2.", "t_embedder.mlp.2."
        )
        weights[name] = tensor.clone()
    weights["x_embedder.proj.weight"] = rearrange(
        weights["x_embedder.proj.weight"], "o (p q c) -> o c p q", p=2, q=2
    ).clone()
    weights["pos_embed"] = weights.pop("positions")[None]
    current = {name: one if name == "pos_embed" else 0 * one for name, one in weights.items()}
    torch.save({"ema": weights, "model": current}, tmp_path / "official.pt")
    return tmp_path / "official.pt"


def settings() -> list[str]:
    """One option each: they add up."""
    return [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]


def test_a_checkpoint_becomes_a_folder(network: torch.nn.Module, checkpoint: Path, tmp_path: Path) -> None:
    answer = convert("sit_s_2", checkpoint, tmp_path / "teacher", *settings())
    assert answer.returncode == 0, answer.stderr
    count = sum(one.numel() for one in network.parameters())
    assert f"sit_s_2, {count:,} parameters" in answer.stdout
    x, t, labels = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 3, 5])
    found = hd_zoo.from_pretrained(tmp_path / "teacher")(x, t, labels=labels)
    torch.testing.assert_close(found, network(x, t, labels=labels))
    assert convert("sit_s_2", checkpoint, tmp_path / "current", "--current", *settings()).returncode == 0
    assert torch.all(hd_zoo.from_pretrained(tmp_path / "current")(x, t, labels=labels) == 0)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("sit_s_2", [], "official.pt: these are not the weights of this network: "),
        ("sit_s_2", ["--set", "width"], "--set takes NAME=VALUE with a value in JSON; got 'width': there is no '='"),
        ("sit_s_2", ["--set", "width=wide"], "got 'width=wide': 'wide' is not JSON"),
        ("sit_s_2", ["--set", "breadth=3"], "breadth"),
        ("sit_s_2", ["--set", "averaged=true"], "averaged"),
        ("sit_huge", [], "sit_huge"),
        ("mlp_2d", [], "dmf_*, lightningdit_*, meanflow_*, repa_*, sit_*); got 'mlp_2d'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    name: str, more: list[str], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    answer = convert(name, checkpoint, tmp_path / "teacher", *more)
    assert answer.returncode == 1
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert not (tmp_path / "teacher").exists()
