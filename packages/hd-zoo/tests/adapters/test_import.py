"""The adapters cost nothing until one is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted({"diffusers", "transformers", "huggingface_hub"} & set(sys.modules)))
"""

# As where the libraries are missing: they cannot be imported, and each loader says which one it wants.
WITHOUT = """
import sys
sys.modules["diffusers"] = None
from hd_zoo import adapters
for load in (adapters.load_codec, adapters.load_diffusers_dit, adapters.load_sana):
    try:
        load("nowhere")
    except ModuleNotFoundError as error:
        print(error.name)
"""


@pytest.mark.parametrize("module", ["hd_zoo", "hd_zoo.adapters"])
def test_importing_brings_none_of_the_libraries(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, module], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_missing_library_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["diffusers"] * 3
