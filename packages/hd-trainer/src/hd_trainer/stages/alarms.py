"""What says, while a stage trains, that it has failed: samples alike, samples of noise, a discriminator that won."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from hd_trainer.context import Context
from hd_trainer.earlier import upgrade_record
from hd_trainer.engine import draws
from hd_trainer.files import read_records
from hd_trainer.writers import METRICS

#: Samples whose pixels vary less than this share of real ones' have collapsed [ours].
LEAST_DEVIATION = 0.5
#: Samples whose neighbouring pixels differ this many times more than real ones' are noise [ours].
MOST_ROUGHNESS = 2.0
#: A discriminator that is right this often has won: its gradient teaches the student nothing [ours].
SATURATED = 0.99
#: Real samples that generated ones are compared with.
REAL_SAMPLES = 500

#: A teacher begins with samples of noise and a student of stage 1 with samples that are alike: while they train, this
#: is no alarm. At the end of a stage each one is.
EARLY: dict[str, tuple[str, ...]] = {
    "teacher": (),
    "trajectory": ("noise",),
    "distribution": ("collapse", "noise", "discriminator"),
}


def deviation(samples: Tensor) -> float:
    """Standard deviation of a pixel over the samples (N, C, H, W), mean over pixels: 0 if all are alike."""
    return float(samples.float().std(dim=0).mean())


def roughness(samples: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels of samples (N, C, H, W), along rows and columns."""
    x = samples.float()
    steps = [float(x.diff(dim=dim).abs().mean()) for dim in (-1, -2) if x.shape[dim] > 1]
    return sum(steps) / max(len(steps), 1)


def compare_with_real(context: Context) -> Callable[[Tensor], dict[str, float]]:
    """A function of samples: their deviation and roughness, each divided by that of real samples."""
    index = draws.shuffled(len(context.data.reference), context.seed)[:REAL_SAMPLES]
    real = context.data.reference.read(index).x
    of_real = max(deviation(real), 1e-9), max(roughness(real), 1e-9)

    def compare(samples: Tensor) -> dict[str, float]:
        return {
            "samples_deviation": deviation(samples) / of_real[0],
            "samples_roughness": roughness(samples) / of_real[1],
        }

    return compare


def find_alarms(stage: str, record: Mapping[str, float], *, at_end: bool = True) -> dict[str, str]:
    """A sentence for each thing that is wrong by a record of metrics.jsonl, but for those that mean nothing yet."""
    found: dict[str, str] = {}
    varied, rough = record.get("samples_deviation", 1.0), record.get("samples_roughness", 1.0)
    if varied < LEAST_DEVIATION:
        found["collapse"] = f"samples are nearly alike: their pixels vary {varied:.2f} times as much as real ones'"
    if rough > MOST_ROUGHNESS:
        found["noise"] = f"samples are noise: neighbouring pixels differ {rough:.1f} times as much as in real ones"
    accuracy = record.get("discriminator_accuracy", 0.5)
    if accuracy >= SATURATED:
        found["discriminator"] = (
            f"the discriminator is right in {accuracy:.1%} of the cases: it has won, and teaches the student nothing; "
            "lower --distribution.discriminator.gan-weight or its learning rate"
        )
    return {kind: text for kind, text in found.items() if at_end or kind in EARLY[stage]}


def alarms_of(stage: str, folder: Path) -> list[str]:
    """The alarms at the end of the stage that was trained in ``folder``; none where none was."""
    records = [upgrade_record(record) for record in read_records(folder / METRICS)]
    return list(find_alarms(stage, records[-1]).values()) if records else []
