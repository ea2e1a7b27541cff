"""Convert an official checkpoint to a folder that hd_zoo.from_pretrained reads.

    python tools/convert_checkpoint.py sit_xl_2 SiT-XL-2-256x256.pt teachers/sit_xl_2
    python tools/convert_checkpoint.py dit_xl_2 DiT-XL-2-512x512.pt teachers/dit_512 --set image_size=64
    python tools/convert_checkpoint.py sit_xl_2 repa.pt teachers/repa --set reversed_time=false learned_variance=false

Tensors alone are read from a pickle. Missing and unexpected weights are all named, and nothing is written then.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import hd_zoo


def main(arguments: list[str] | None = None) -> int:
    """0 done, 1 the checkpoint does not fit, with the reason."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the network: sit_*, dit_* or lightningdit_*")
    parser.add_argument("checkpoint", type=Path, help=".pt, .pth, .ckpt or .safetensors")
    parser.add_argument("folder", type=Path, help="where to write config.json and the weights")
    parser.add_argument("--current", action="store_true", help="take the current weights, not their moving average")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the network, in JSON")
    options = parser.parse_args(arguments)
    try:
        overrides = {name: json.loads(value) for name, value in (one.split("=", 1) for one in options.set)}
        field = hd_zoo.load_published(options.checkpoint, options.name, averaged=not options.current, **overrides)
    except (ValueError, FileNotFoundError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 1
    cost = hd_zoo.model_cost(field)
    hd_zoo.save_pretrained(field, options.folder, metadata={"source": options.checkpoint.name, "name": options.name})
    size = f"{cost.parameters:,} parameters, {cost.multiply_adds / 1e9:.2f} G multiply-adds"
    print(f"{options.folder}: {options.name}, {size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
