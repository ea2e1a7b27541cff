"""Foreign files that are damaged or hostile: one short line, nothing executed, nothing large allocated."""

from __future__ import annotations

import json
import pickle
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hd_zoo.weights.checkpoints import read_weights


def refused(path: Path) -> str:
    """The message with which a file is refused, which is one line of at most 300 characters beside the path."""
    with pytest.raises(ValueError, match="cannot be read as weights alone") as caught:
        read_weights(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 300 + len(str(path))
    return message


def write_program(path: Path, program: bytes, records: dict[str, bytes] | None = None, compression: int = 0) -> Path:
    """A torch.save archive around a pickle of one's own."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", program)
        for name, content in (records or {}).items():
            archive.writestr(f"a/data/{name}", content)
    return path


def tensor_program(storage: str = "torch\nFloatStorage", key: str = "0", numel: int = 4, shape: Any = (2, 2)) -> bytes:
    """{"w": a tensor} in protocol 2, with whatever its storage and shape claim."""
    strides = tuple(1 for _ in shape)
    identity = b"(X\x07\x00\x00\x00storagec" + storage.encode() + b"\n"
    for value in (key, "cpu", numel):
        identity += pickle.dumps(value, 2)[2:-1]
    identity += b"tQ"
    numbers = b"".join(pickle.dumps(value, 2)[2:-1] for value in (0, tuple(shape), strides))
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity + numbers + b"\x89}tR"
    return b"\x80\x02}X\x01\x00\x00\x00w" + call + b"s."


def test_the_helper_writes_what_torch_reads(tmp_path: Path) -> None:
    path = write_program(tmp_path / "a.pt", tensor_program(), {"0": torch.arange(4.0).numpy().tobytes()})
    assert read_weights(path)["w"].tolist() == [[0.0, 1.0], [1.0, 2.0]]


SPECIAL: dict[str, tuple[Callable[[], Tensor], str]] = {
    "expanded": (
        lambda: torch.ones(1).expand(10**6, 10**6),
        "w: its shape .* does not fit the 1 numbers of its storage",
    ),
    "overlapping": (lambda: torch.ones(9).as_strided((5, 5), (1, 1)), "does not fit the 9 numbers"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "asks for torch"),
    "sparse rows": (lambda: torch.eye(4).to_sparse_csr(), "asks for torch"),
    "meta": (lambda: torch.ones(2, device="meta"), "asks for torch._utils._rebuild_meta_tensor_no_storage"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), "holds a ComplexFloatStorage"),
    "float8": (lambda: torch.ones(2, dtype=torch.float8_e4m3fn), "holds a UntypedStorage"),
    "integers": (lambda: torch.ones(2, dtype=torch.int64), "w: it has dtype torch.int64"),
    "booleans": (lambda: torch.ones(2, dtype=torch.bool), "w: it has dtype torch.bool"),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("kind", SPECIAL)
def test_other_than_plain_dense_tensors(kind: str, tmp_path: Path) -> None:
    make, message = SPECIAL[kind]
    torch.save({"w": make()}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 5000
    assert re.search(message, refused(tmp_path / "a.pt"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["quantised", "nested"])
def test_quantised_and_nested_tensors(kind: str, tmp_path: Path) -> None:
    if kind == "nested":
        torch.save({"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, tmp_path / "a.pt")
    else:
        torch.save({"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt")


def test_tensors_of_any_dense_layout_are_read(tmp_path: Path) -> None:
    """Views of one storage, transposed, of one number and of none; bit for bit what torch loads."""
    base = torch.randn(6, 4)
    saved = {
        "base": base,
        "view": base[2:, 1:3],
        "transposed": base.t(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "number": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "double": torch.randn(3).double(),
    }
    torch.save(saved, tmp_path / "a.pt")
    found, expected = read_weights(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (tensor_program(numel=10**12), "numbers are not in the file"),
        (tensor_program(numel=-4), "shape or stride is damaged"),
        (tensor_program(key="7"), "numbers are not in the file"),
        (tensor_program(shape=(2, -2)), "shape or stride is damaged"),
        (tensor_program(shape=(2**61, 2**61, 2**61)), "does not fit the 4 numbers"),
        (tensor_program(shape=(5,)), "does not fit the 4 numbers"),
        (tensor_program(shape=("a", 2.5)), "shape or stride is damaged"),
        (tensor_program(shape=(1,) * 17), "data.pkl is damaged"),
        (tensor_program(storage="os\nsystem"), "holds a system"),
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "asks for os.system"),
        (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "asks for builtins.bytearray"),
        (b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)R.", "asks for torch._utils._rebuild_qtensor"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", None),  # a memo of two thousand million places holds one
        (b"\x80\x02}2.", "uses DUP"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.", None),  # a frame longer than the file
        (b"\x80\x04B\xff\xff\xff\xffa.", "cannot be read"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f1.", "cannot be read"),
        (b"\x80\x02" + b"(" * 100_000 + b".", "data.pkl is damaged"),
        (b"\x80\x02)" + b"\x85" * 100_000 + b"K\x01s.", "data.pkl is damaged"),
        (b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.", "data.pkl is damaged"),
        (b"\x80\x02}", "data.pkl ends too early|cannot be read"),
        (b"", "data.pkl ends too early|cannot be read"),
        (b"\x00" * 1000, "cannot be read"),
    ],
)
def test_programs_that_ask_for_too_much(program: bytes, message: str | None, tmp_path: Path) -> None:
    path = write_program(tmp_path / "a.pt", program, {"0": bytes(16)})
    if message is None:
        with pytest.raises(ValueError, match="holds no weights by name"):
            read_weights(path)
    else:
        assert re.search(message, refused(path))


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    """300 MB of zeros in 300 kB."""
    path = write_program(tmp_path / "a.pt", bytes(300_000_000), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 400_000
    assert "at most 16,000,000 are read" in refused(path)
    path = write_program(tmp_path / "b.pt", tensor_program(), {"0": bytes(16)}, compression=zipfile.ZIP_DEFLATED)
    assert "compressed or encrypted" in refused(path)


def test_names_out_of_a_file_cannot_write_to_a_terminal(tmp_path: Path) -> None:
    torch.save({"\x1b[2J\n" * 2000: torch.ones(2, dtype=torch.int64)}, tmp_path / "a.pt")
    assert "\\x1b[2J \\x1b" in refused(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "x" * 100_000},
        {"arguments": {"x" * 100_000: 1}},
        {"arguments": {"width": "x" * 100_000}},
        {"arguments": {"width": 10**400}},
        {"arguments": {"depth": 10**400}},
        {"arguments": {"frequencies": 2**62}},
        {"arguments": {"time_scale": 10**400}},
        {"arguments": {"time_scale": float("nan")}},
        {"arguments": {"r_embedding": "\x1b[2J" * 10_000}},
        {"converters": [{"name": "diffused_noise", "arguments": {"steps": 10**9}}]},
        {"converters": [{"name": "x" * 100_000, "arguments": {}}]},
        {"converters": [{"name": "reversed_time", "arguments": {"x" * 100_000: 1}}]},
        {"converters": [{"name": ["reversed_time"], "arguments": {}}]},
        {"converters": [{"name": "reversed_time", "arguments": [1]}]},
        {"converters": ["reversed_time"]},
    ],
    ids=lambda change: str(change)[:40],
)
def test_settings_in_a_configuration_end_in_one_short_line(change: dict[str, Any], tmp_path: Path) -> None:
    from hd_zoo import create_model, from_pretrained, save_pretrained

    config = json.loads(
        (save_pretrained(create_model("mlp_2d", width=4, depth=1), tmp_path) / "config.json").read_text()
    )
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=r"\.json|\.safetensors") as caught:
        from_pretrained(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 350 + len(str(tmp_path))


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; a checkpoint is one file"):
        read_weights(tmp_path)


FUZZ = """
import resource, sys
from pathlib import Path
import torch
from hd_zoo.weights.checkpoints import read_weights
import hd_zoo

folder = Path(sys.argv[1])
seen = set()
watched = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.remove", "subprocess.Popen")
sys.addaudithook(lambda event, given: seen.add(event) if event in watched else None)
for attempt in range(2):  # the first warms up what torch allocates once
    for path in sorted(folder.glob("good*")):
        hd_zoo.from_pretrained(path) if path.is_dir() else read_weights(path)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 200_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
read, refused = 0, 0
for path in sorted(folder.glob("bad*")):
    try:
        hd_zoo.from_pretrained(path) if path.is_dir() else read_weights(path)
        read += 1
    except (ValueError, OSError) as error:
        refused += 1
        text = str(error)
        assert text.isprintable() and len(text) <= 300 + 2 * len(str(path)), (path, text)
    except BaseException as error:
        raise AssertionError(f"{path}: {type(error).__name__}: {error}") from error
assert not seen, seen
print(read, refused)
"""


def mutated(content: bytes, rng: random.Random, start: int = 0) -> bytes:
    """One to four places overwritten, cut out, doubled or filled with a value that overflows."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(start, max(start + 1, len(changed)))
        length = rng.choice([1, 1, 2, 4, 8, 30])
        kind = rng.randrange(5)
        if kind == 0:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 1:
            del changed[at : at + length]
        elif kind == 2:
            changed[at:at] = changed[at : at + length]
        elif kind == 3:
            changed[at : at + length] = rng.choice([b"\xff", b"\x00", b"\x7f"]) * length
        else:
            del changed[at:]
    return bytes(changed)


def test_hundreds_of_mutations_end_in_one_short_line(tmp_path: Path) -> None:
    """Of the archive, of the program inside, of safetensors' header and of config.json; 200 MB are there for all."""
    from hd_zoo import create_model, save_pretrained

    rng = random.Random(7)
    good = tmp_path / "good.pt"
    torch.save({"ema": {"a": torch.randn(4, 3), "b": torch.nn.Parameter(torch.randn(5))}, "step": 3}, good)
    with zipfile.ZipFile(good) as archive:
        name = next(one for one in archive.namelist() if one.endswith("data.pkl"))
        program, records = archive.read(name), {f"{i}": archive.read(name[:-8] + f"data/{i}") for i in range(2)}
    folder = save_pretrained(create_model("mlp_2d", width=4, depth=1), tmp_path / "good")
    weights, config = ((folder / one).read_bytes() for one in ("model.safetensors", "config.json"))
    single = tmp_path / "good.safetensors"
    single.write_bytes(weights)
    for index in range(150):
        (tmp_path / f"bad{index}a.pt").write_bytes(mutated(good.read_bytes(), rng))
        write_program(tmp_path / f"bad{index}b.pt", mutated(program, rng, start=2), records)
        (tmp_path / f"bad{index}.safetensors").write_bytes(mutated(weights, rng, start=8 * (index % 2)))
        broken = tmp_path / f"bad{index}"
        broken.mkdir()
        (broken / "model.safetensors").write_bytes(weights if index % 2 else mutated(weights, rng))
        (broken / "config.json").write_bytes(mutated(config, rng) if index % 2 else config)
    done = subprocess.run([sys.executable, "-c", FUZZ, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused_number = map(int, done.stdout.split())
    assert read + refused_number == 600
    assert refused_number > 300  # most mutations hurt


def test_the_fuzz_test_sees_what_it_watches(tmp_path: Path) -> None:
    """Its traps close: unpickling is noticed, and so is an allocation."""
    program = FUZZ.replace("read_weights(path)", "torch.load(path, weights_only=False)")
    torch.save({"w": torch.ones(1).expand(10**5, 10**5)}, tmp_path / "bad.pt")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "pickle.find_class" in done.stderr
    large = FUZZ.replace("read_weights(path)", "torch.load(path)['w'].contiguous()")
    done = subprocess.run([sys.executable, "-c", large, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "allocate" in done.stderr
