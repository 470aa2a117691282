"""Going on from a past run: the streams that were learned, and what is recorded of it."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from bpn_lightning.cli.past import PastRun, runs_before
from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.model.extending import past_of
from bpn_lightning.run.checkpoints import callback_state, read_checkpoint
from bpn_lightning.run.identity import run_name
from bpn_lightning.run.recording import LastCheckpoint
from bpn_lightning.run.results import read_results
from bpn_lightning.run.schema import Continues
from bpn_lightning.tasks import Past
from bpn_lightning.untrusted import read_text

__all__ = ["continue_stream", "describe_past", "list_tasks", "read_past"]


def read_past(run: PastRun) -> Past:
    """What the checkpoint of a run says of its tasks.

    Raises:
        CheckpointError: it is damaged, or of another kind.
    """
    return past_of(read_checkpoint(run.checkpoint))


def continue_stream(
    stream: ContinualDataModule, run: PastRun, learned: Sequence[ContinualDataModule] | None
) -> None:
    """Let a stream follow those of a past run and of the runs before it.

    Args:
        stream: of the new tasks.
        run: that goes on.
        learned: the streams of all past runs, the oldest first; None if accuracies on their tasks are
            not to be measured.

    Raises:
        ConfigurationError: there is not one stream for each past run.
        CheckpointError: the checkpoint of a run is damaged, or of another kind.
    """
    if not learned:
        stream.continue_from(read_past(run))
        return
    runs = runs_before(run)
    if len(learned) != len(runs):
        raise ConfigurationError(
            f"Expected past_data to list one stream for each of the {len(runs)} runs that are past, the "
            f"oldest first, but got {len(learned)}. Use --past_data alone to take those of their config.yaml."
        )
    pasts = [read_past(one) for one in runs]
    before = learned[0]
    if before.seed is None:
        before.seed = pasts[0].seed
    for past, following in zip(pasts, [*learned[1:], stream], strict=True):
        following.continue_from(past, before)
        before = following


def describe_past(run: PastRun) -> Continues:
    """What the results of a run say of the one that it goes on from."""
    saved = read_checkpoint(run.checkpoint)
    identity: Any = callback_state(saved, LastCheckpoint.__qualname__).get("run")
    results, date, digest = run.folder / "results.json", None, None
    try:
        date = read_results(results)["provenance"]["date"]
        digest = sha256(read_text(results).encode()).hexdigest()
    except ResultsError:  # the checkpoint stands alone
        pass
    return {
        "run": run_name(identity) if identity else run.checkpoint.name,
        "tasks": len(past_of(saved).tasks),
        "date": date,
        "results_sha256": digest,
    }


def list_tasks(run: PastRun) -> str:
    """The tasks that a run has learned, as a table in plain text.

    Raises:
        CheckpointError: its checkpoint is damaged, or of another kind.
    """
    saved = read_checkpoint(run.checkpoint)
    past, learned = past_of(saved), saved["continual"]["cursor"]["closed"] + 1
    lines = [f"{'task':<6}{'head columns':<14}{'epochs':<8}classes"]
    for task in past.tasks:
        first, stop = task.columns
        columns = f"{first}" if stop == first + 1 else f"{first} to {stop - 1}"
        left = "" if task.id < learned else "  (not learned yet)"
        lines.append(f"{task.id + 1:<6}{columns:<14}{task.epochs:<8}{task.name}{left}")
    return "\n".join(lines)
