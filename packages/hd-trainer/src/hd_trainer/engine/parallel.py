"""Processes and devices: the one place where their number matters. Today a run is one process on one device."""

from __future__ import annotations

import os

import torch

from hd_trainer.errors import UserError


def check_single_process() -> None:
    """Refuse a launch by torchrun and its like, which would start several runs in one folder.

    Raises:
        UserError: if the environment says that this is one of several processes.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise UserError(
            f"a run is a single process; this one was started as one of {size} (WORLD_SIZE). Start it without torchrun"
        )


def choose_device(name: str) -> torch.device:
    """ "auto" is the accelerator if there is one, else the CPU.

    Raises:
        UserError: for a device that PyTorch does not know or does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f'device "{name}" cannot be used here ({reason}); try "auto"') from error
    if device.type == "meta":
        raise UserError('device "meta" holds no numbers; try "auto"')
    return device


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def total_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory, or of the machine's for the CPU; None where it cannot be known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None
