"""What save_pretrained is given and where it writes: wrapped networks, NaN, full disks, names of folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo_helpers import randomised

from hd_zoo import DiffusedNoise, create_model, from_pretrained, save_pretrained, to_student


def make_student() -> nn.Module:
    return randomised(to_student(create_model("dit_nano_2", width=16, depth=2, classes=3)))


def assert_loads_as(folder: Path, network: nn.Module) -> None:
    """Its names and numbers, bit for bit."""
    found, expected = from_pretrained(folder).state_dict(), network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def run_python(script: str, *arguments: object) -> str:
    """The script's output, in a process of its own that sees this package."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_compiled_network(tmp_path: Path) -> None:
    student = make_student()
    assert_loads_as(save_pretrained(torch.compile(student), tmp_path), student)


def test_compiled_parts_of_a_network(tmp_path: Path) -> None:
    student, plain = make_student(), make_student()
    plain.load_state_dict(student.state_dict())
    for index, block in enumerate(student.blocks):
        student.blocks[index] = torch.compile(block)
    assert any("_orig_mod" in name for name in student.state_dict())
    assert_loads_as(save_pretrained(student, tmp_path), plain)


@pytest.mark.parametrize("outside", [False, True])
def test_converters_and_compilers_in_either_order(outside: bool, tmp_path: Path) -> None:
    student = make_student()
    field = torch.compile(DiffusedNoise(student)) if outside else DiffusedNoise(torch.compile(student))
    folder = save_pretrained(field, tmp_path)
    assert isinstance(from_pretrained(folder), DiffusedNoise)
    assert_loads_as(folder, DiffusedNoise(student))


DISTRIBUTED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import hd_zoo

folder, store = sys.argv[1:]
dist.init_process_group("gloo", store=dist.FileStore(store, 1), rank=0, world_size=1)
network = hd_zoo.from_pretrained(folder)
hd_zoo.save_pretrained(DistributedDataParallel(network), folder + "/ddp")
hd_zoo.save_pretrained(DistributedDataParallel(torch.compile(network)), folder + "/ddp-compiled")
for block in network.blocks:
    fully_shard(block)
fully_shard(network)
assert all(type(one).__name__ == "DTensor" for one in network.parameters())
hd_zoo.save_pretrained(network, folder + "/fsdp")
hd_zoo.save_pretrained(torch.compile(network), folder + "/fsdp-compiled")
dist.destroy_process_group()
"""


def test_networks_of_ddp_and_fsdp2(tmp_path: Path) -> None:
    student = make_student()
    save_pretrained(student, tmp_path)
    run_python(DISTRIBUTED, tmp_path, tmp_path / "store")
    for name in ("ddp", "ddp-compiled", "fsdp", "fsdp-compiled"):
        assert_loads_as(tmp_path / name, student)


TWO_PROCESSES = """
import sys
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import torch.multiprocessing
import hd_zoo

def work(rank, folder, store):
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    network = hd_zoo.from_pretrained(folder)
    fully_shard(network)
    hd_zoo.save_pretrained(network, f"{folder}/{rank}")
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, sys.argv[1:], nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_of_two_processes_the_first_writes(tmp_path: Path) -> None:
    student = make_student()
    save_pretrained(student, tmp_path)
    run_python(TWO_PROCESSES, tmp_path, tmp_path / "store")
    assert_loads_as(tmp_path / "0", student)
    assert not (tmp_path / "1").exists()


def test_a_wrapper_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a network from .* is needed; got Linear"):
        save_pretrained(torch.compile(nn.Linear(2, 2)), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_written(bad: float, dtype: torch.dtype, tmp_path: Path) -> None:
    student = make_student().to(dtype)
    with torch.no_grad():
        student.blocks[1].attn.proj.bias[2:4] = bad
    with pytest.raises(ValueError, match=r"not finite: blocks\.1\.attn\.proj\.bias has 2 of 16 NaN or inf"):
        save_pretrained(student, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("shard_bytes", [2000, 10**9])
def test_weights_that_are_not_finite_are_not_loaded(
    shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student()
    with torch.no_grad():
        student.head.linear.weight[0, 0] = float("nan")
    monkeypatch.setattr("hd_zoo.weights.unwrap.check_finite", lambda tensors: None)
    folder = save_pretrained(student, tmp_path, shard_bytes=shard_bytes)
    with pytest.raises(ValueError, match=r"not finite: head\.linear\.weight has 1 of 64 NaN or inf"):
        from_pretrained(folder)


FULL = """
import resource, sys
import hd_zoo

network = hd_zoo.create_model("dit_nano_2")
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    hd_zoo.save_pretrained(network, sys.argv[1], shard_bytes=int(sys.argv[2]))
except OSError as error:
    print(error.errno, "|", error)
"""


@pytest.mark.parametrize("shard_bytes", [100_000, 10**9])
def test_a_disk_that_is_full_keeps_what_was_there(shard_bytes: int, tmp_path: Path) -> None:
    """A limit on a file's size fails where a full disk does."""
    student = make_student()
    save_pretrained(student, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    number, _, message = run_python(FULL, tmp_path, shard_bytes).strip().partition(" | ")
    assert os.strerror(int(number)) in message
    assert str(tmp_path) in message
    assert "\n" not in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_loads_as(tmp_path, student)


def test_a_folder_whose_name_is_not_utf8_is_refused_in_words(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"a\xff")
    message = r"the path .*a\\udcff is not UTF-8, which safetensors needs: rename it"
    with pytest.raises(ValueError, match=message):
        save_pretrained(make_student(), folder)
    assert not folder.exists()
    save_pretrained(make_student(), tmp_path / "b").rename(folder)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_shapes_are_compared_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_pretrained(make_student(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["arguments"]["classes"] = 2**40
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("hd_zoo.weights.folders.read_tensors", lambda *given: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"label_embed\.weight has shape \(4, 16\), not \(1099511627777, 16\)"):
        from_pretrained(folder)
