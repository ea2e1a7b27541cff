"""A run's folder: the settings and the sources noted in it, and where the weights of a stage are found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hd_trainer.earlier import FORMAT
from hd_trainer.engine.checkpoint import complete_checkpoints
from hd_trainer.engine.loop import DONE
from hd_trainer.errors import UserError
from hd_trainer.files import make_folder, read_json, remove_incomplete, write_json
from hd_trainer.networks import CONFIG, is_folder_of_ours, resolve, source_digest
from hd_trainer.settings import Settings, differences, settings_from_json, to_json
from hd_trainer.stages import STAGES

RECIPE, SOURCES = "recipe.json", "sources.json"

#: What may differ between two calls for one run: where it computes, where its curves go, and how it is measured.
MAY_DIFFER = ("device", "writers", "evaluation.")
#: As well where a teacher is given: its hash is held in sources.json, and its folder may have another name today.
WITH_A_TEACHER = ("teacher_source",)


def make_run_folder(out: Path) -> None:
    """Create the run's folder, make sure that files can be written there, remove what a killed process left behind.

    Raises:
        UserError: for a folder that cannot be written.
    """
    make_folder(out)
    remove_incomplete(out)


def claim(settings: Settings, out: Path) -> None:
    """Note the settings in the run's folder; refuse a folder that holds a run with others.

    Raises:
        UserError: for a folder that cannot be written, or holds another run.
    """
    make_run_folder(out)
    check_claim(settings, out)
    write_json(out / RECIPE, to_json(settings))


def check_claim(settings: Settings, out: Path) -> None:
    """Raises UserError if the folder holds a run with other settings; writes nothing."""
    if not (out / RECIPE).exists():
        return
    _refuse_unfinished_of_another_format(out)
    # As this version reads them: a setting that is younger than the run has its default.
    found = differences(to_json(settings), to_json(read_settings(out)))
    given = settings.teacher_source is not None
    found = [line for line in found if not line.startswith((*MAY_DIFFER, *WITH_A_TEACHER * given))]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{out} holds a run with other settings ({'; '.join(found[:3])}{more}); choose another --out or remove it"
        )


def _refuse_unfinished_of_another_format(out: Path) -> None:
    if read_json(out / RECIPE).get("format") == FORMAT:
        return
    begun = [stage for stage in STAGES if complete_checkpoints(out / stage) and not (out / stage / DONE).exists()]
    if begun:
        raise UserError(
            f"{out} was begun by an earlier version and is not finished ({', '.join(begun)}); "
            "finish it with that version, or choose another --out"
        )


def read_settings(out: Path) -> Settings:
    """The settings noted in a run's folder, for evaluating or reporting it again.

    Raises:
        UserError: if there is no run, or its settings are not this version's.
    """
    if not (out / RECIPE).exists():
        raise UserError(f"{out} is not a run's folder (no {RECIPE}); make one with: hdistill run digits --out {out}")
    return settings_from_json(read_json(out / RECIPE), str(out / RECIPE))


def check_sources(folder: Path, sources: dict[str, str | Path]) -> None:
    """Raises UserError if the folder was begun from other weights: going on would mix two runs."""
    _sources(folder, sources)


def note_sources(folder: Path, sources: dict[str, str | Path]) -> None:
    """Note in ``folder/sources.json`` which weights it starts from, by their hash.

    Raises:
        UserError: see :func:`check_sources`.
    """
    noted, found = _sources(folder, sources)
    if found.keys() - noted.keys() or not (folder / SOURCES).exists():
        write_json(folder / SOURCES, {**noted, **found})


def _sources(
    folder: Path, sources: dict[str, str | Path]
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """What is noted in a folder and what is there now, place and hash by name, where they do not contradict."""
    found = {}
    for name, source in sources.items():
        place = resolve(source)
        kind = "folder" if is_folder_of_ours(place) else "source"
        found[name] = {kind: place, "sha256": source_digest(source)}
    noted = _read_sources(folder)
    for name in found.keys() & noted.keys():
        if noted[name]["sha256"] != found[name]["sha256"]:
            place = found[name].get("folder") or found[name]["source"]
            raise UserError(
                f"{folder} was begun from another {name} than the one in {place}; choose another --out or remove it"
            )
    return noted, found


def _read_sources(folder: Path) -> dict[str, dict[str, str]]:
    """Folder or source, and hash, by name, as :func:`note_sources` wrote them; empty where there is no such file.

    Raises:
        UserError: if it is not of that form.
    """
    path = folder / SOURCES
    noted = read_json(path) if path.exists() else {}
    for name, entry in noted.items():
        place = (entry.get("folder") or entry.get("source")) if isinstance(entry, dict) else None
        if not isinstance(place, str) or not isinstance(entry.get("sha256"), str):
            raise UserError(f"{path} does not hold folder and sha256 of {name[:60]!a}; remove it and run again")
        try:
            Path(place).is_dir()
        except (OSError, ValueError) as error:  # too long, or no text that a file system takes
            raise UserError(f"{path} names an impossible folder for {name[:60]!a}; remove it and run again") from error
    return noted


def brought(out: Path) -> dict[str, str]:
    """Where the weights that a run was given are, by "teacher" and "student"; empty where it trained its own."""
    noted = _read_sources(out)
    return {
        name: noted[name].get("folder") or noted[name]["source"] for name in ("teacher", "student") if name in noted
    }


def stage_folders(out: Path) -> dict[str, str | Path]:
    """Where the weights of each stage of a run are: trained here, or brought from elsewhere; finished ones alone.

    Raises:
        UserError: if there is none.
    """
    found = dict(_stage_folders(out))
    if not found:
        raise UserError(f"no trained stage in {out}; make one with: hdistill run digits --out {out}")
    return found


def _stage_folders(out: Path) -> Iterator[tuple[str, str | Path]]:
    given = brought(out)
    for stage, source in zip(STAGES, ("teacher", "student", ""), strict=True):
        if (out / stage / CONFIG).exists():
            yield stage, out / stage
        elif source in given:
            yield stage, given[source]


def last_stage(folder: Path) -> str | Path:
    """The folder itself if it holds a network's weights; of a run's folder its last finished stage.

    Raises:
        UserError: if it is neither.
    """
    if (folder / CONFIG).exists() or not (folder / RECIPE).exists():
        return folder
    return list(stage_folders(folder).values())[-1]
