"""Names that earlier versions wrote to disk, and what they are called now: runs made before are still read."""

from __future__ import annotations

from typing import Any

#: Written into recipe.json; a file without it is of the first format.
FORMAT = 2

#: Setting of the first format -> where it stands now. What is not named here has kept its place.
SETTINGS = {
    "teacher.label_dropout": "teacher.condition_dropout",
    "teacher.time_mean": "teacher.times.mean",
    "teacher.time_std": "teacher.times.std",
    "trajectory.time_mean": "trajectory.times.mean",
    "trajectory.time_std": "trajectory.times.std",
    "trajectory.interval_share": "trajectory.times.interval_share",
    "trajectory.endpoint_share": "trajectory.times.endpoint_share",
    "trajectory.p": "trajectory.meanflow.p",
    "trajectory.c": "trajectory.meanflow.c",
    "trajectory.derivative": "trajectory.meanflow.derivative",
    "distribution.student_every": "distribution.student_update_every",
    "distribution.fake_optimizer": "distribution.fake_score_optimizer",
    "distribution.adversary.weight": "distribution.discriminator.gan_weight",
    "distribution.adversary.loss": "distribution.discriminator.gan_loss",
    "distribution.adversary.layers": "distribution.discriminator.layers",
    "distribution.adversary.r1_weight": "distribution.discriminator.r1_weight",
    "distribution.adversary.r1_std": "distribution.discriminator.r1_std",
    "distribution.adversary.optimizer": "distribution.discriminator.optimizer",
    **{
        f"{stage}.guidance_{name}": f"{stage}.guidance.{name}"
        for stage in ("trajectory", "distribution", "evaluation")
        for name in ("scale", "interval")
    },
}

#: Of the discriminator's network: in settings below ``distribution.adversary``, in discriminator.json at the top.
DISCRIMINATOR = {
    "pooling": "pooling",
    "merge": "merge",
    "weighed": "pool_over",
    "queries": "num_queries",
    "heads": "num_heads",
    "head_width": "head_width",
    "hidden": "hidden",
}
SETTINGS |= {
    f"distribution.adversary.{old}": f"distribution.discriminator.network.{new}" for old, new in DISCRIMINATOR.items()
}

#: Of pool_over, whose values have changed with its name.
POOL_OVER = {"vectors": "features"}

#: Pairs (low, high) that are samplers of noise levels now.
LEVELS = {
    "distribution.levels": "distribution.noise_levels",
    "distribution.adversary.levels": "distribution.discriminator.noise_levels",
}

#: Of metrics.jsonl, where a name has changed.
METRICS = {
    "error_at_r_equal_t": "error_r_equal_t",
    "error_at_intervals": "error_r_below_t",
    "student_adversarial": "gan_loss",
    "student_gradient": "gradient_norm",
    "fake_score": "fake_score_loss",
    "discriminator": "discriminator_loss",
    "told_apart": "discriminator_accuracy",
}


def upgrade_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The object of a recipe.json in today's names; one of today's is handed back without its format."""
    if values.get("format") == FORMAT:
        return {name: value for name, value in values.items() if name != "format"}
    found: dict[str, Any] = {}
    for path, value in _leaves(values):
        if path == "distribution.adversary.weighed":
            value = POOL_OVER.get(value, value)
        for old, new in SETTINGS.items():
            if path == old or path.startswith(f"{old}."):
                path = new + path[len(old) :]
                break
        if path in LEVELS and isinstance(value, list) and len(value) == 2:
            _put(found, f"{LEVELS[path]}.low", value[0])
            _put(found, f"{LEVELS[path]}.high", value[1])
        else:
            _put(found, path, value)
    if isinstance(found.get("teacher"), dict):
        _put(found, "teacher.times.interval_share", 0.0)
    return found


def upgrade_discriminator(facts: dict[str, Any]) -> dict[str, Any]:
    """The object of a discriminator.json in today's names."""
    if "network" in facts:
        return facts
    network = {new: facts[old] for old, new in DISCRIMINATOR.items() if old in facts}
    if "pool_over" in network:
        network["pool_over"] = POOL_OVER.get(network["pool_over"], network["pool_over"])
    return {"widths": facts.get("widths"), "network": network, "layers": facts.get("layers")}


def upgrade_record(record: dict[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl in today's names."""
    return {METRICS.get(name, name): value for name, value in record.items()}


def upgrade_evaluation(results: dict[str, Any]) -> dict[str, Any]:
    """The object of an evaluation.json in today's names: the first versions had one extractor, named as its data."""
    if "extractors" in results:
        return results
    rows = results.get("rows")
    measured = isinstance(rows, list) and any(isinstance(row, dict) and row.get("fd") is not None for row in rows)
    return {**results, "extractors": [{"name": results.get("data", "digits")}] if measured else []}


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        values = inner if isinstance(inner, dict) else {}
    values[name] = value
