"""One picture file as bytes, by one rule for whatever Pillow reads; and the worker process that decodes many.

Nothing here imports PyTorch: a worker is ready in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

#: Formats that Pillow opens by starting another program, or knows by name alone.
_LEFT_OUT = frozenset({"EPS", "BUFR", "GRIB", "HDF5", "WMF", "MPEG"})
_GREY = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"})
_WITH_ALPHA = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})
_ORIENTATION = 0x0112  # EXIF; 5 to 8 are turned by 90 degrees

#: What Pillow raises over damaged or hostile files.
_FAULTS: tuple[type[Exception], ...] = (
    *(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, SyntaxError, OverflowError, EOFError),
    *(MemoryError, RuntimeError, NotImplementedError, struct.error, ZeroDivisionError, AssertionError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


class UnreadableError(ValueError):
    """A picture that cannot be read; the message says why, in a few words."""


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that are opened."""
    Image.init()
    return tuple(sorted(set(Image.ID) - _LEFT_OUT))


@functools.cache
def suffixes() -> frozenset[str]:
    """File names that end in one of these, in small letters, are pictures."""
    wanted = set(formats()) & set(Image.OPEN)
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in wanted)


def read_head(source: Path | bytes) -> tuple[tuple[int, int], bool]:
    """((width, height) as shown, whether it is grey), without decoding the picture.

    Raises:
        UnreadableError: if there is no picture in it.
    """
    with _opened(source) as image:
        width, height = image.size
        if image.getexif().get(_ORIENTATION) in (5, 6, 7, 8):
            width, height = height, width
        return (width, height), image.mode in _GREY


def decode(source: Path | bytes, size: int | None, channels: int) -> np.ndarray:
    """The picture as (height, width, channels) uint8.

    Of an animation the first frame; turned as its EXIF says; 16 bits scaled to 8; what is transparent on white; other
    colour spaces as RGB; one channel as luma. With a ``size`` the square in its centre, scaled with antialiasing
    (Lanczos) to size x size; None: as it is.

    Raises:
        UnreadableError: if it cannot be read.
    """
    with _opened(source) as first:
        first.load()
        image = _on_white(_in_eight_bits(ImageOps.exif_transpose(first)))
        image = image.convert("L" if channels == 1 else "RGB")
        if size is not None:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            image = image.crop(box) if side == size else image.resize((size, size), Image.Resampling.LANCZOS, box=box)
        return np.asarray(image).reshape(image.height, image.width, channels)


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    """The picture; whatever goes wrong with it inside is an UnreadableError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=formats()) as image:
                yield image
    except UnreadableError:
        raise
    except _FAULTS as error:
        reason = "no picture" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableError(" ".join(reason.split())[:80] or type(error).__name__) from error


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Of 16 bits, v becomes v / 257; a number of 32 bits must be one of 16."""
    if image.mode == "F":
        raise UnreadableError("floating-point pixels have no stated range")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableError("pixels of more than 16 bits")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return image
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


# ---- a worker: a line of JSON in, for each picture of it an answer out

READ, UNREADABLE = b"+", b"-"


def serve() -> None:
    """Answer lines of {"paths", "size", "channels"} on stdin until it is closed, also by the end of whoever asked.

    An answer is "+" and the picture's height, width and bytes; or "-" and the length and bytes of the reason.
    """
    out = sys.stdout.buffer
    for line in sys.stdin.buffer:
        request = json.loads(line)
        for path in request["paths"]:
            try:
                pixels = decode(Path(path), request["size"], request["channels"])
                out.write(READ + struct.pack("<II", *pixels.shape[:2]) + pixels.tobytes())
            except UnreadableError as error:
                reason = str(error).encode(errors="backslashreplace")
                out.write(UNREADABLE + struct.pack("<I", len(reason)) + reason)
            out.flush()
