"""Convert an official checkpoint to a folder that hd_zoo.from_pretrained reads.

    python tools/convert_checkpoint.py sit_xl_2 SiT-XL-2-256x256.pt teachers/sit_xl_2
    python tools/convert_checkpoint.py dit_xl_2 DiT-XL-2-512x512.pt teachers/dit_512 --set image_size=64
    python tools/convert_checkpoint.py dmf_xl_2 dmf_xl_2_512.pt students/dmf --set image_size=64 'qk_norm="rms"'

Tensors alone are read from a pickle. Weights that do not fit or are not finite are named; nothing is written then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import hd_zoo


def main(arguments: list[str] | None = None) -> int:
    """0 done, 1 the checkpoint does not fit, with the reason."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the network: one that is published, see docs/models.md")
    parser.add_argument("checkpoint", type=Path, help=".pt, .pth, .ckpt or .safetensors")
    parser.add_argument("folder", type=Path, help="where to write config.json and the weights")
    parser.add_argument("--current", action="store_true", help="take the current weights, not their moving average")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings of the network, in JSON"
    )
    options = parser.parse_args(arguments)
    try:
        overrides = dict(setting(one) for one in options.set)
        field = hd_zoo.load_published(options.checkpoint, options.name, averaged=not options.current, **overrides)
        metadata = {"source": options.checkpoint.name, "name": options.name}
        hd_zoo.save_pretrained(field, options.folder, metadata=metadata)
    except (TypeError, ValueError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 1
    cost = hd_zoo.model_cost(field)
    size = f"{cost.parameters:,} parameters, {cost.multiply_adds / 1e9:.2f} G multiply-adds"
    # A path need not be UTF-8; the terminal may be.
    print(f"{os.fsencode(options.folder).decode(errors='backslashreplace')}: {options.name}, {size}")
    return 0


def setting(text: str) -> tuple[str, Any]:
    """A name and a value in JSON, out of "name=value"."""
    name, found, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError as error:
        problem = f"{value!r} is not JSON" if found else "there is no '='"
        raise ValueError(f"--set takes NAME=VALUE with a value in JSON; got {text!r}: {problem}") from error


if __name__ == "__main__":
    sys.exit(main())
