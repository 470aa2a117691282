"""Checks of an earlier run in the same folder: resume it, replace it, or refuse."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpn_lightning.cli.config_files import read_yaml
from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.run.identity import defining, differences, run_name, run_names
from bpn_lightning.run.results import read_results

__all__ = ["refuse_earlier", "refuse_other_name"]

NAMED = 3
"""The maximum number of differing keys that a message names."""


def refuse_other_name(folder: Path, names: Mapping[str, Any]) -> None:
    """Refuse a folder that is also the folder of another run under a different name.

    The cause may be a link, or a case-insensitive file system.

    Args:
        folder: of the run.
        names: its :func:`~bpn_lightning.run.identity.run_names`.

    Raises:
        ResultsError: its config.yaml is of a run of another experiment, method or seed.
    """
    found = run_names(_config(folder))
    named = all(found[key] is not None for key in ("experiment", "method", "seed"))
    if named and found != names:
        raise ResultsError(
            f"Expected {folder} to be the folder of {run_name(names)}, but it is that of "
            f"{run_name(found)}, because of a link or a name that differs only in upper and lower case. "
            "Remove the link, choose another name, or another folder with --runs."
        )


def refuse_earlier(folder: Path, config: Mapping[str, Any], resumes: bool) -> None:
    """Refuse a folder with results or a checkpoint of a run that this one does not resume.

    Args:
        folder: of the run.
        config: its :func:`~bpn_lightning.run.identity.defining` part.
        resumes: whether it resumes a checkpoint of this folder.

    Raises:
        ResultsError: names the first keys in which the configurations differ, and the remedy.
    """
    finished = (folder / "results.json").exists() and not (resumes and _ended_early(folder))
    kept = (folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    if not finished and (resumes or not any(path.is_file() for path in kept)):
        return
    there = defining(_config(folder))
    different = differences(config, there, NAMED) if there else []
    if different:
        raise ResultsError(
            f"Expected {folder} to hold no run of another configuration, but got one: "
            f"{'; '.join(different)}. Keep both with another --experiment or --runs, or replace it with "
            "--overwrite."
        )
    if finished:
        raise ResultsError(
            f"Expected {folder} to hold no finished run, but got one with results.json. "
            "Replace it with --overwrite, or use another seed or --runs folder."
        )
    raise ResultsError(
        f"Expected {folder} to hold no unfinished run, but got one with a checkpoint. "
        "Resume it with --ckpt_path last, or replace it with --overwrite."
    )


def _config(folder: Path) -> dict[str, Any]:
    """The content of a run's config.yaml; empty if it cannot be read."""
    try:
        return read_yaml(folder / "config.yaml")
    except ConfigurationError:
        return {}


def _ended_early(folder: Path) -> bool:
    """Whether a run wrote its results before it had learned all tasks."""
    return bool(read_results(folder)["tasks_not_learned"])
