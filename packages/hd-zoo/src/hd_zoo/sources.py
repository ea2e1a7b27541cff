"""Where published weights come from, as data: one :class:`Source` a checkpoint. docs/models.md's table is made of it.

What is not known is None. ``seen`` says what a line rests on; nothing here was downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Source:
    """One published checkpoint and what it takes to read it."""

    title: str
    """Network and picture size, as its publisher names them."""
    name: str | None
    """Of the network in :func:`hd_zoo.list_models`; None where an adapter builds it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Beside the name, for :func:`hd_zoo.load_published`."""
    reader: str = "load_published"
    """The function that reads it."""
    publisher: str
    """Repository of the code."""
    paper: str
    """arXiv number."""
    licence: str | None
    """Of code and weights, as the publisher states it."""
    file: str | None
    """File name."""
    where: str | None
    """A hub's id, or where the publisher's code fetches the file from."""
    keys: str
    """Layout of the names: "dit" is the family's own, "diffusers" that library's."""
    clock: str
    """What its t = 0 is."""
    predicts: str
    """What the network answers with."""
    codec: str
    """The autoencoder of its latents."""
    latents: str
    """Statistics of the samples: how latents are scaled before the network sees them."""
    seen: str
    """What was read for this line."""


SOURCES: dict[str, Source] = {
    "SiT-XL-2-256x256.pt": Source(
        title="SiT-XL/2, 256",
        name="sit_xl_2",
        publisher="willisma/SiT",
        paper="2401.08740",
        licence=None,
        file="SiT-XL-2-256x256.pt",
        where="the publisher's download.py (Dropbox)",
        keys="dit",
        clock="noise",
        predicts="velocity; the second half of the channels is unused",
        codec="stabilityai/sd-vae-ft-ema",
        latents="times 0.18215",
        seen="download.py; licence, codec and scale were not checked",
    ),
    "DiT-XL-2-256x256.pt": Source(
        title="DiT-XL/2, 256",
        name="dit_xl_2",
        publisher="facebookresearch/DiT",
        paper="2212.09748",
        licence="CC-BY-NC",
        file="DiT-XL-2-256x256.pt",
        where="the publisher's README (dl.fbaipublicfiles.com/DiT/models)",
        keys="dit",
        clock="data, 1,000 steps",
        predicts="noise and variance",
        codec="stabilityai/sd-vae-ft-ema",
        latents="times 0.18215",
        seen="README; codec and scale were not checked",
    ),
    "DiT-XL-2-512x512.pt": Source(
        title="DiT-XL/2, 512",
        name="dit_xl_2",
        settings={"image_size": 64},
        publisher="facebookresearch/DiT",
        paper="2212.09748",
        licence="CC-BY-NC",
        file="DiT-XL-2-512x512.pt",
        where="the publisher's README (dl.fbaipublicfiles.com/DiT/models)",
        keys="dit",
        clock="data, 1,000 steps",
        predicts="noise and variance",
        codec="stabilityai/sd-vae-ft-ema",
        latents="times 0.18215",
        seen="README; codec and scale were not checked",
    ),
    "lightningdit-xl-imagenet256-800ep.pt": Source(
        title="LightningDiT-XL/1, 256",
        name="lightningdit_xl_1",
        publisher="hustvl/LightningDiT",
        paper="2501.01423",
        licence="MIT",
        file="lightningdit-xl-imagenet256-800ep.pt",
        where="hustvl/lightningdit-xl-imagenet256-800ep",
        keys="dit",
        clock="noise",
        predicts="velocity",
        codec="VA-VAE f16d32 (not here)",
        latents="mean and deviation per channel, latents_stats.pt of hustvl/vavae-imagenet256-f16d32-dinov2",
        seen="README of a fork, others' download lists",
    ),
    "REPA": Source(
        title="REPA SiT-XL/2, 256",
        name="repa_xl_2",
        publisher="sihyun-yu/REPA",
        paper="2410.06940",
        licence="MIT",
        file=None,
        where="the publisher's generate.py, without --ckpt",
        keys="dit, and projectors that are left out",
        clock="data",
        predicts="velocity",
        codec="stabilityai/sd-vae-ft-ema (its generate.py's default; -mse by an option)",
        latents="times 0.18215",
        seen="README, generate.py, LICENSE",
    ),
    "MeanFlow": Source(
        title="MeanFlow SiT-XL/2, 256, in PyTorch",
        name="meanflow_xl_2",
        publisher="zhuyu-cs/MeanFlow",
        paper="2505.13447",
        licence="MIT",
        file=None,
        where=None,
        keys="dit, with r_embedder for t - r",
        clock="data",
        predicts="mean velocity",
        codec="stabilityai/sd-vae-ft-ema",
        latents="(z - mean) / (2 deviation) per channel; mean 0.86488, -0.27787343, 0.21616915, 0.3738409, "
        "deviation 4.85503674, 5.31922414, 3.93725398, 3.9870003",
        seen="README, sit.py, evaluate.py; no weights are linked there",
    ),
    "dmf_xl_2_256.pt": Source(
        title="DMF-XL/2+, 256",
        name="dmf_xl_2",
        publisher="kyungmnlee/dmf",
        paper="2510.24474",
        licence=None,
        file="dmf_xl_2_256.pt",
        where="kyungmnlee/DMF",
        keys="dit, and a logvar_linear that is left out",
        clock="data",
        predicts="mean velocity; t for the first 20 blocks, r for the others and the head",
        codec="stabilityai/sd-vae-ft-ema",
        latents="times 0.18215",
        seen="README, models/dmft.py, models/layers.py, generate.py, scripts/",
    ),
    "dmf_xl_2_512.pt": Source(
        title="DMF-XL/2+, 512",
        name="dmf_xl_2",
        settings={"image_size": 64, "qk_norm": "rms"},
        publisher="kyungmnlee/dmf",
        paper="2510.24474",
        licence=None,
        file="dmf_xl_2_512.pt",
        where="kyungmnlee/DMF",
        keys="dit, and a logvar_linear that is left out; RMSNorm's weight is called scale",
        clock="data",
        predicts="mean velocity; t for the first 20 blocks, r for the others and the head",
        codec="stabilityai/sd-vae-ft-ema",
        latents="times 0.18215",
        seen="README, models/dmft.py, models/layers.py, generate.py, scripts/",
    ),
    "facebook/DiT-XL-2-256": Source(
        title="DiT-XL/2, 256, for diffusers",
        name=None,
        reader="load_diffusers_dit",
        publisher="facebookresearch/DiT",
        paper="2212.09748",
        licence="CC-BY-NC",
        file="transformer/",
        where="facebook/DiT-XL-2-256, folder transformer",
        keys="diffusers",
        clock="data, 1,000 steps",
        predicts="noise and variance",
        codec="AutoencoderKL",
        latents="times 0.18215",
        seen="diffusers' own class, with random weights",
    ),
    "Sana": Source(
        title="Sana 0.6B and 1.6B, for diffusers",
        name=None,
        reader="load_sana",
        publisher="NVlabs/Sana",
        paper="2410.10629",
        licence=None,
        file="transformer/",
        where="Efficient-Large-Model/Sana_600M_512px_diffusers, folder transformer",
        keys="diffusers",
        clock="data",
        predicts="velocity",
        codec="AutoencoderDC",
        latents="times the codec's scaling_factor",
        seen="diffusers' own class, with random weights",
    ),
}


def call(source: Source) -> str:
    """How to read it, as code."""
    if source.name is None:
        return f'{source.reader}("{(source.where or "").split(",")[0]}", subfolder="transformer")'
    settings = "".join(f", {key}={value!r}".replace("'", '"') for key, value in source.settings.items())
    return f'load_published(path, "{source.name}"{settings})'


def short_table() -> list[str]:
    """For a README: what there is and how to read it, in Markdown."""
    lines = ["| checkpoint | publisher | read by |", "|---|---|---|"]
    return lines + [f"| {one.title} | {one.publisher} | `{call(one)}` |" for one in SOURCES.values()]


def full_table() -> list[str]:
    """Every checkpoint with all that is known of it, one section each, in Markdown."""
    lines: list[str] = []
    for one in SOURCES.values():
        lines += ["", f"### {one.title}", "", f"    {call(one)}", "", "| | |", "|---|---|"]
        rows = {
            "publisher": f"{one.publisher}, arXiv {one.paper}",
            "licence": one.licence,
            "file": one.file and f"`{one.file}`",
            "where": one.where,
            "names of weights": one.keys,
            "its t = 0 is": one.clock,
            "predicts": one.predicts,
            "codec": one.codec,
            "samples": one.latents,
            "read for this page": one.seen,
        }
        lines += [f"| {key} | {value or 'unknown'} |" for key, value in rows.items()]
    return lines[1:]
