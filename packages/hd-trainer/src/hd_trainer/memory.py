"""Whether a run fits into the memory: a slip of the finger ends in one line, not in a process that the system kills."""

from __future__ import annotations

import torch
from torch import Tensor

from hd_trainer.context import Context
from hd_trainer.engine.parallel import total_memory
from hd_trainer.errors import UserError
from hd_trainer.networks import cost_of
from hd_trainer.settings import Settings
from hd_trainer.stages import STAGES


def check_memory(settings: Settings, context: Context) -> None:
    """Refuse what cannot fit, by a count of what training and measuring hold at least.

    Raises:
        UserError: naming the flag with the largest share.
    """
    total = total_memory(context.device)
    if total is None:
        return
    if settings.teacher_source is None:
        cost = cost_of(settings.model, context.data.shape, len(context.data.classes))
        _check("--model.width and --model.depth", cost.training_bytes(0), total)
        for stage in STAGES:
            _check(f"--{stage}.batch", cost.training_bytes(getattr(settings, stage).batch), total)
    size = 4 * context.data.train.read(_first()).x.numel()
    # The noise and the images are held at once.
    _check("--evaluation.samples", 2 * size * (settings.evaluation.samples or 0), total)


def _first() -> Tensor:
    return torch.zeros(1, dtype=torch.long)


def _check(flag: str, needed: int, total: int) -> None:
    if needed > total:
        raise UserError(
            f"{flag}: this needs {needed / 1e9:,.1f} GB of memory at least, there are {total / 1e9:.1f} GB: lower it"
        )
