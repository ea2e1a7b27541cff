"""``inception:FILE``: the InceptionV3 of FID, its weights read from a file of the usual forms.

The network is "Rethinking the Inception Architecture" (arXiv 1512.00567, figures 5 to 7 and table 1) as TensorFlow's
2015 release has it, with 1008 logits. Where it differs from the later ones: average pooling does not count the padding,
the last block pools by the maximum. Input: 299x299, (byte - 128) / 128.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hd_trainer.errors import UserError
from hd_trainer.evaluation.extractors.base import Extractor, as_colour
from hd_trainer.files import digest

WIDTH, LOGITS, SIDE = 2048, 1008, 299
#: The standard file's SHA-256 begins so: its name, pt_inception-2015-12-05-6726825d.pth, says it.
STANDARD = "6726825d"


class Unit(nn.Module):
    """Convolution without bias, batch normalisation (epsilon 0.001), ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H', W')."""
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Figure5(nn.Module):
    """At 35x35: 1x1; 5x5; two 3x3; pooling."""

    def __init__(self, inputs: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Unit(inputs, 48, 1), Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Unit(inputs, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = Unit(64, 96, 3, padding=1), Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, 224 + pool, H, W)."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], dim=1)


class Reduction35(nn.Module):
    """35x35 -> 17x17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Unit(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(inputs, 64, 1), Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, 480 + inputs, H', W')."""
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, 2)], dim=1)


class Figure6(nn.Module):
    """At 17x17: 7x7 as 1x7 and 7x1, once and twice."""

    def __init__(self, inputs: int, inner: int) -> None:
        super().__init__()
        wide: tuple[tuple[int, int], tuple[int, int]] = ((1, 7), (0, 3))
        tall: tuple[tuple[int, int], tuple[int, int]] = ((7, 1), (3, 0))
        self.branch1x1 = Unit(inputs, 192, 1)
        self.branch7x7_1 = Unit(inputs, inner, 1)
        self.branch7x7_2, self.branch7x7_3 = (
            Unit(inner, inner, wide[0], 1, wide[1]),
            Unit(inner, 192, tall[0], 1, tall[1]),
        )
        self.branch7x7dbl_1 = Unit(inputs, inner, 1)
        self.branch7x7dbl_2 = Unit(inner, inner, tall[0], 1, tall[1])
        self.branch7x7dbl_3 = Unit(inner, inner, wide[0], 1, wide[1])
        self.branch7x7dbl_4 = Unit(inner, inner, tall[0], 1, tall[1])
        self.branch7x7dbl_5 = Unit(inner, 192, wide[0], 1, wide[1])
        self.branch_pool = Unit(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, 768, H, W)."""
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_average(x))], dim=1)


class Reduction17(nn.Module):
    """17x17 -> 8x8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Unit(inputs, 192, 1), Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Unit(inputs, 192, 1), Unit(192, 192, (1, 7), 1, (0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Unit(192, 192, (7, 1), 1, (3, 0)), Unit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, 512 + inputs, H', W')."""
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], dim=1)


class Figure7(nn.Module):
    """At 8x8: 3x3 as 1x3 beside 3x1, once and after a 3x3."""

    def __init__(self, inputs: int, pool_by_maximum: bool) -> None:
        super().__init__()
        self.pool_by_maximum = pool_by_maximum
        self.branch1x1 = Unit(inputs, 320, 1)
        self.branch3x3_1 = Unit(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Unit(384, 384, (1, 3), 1, (0, 1)), Unit(384, 384, (3, 1), 1, (1, 0))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(inputs, 448, 1), Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Unit(384, 384, (1, 3), 1, (0, 1))
        self.branch3x3dbl_3b = Unit(384, 384, (3, 1), 1, (1, 0))
        self.branch_pool = Unit(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, 2048, H, W)."""
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.pool_by_maximum else _average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(pooled)]
        return torch.cat(parts, dim=1)


class Inception(nn.Module):
    """Images (B, 3, 299, 299) in (byte - 128) / 128 -> features (B, 2048) and logits (B, 1008) without the bias.

    The Inception Score's script leaves the bias out of the logits (arXiv 1606.03498), so it is left out here.
    Its parts are named as in the usual files.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Unit(32, 32, 3), Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Unit(64, 80, 1), Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Figure5(192, 32), Figure5(256, 64), Figure5(288, 64)
        self.Mixed_6a = Reduction35(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = Figure6(768, 128), Figure6(768, 160), Figure6(768, 160)
        self.Mixed_6e, self.Mixed_7a = Figure6(768, 192), Reduction17(768)
        self.Mixed_7b, self.Mixed_7c = Figure7(1280, False), Figure7(2048, True)
        self.fc = nn.Linear(WIDTH, LOGITS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T


def inception_extractor(place: str, device: torch.device) -> Extractor:
    """The extractor of FID; its name is "FID" for the standard file alone, else "inception".

    Raises:
        UserError: if the file is missing or holds other weights.
    """
    if not place:
        raise UserError(f"extractor inception: which file? Name it: inception:pt_inception-2015-12-05-{STANDARD}.pth")
    path = Path(place).expanduser()
    if not path.is_file():
        raise UserError(f"extractor inception: no file {path}")
    network = load_inception(path).to(device)
    sha256 = digest(path)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = network(prepare(images))
        return features, logits

    return Extractor(
        name="FID" if sha256.startswith(STANDARD) else "inception",
        width=WIDTH,
        resize=f"{SIDE}x{SIDE}, bilinear of TensorFlow 1 (corner pixels aligned at the top left, no antialiasing)",
        sha256=sha256,
        run=run,
        device=device,
        batch=50,
    )


def load_inception(path: Path) -> Inception:
    """The network with a file's weights, frozen. The file is read as data: no pickle is run.

    Keys of torchvision's form (``Mixed_5b.branch1x1.conv.weight``), as in the standard file, or of pytorch-fid's
    module (``blocks.2.0.branch1x1...``), with or without a prefix such as ``module.``.

    Raises:
        UserError: for anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names its refusals in many ways
        raise UserError(f"extractor inception: {path} cannot be read as plain weights ({str(error)[:150]})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"extractor inception: {path} holds no dictionary of tensors")
    found = {_name(str(key)): value for key, value in state.items()}
    found = {key: value.float() for key, value in found.items() if not key.startswith("AuxLogits.")}
    network = Inception()
    # pytorch-fid's module has no last layer: then there are no logits worth a score, and zeros say so.
    found.setdefault("fc.weight", torch.zeros(LOGITS, WIDTH))
    found.setdefault("fc.bias", torch.zeros(LOGITS))
    counters = {key: value for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")}
    try:
        network.load_state_dict({**counters, **found})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"extractor inception: {path} holds other weights than FID's InceptionV3 ({reason})") from error
    return network.eval().requires_grad_(False)


def prepare(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) in [-1, 1] at 256 levels -> (B, 3, 299, 299) in (byte - 128) / 128."""
    pixels = ((as_colour(images) + 1) * 127.5).round()
    height, width = images.shape[2:]
    rows, columns = _weights(height, images), _weights(width, images)
    return (rows @ pixels @ columns.T - 128) / 128


def _weights(size: int, like: Tensor) -> Tensor:
    """Bilinear weights (299, size) of TensorFlow 1: output i lies at input i size / 299, with no half pixels."""
    place = torch.arange(SIDE, dtype=torch.float64) * size / SIDE
    low = place.floor().long().clamp(max=size - 1)
    share = (place - low).clamp(0, 1)
    weights = torch.zeros(SIDE, size, dtype=torch.float64)
    weights[torch.arange(SIDE), low] += 1 - share
    weights[torch.arange(SIDE), (low + 1).clamp(max=size - 1)] += share
    return weights.to(like)


#: Children of pytorch-fid's ``blocks``, in order.
_BLOCKS = (
    ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
    ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


def _name(key: str) -> str:
    """The key of a file as our network has it."""
    key = re.sub(r"^(?:module|model|inception|base)\.", "", key)
    if parts := re.fullmatch(r"blocks\.(\d)\.(\d)\.(.+)", key):
        block, child = int(parts[1]), int(parts[2])
        if block < len(_BLOCKS) and child < len(_BLOCKS[block]):
            return f"{_BLOCKS[block][child]}.{parts[3]}"
    return key
