"""Continuing from a past run: the streams that were learned, and what is recorded of it."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from bpn_lightning.cli.past import PastRun, runs_before
from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.export.exporting import past_of_export, restore_exported
from bpn_lightning.files.untrusted import read_text
from bpn_lightning.model.extending import past_of
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.run.checkpoints import callback_state, read_checkpoint
from bpn_lightning.run.identity import run_name, run_names
from bpn_lightning.run.recording import LastCheckpoint
from bpn_lightning.run.results import read_results
from bpn_lightning.run.schema import Continues
from bpn_lightning.tasks import Past

__all__ = ["continue_stream", "list_tasks"]


def continue_stream(
    stream: ContinualDataModule,
    run: PastRun,
    learned: Sequence[ContinualDataModule] | None,
    module: ContinualModule | None,
    past_tasks: int | None = None,
) -> Continues:
    """Let a stream follow those of a past run and of the runs before it.

    Args:
        stream: of the new tasks.
        run: that goes on.
        learned: the streams of all past runs, the oldest first; None if accuracies on their tasks are
            not to be measured.
        module: that gets what an export holds; a checkpoint is loaded by the trainer. None where the run
            resumes a checkpoint of its own.
        past_tasks: how many tasks were learned before the run that resumes, where an export may have more by
            now, as it adds its own.

    Returns:
        What results say of the past run, which may be gone when they are written.

    Raises:
        ConfigurationError: there is not one stream for each past run.
        CheckpointError: the checkpoint of a run, or the export, is damaged, or of another kind.
    """
    saved = {} if run.checkpoint is None else read_checkpoint(run.checkpoint)
    past, before = past_of(saved) if saved else _past(run), None
    if past_tasks is not None:
        past = past.first(past_tasks)
    if learned:
        runs = runs_before(run)
        if len(learned) != len(runs):
            raise ConfigurationError(
                f"Expected past_data to list one stream for each of the {len(runs)} runs that are past, the "
                f"oldest first, but got {len(learned)}. Use --past_data alone to take those of their "
                "config.yaml."
            )
        pasts = [*map(_past, runs[:-1]), past]
        before, *later = learned
        if before.seed is None:
            before.seed = pasts[0].seed
        for following, of in zip(later, pasts, strict=False):
            following.continue_from(of, before)
            before = following
    if run.checkpoint is None and module is not None:
        restore_exported(module, run.folder)
        module.extend(stream, before)
    else:
        stream.continue_from(past, before)
    return _description(run, saved, past)


def _past(run: PastRun) -> Past:
    if run.checkpoint is None:
        return past_of_export(run.folder)
    return past_of(read_checkpoint(run.checkpoint))


def _description(run: PastRun, saved: Mapping[str, Any], past: Past) -> Continues:
    names = callback_state(saved, LastCheckpoint.__qualname__).get("run")
    known = names if isinstance(names, Mapping) and names.keys() >= run_names({}).keys() else None
    results, date, digest = run.folder / "results.json", None, None
    try:
        date = read_results(results)["provenance"]["date"]
        digest = sha256(read_text(results).encode()).hexdigest()
    except ResultsError:  # the checkpoint stands alone
        pass
    return {
        "run": run_name(known) if known else run.source.name,
        "tasks": len(past.tasks),
        "date": date,
        "results_sha256": digest,
    }


def list_tasks(run: PastRun) -> str:
    """The tasks that a run has learned, as a table in plain text.

    Raises:
        CheckpointError: its checkpoint, or the export, is damaged, or of another kind.
    """
    past = _past(run)
    lines = [f"{'task':<6}{'head columns':<14}{'epochs':<8}classes"]
    for task in past.tasks:
        first, stop = task.columns
        columns = f"{first}" if stop == first + 1 else f"{first} to {stop - 1}"
        left = "" if task.id < past.learned else "  (not learned yet)"
        lines.append(f"{task.id + 1:<6}{columns:<14}{task.epochs:<8}{task.name}{left}")
    return "\n".join(lines)
