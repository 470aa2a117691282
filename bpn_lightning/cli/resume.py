"""The checkpoint that a run resumes: finding it, and checking its integrity and its run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpn_lightning.cli.output import notify
from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.export.adding import AddToBundle
from bpn_lightning.run.checkpoints import callback_state, read_checkpoint
from bpn_lightning.run.dashboards import Dashboard
from bpn_lightning.run.identity import differences, run_name
from bpn_lightning.run.loggers import SavedLogger
from bpn_lightning.run.recording import LastCheckpoint

__all__ = ["Resumed", "find_checkpoint", "how_to_resume", "last_checkpoint", "previous_checkpoint"]


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to resume.

    Args:
        path: the file.
        loggers: the loggers of the run, and the IDs of the runs to which they append.
        global_step: number of updates before it.
        adding: state of :class:`~bpn_lightning.export.adding.AddToBundle` in it; empty where there was none.
    """

    path: Path
    loggers: list[SavedLogger]
    global_step: int
    adding: Mapping[str, Any]


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of the run in a folder."""
    return folder / "checkpoints" / "last.ckpt"


def previous_checkpoint(folder: Path) -> Path:
    """The checkpoint before the newest."""
    return last_checkpoint(folder).with_name("previous.ckpt")


def find_checkpoint(
    wanted: str | None, folder: Path, identity: Mapping[str, Any]
) -> Resumed | None:
    """The checkpoint to resume, which is intact and of this run; None to start from scratch.

    Args:
        wanted: a path; or ``"last"`` for the newest in the folder, or the previous one if that is
            damaged; or None.
        folder: of this run.
        identity: has to equal that of the run that saved the checkpoint.

    Raises:
        ConfigurationError: the file does not exist.
        CheckpointError: it is damaged, or of another run or configuration.
    """
    if wanted is None:
        return None
    last, previous = last_checkpoint(folder), previous_checkpoint(folder)
    paths = [last, previous] if wanted == "last" else [Path(wanted)]
    if not any(path.is_file() for path in paths):
        if wanted == "last":
            notify(f"There is no {last} yet: this run starts from scratch.")
            return None
        raise ConfigurationError(
            f"Expected ckpt_path to be 'last' or a checkpoint, but there is no file {wanted!r}. "
            f"Those of this run are in {last.parent}."
        )
    problems = []
    for path in paths:
        if not path.is_file():
            problems.append(f"There is no {path}.")
            continue
        try:
            saved = read_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            notify(f"warning: {problems[0]} Resuming from {path}, the checkpoint before it.")
        _check_run(path, saved, identity)
        loggers = callback_state(saved, Dashboard.__qualname__).get("loggers", [])
        versions = [(kind, version) for kind, version, _ in loggers]
        adding = callback_state(saved, AddToBundle.__qualname__)
        return Resumed(path, versions, saved["global_step"], adding)
    raise CheckpointError(
        f"{' '.join(problems)} Start from scratch with --overwrite instead of --ckpt_path."
    )


def _check_run(path: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run, and name the differences."""
    there = callback_state(saved, LastCheckpoint.__qualname__).get("run")
    if there is None:  # saved by other code; the module checks it
        return
    if not isinstance(there, Mapping) or there.keys() != here.keys():
        raise CheckpointError(
            f"Expected {path} to contain the identity of its run, but got {there!r:.80}. Start from "
            "scratch with --overwrite instead of --ckpt_path."
        )
    if run_name(there) != run_name(here):
        raise CheckpointError(
            f"Expected ckpt_path to be a checkpoint of {run_name(here)}, but {path} is "
            f"one of {run_name(there)}. Resume that run with its own config, method and seed."
        )
    different = differences(here["config"], there["config"])
    if different:
        raise CheckpointError(
            f"Expected ckpt_path to be a checkpoint of this configuration, but {path} differs: "
            f"{'; '.join(different)}. Resume with the configuration that wrote it (config.yaml "
            "next to it), or start a new run in another --runs folder."
        )


def how_to_resume(folder: Path, overwrite: bool) -> str:
    """A message on the files of a stopped run, and how to resume it.

    Args:
        folder: of the run.
        overwrite: whether its command has --overwrite.
    """
    if (folder / "results.json").exists():
        return f"{folder} has its results."
    if not any(path.exists() for path in (last_checkpoint(folder), previous_checkpoint(folder))):
        return "It had no checkpoint yet."
    replaced = " instead of --overwrite" if overwrite else ""
    return f"The same command with --ckpt_path last{replaced} resumes {folder}."
