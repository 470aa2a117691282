"""What a module keeps in Lightning's checkpoints, by name, besides its tensors.

::

    checkpoint["continual"]
    ├── schema, bpn_lightning    how to read the others, and who wrote them
    ├── structure                head, tasks, inputs and attachments; exports have the same
    ├── gates                    what each answers by, to answer without callbacks; exports have the same
    ├── seed, strategies         of the run, to be compared: strategies by their state keys
    ├── cursor                   where in the stream the module is
    ├── frozen_core              whether what tasks share is frozen in the open task
    ├── early_stopping, optimization, history
    ├── training_weights         while merged ones are in their place
    ├── random_states            of every process
    └── unfinished               batches of an update that is under way, or None
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from bpn_lightning.errors import BPNLightningError, CheckpointError
from bpn_lightning.files.writing import why_unreadable
from bpn_lightning.model.gates import describe_gates, rebuild_gates
from bpn_lightning.model.growth import grow_checkpoint, is_continued
from bpn_lightning.model.host import Host
from bpn_lightning.model.learned_by import LearnedBy
from bpn_lightning.model.task_loop import TaskLoop
from bpn_lightning.modes.rebuilding import rebuild
from bpn_lightning.nn.sharding import is_sharded
from bpn_lightning.nn.structure import Structure, check_schema, schema_fields
from bpn_lightning.random_state import random_state
from bpn_lightning.run.checkpoints import read_checkpoint
from bpn_lightning.run.identity import differences, flatten
from bpn_lightning.tasks import Task
from bpn_lightning.trainer.lightning import (
    mark_epoch_not_started,
    mark_epoch_unfinished,
    progress_in_update,
    stopped_mid_epoch,
)

__all__ = ["ENTRY", "entry_of", "load_state", "loading", "save_state"]

ENTRY = "continual"
"""The key in a checkpoint."""


def save_state(loop: TaskLoop, checkpoint: dict[str, Any]) -> None:
    """Add the entry to Lightning's checkpoint, of all processes: each of them calls this."""
    host = loop.host
    checkpoint[ENTRY] = {
        **schema_fields(),
        "structure": host.network.structure.record(),
        "gates": describe_gates(host.gates.values()),
        "seed": host.stream.seed,
        "strategies": _state_keys(host),
        "cursor": host.cursor.state_dict(),
        "frozen_core": host.core.frozen_in_open_task,
        "early_stopping": loop.early_stopping.state_dict(),
        "optimization": loop.optimization.state_dict(),
        "history": loop.history.state_dict(loop.right_answers()),
        "training_weights": dict(host.training_weights),
        "random_states": _random_states(host.trainer, loop.end_random_state or random_state()),
        "unfinished": _unfinished(host.trainer),
    }
    mark_epoch_not_started(checkpoint)
    if stopped_mid_epoch(host.trainer):
        mark_epoch_unfinished(checkpoint)


def entry_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """What :func:`save_state` has put into a checkpoint.

    Raises:
        CheckpointError: it is none of a ContinualModule, or of another schema.
    """
    saved = checkpoint.get(ENTRY)
    if not isinstance(saved, Mapping):
        raise CheckpointError(
            f"Expected a checkpoint of a ContinualModule, but it has no {ENTRY!r} entry. "
            "Pass one from a run's checkpoints folder."
        )
    check_schema(saved, "a checkpoint")
    return saved


def load_state(loop: TaskLoop, checkpoint: dict[str, Any]) -> None:
    """Rebuild the structure, with or without a trainer, and take over the cursor and what was measured.

    Args:
        loop: of a network with the backbone of the checkpoint's.
        checkpoint: Lightning's, with the entry of :func:`save_state`. One of a run that continues with new
            tasks gets the shapes of the longer stream.

    Raises:
        CheckpointError: the checkpoint is of another schema, stream, mask or list of strategies, was
            taken inside an update, or has weights alone where a run is to go on.
    """
    saved = dict(entry_of(checkpoint))
    structure = Structure.read(saved["structure"])
    host = loop.host
    resuming = host.has_trainer and host.trainer.state.fn == "fit"
    _check_forgotten(host, structure)
    learned = len(structure.tasks)
    growing = resuming and is_continued(host, structure)
    _check_same_run(host, structure, saved, resuming, growing)
    if resuming:
        _check_resumable(checkpoint, saved["unfinished"])
    if growing:
        structure = grow_checkpoint(host, loop.optimization, checkpoint, saved, structure)
    weights = {
        name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()
    }
    rebuild(host.network, structure, weights)
    if not host.gates:  # a trainer's own are callbacks, which Lightning loads
        host.gates = rebuild_gates(saved.get("gates", ()))
    if not resuming:  # a fit's own begins soon
        host.learned_by = LearnedBy.read(saved)
    host.merged.training = dict(saved["training_weights"])
    loop.early_stopping.load_state_dict(saved["early_stopping"])
    loop.history.load_state_dict(saved["history"])
    if resuming:
        host.cursor.load_state_dict(saved["cursor"], learned if growing else None)
        _set_frozen(host, saved.get("frozen_core", False))
        loop.optimization.load_state_dict(saved["optimization"])
        loop.random_state = _own_random_state(host, saved["random_states"])
    else:
        host.cursor.load_progress(saved["cursor"])
    host.network.switch(host.cursor.task)


@contextmanager
def loading(path: Any, weights_only: bool) -> Iterator[None]:
    """Around Lightning's loading: read the file first, and say in one way what is wrong with it.

    Args:
        path: of the checkpoint; only a path is read first.
        weights_only: whether nothing but tensors and plain values may be in it.

    Raises:
        CheckpointError: the file is damaged, of another kind, or with code in it, or does not fit the
            module's arguments.
    """
    remedy = "Pass one from a run's checkpoints folder, and what that run's module was made of."
    try:
        saved = {}
        if weights_only and isinstance(path, str | Path):
            saved = read_checkpoint(Path(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error} {remedy}") from error
    try:
        for part in ("state_dict", ENTRY, "pytorch-lightning_version") if saved else ():
            saved[part]
        yield
    except BPNLightningError:
        raise
    # torch may raise any exception here.
    except Exception as error:
        raise CheckpointError(
            f"Expected {path} to be a checkpoint of a ContinualModule with these "
            f"arguments, but got {type(error).__name__}: {why_unreadable(error)}. {remedy}"
        ) from error


def _check_same_run(
    host: Host, structure: Structure, saved: Mapping[str, Any], resuming: bool, growing: bool
) -> None:
    """Refuse a checkpoint of another run; of one that goes on, the seed of new tasks may be another."""
    network = host.network
    here: dict[str, Any] = {"mask": network.mask}
    there: dict[str, Any] = {"mask": structure.mask}
    if host.has_trainer and network.tasks:
        here |= _table(network.tasks[: len(structure.tasks) if growing else None])
        there |= _table(structure.tasks)
    if resuming:
        here |= {"strategies": _state_keys(host)}
        there |= {"strategies": saved["strategies"]}
    if resuming and not growing:
        here |= {"seed": host.stream.seed}
        there |= {"seed": saved["seed"]}
    different = differences(here, there)
    if different:
        raise CheckpointError(
            f"Expected a checkpoint of this run, but they differ: {'; '.join(different)}. "
            "Resume with the configuration that wrote it, or start a new run."
        )


def _check_forgotten(host: Host, structure: Structure) -> None:
    again = set(host.network.structure.forgotten) - set(structure.forgotten)
    if again:
        raise CheckpointError(
            f"Expected a checkpoint without task {min(again)}, which this module has forgotten, but got one "
            "that holds it. Delete it, and use one that was saved after module.forget."
        )


def _check_resumable(checkpoint: Mapping[str, Any], unfinished: Mapping[str, int] | None) -> None:
    if "optimizer_states" not in checkpoint:
        raise CheckpointError(
            "Expected a checkpoint of a whole run, but this one has the weights alone, without the "
            "optimizer and the strategies. Resume another one; load_from_checkpoint takes this one."
        )
    if unfinished is not None:
        raise CheckpointError(
            "Expected a checkpoint taken between two updates, but this one was taken inside of one, "
            f"after {unfinished['done']} of its {unfinished['needed']} batches, whose gradients are in no "
            "checkpoint. Resume another one; bpn-fit takes them after updates only."
        )


def _set_frozen(host: Host, frozen: bool) -> None:
    """Freeze what the open task's optimizer, which the checkpoint has the state of, does not train."""
    network = host.network
    if network.closed < network.opened and frozen != host.core.freezes(network.opened):
        raise CheckpointError(
            f"Expected train and train_first to be what task {network.opened} was begun with, where its "
            f"shared weights were {'frozen' if frozen else 'trained'}, but got {host.core.train!r} and "
            f"{host.core.train_first!r}. They may change between two tasks."
        )
    if not frozen and is_sharded(network.backbone):
        raise CheckpointError(
            "Expected a checkpoint of a run whose shared weights were frozen with ShardedCoreStrategy, but got "
            "one whose optimizer trained them. Export it, and continue from the export."
        )
    host.core.set_frozen(frozen)
    host.core.frozen_in_open_task = frozen


def _own_random_state(host: Host, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    processes = host.trainer.world_size
    if len(states) == processes:
        return states[host.global_rank]
    if host.global_rank == 0:
        warnings.warn(
            f"The checkpoint is of {len(states)} and this run of {processes} processes. It goes on "
            "to the same result up to rounding, unless something draws random numbers inside an "
            "update, as dropout does: each process draws for its own slice.",
            stacklevel=2,
        )
    return states[0]


def _state_keys(host: Host) -> list[str]:
    return [strategy.state_key for strategy in host.strategies]


def _table(tasks: Sequence[Task]) -> dict[str, Any]:
    """Tasks as keys and values, for comparison."""
    values = {f"task {task.id}": asdict(task) for task in tasks}
    return {"number of tasks": len(tasks), **flatten(values)}


def _unfinished(trainer: Trainer) -> dict[str, int] | None:
    """Batches of an update that is under way; None between updates."""
    progress = progress_in_update(trainer)
    return None if progress is None else dict(zip(("done", "needed"), progress, strict=True))


def _random_states(trainer: Trainer, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every process: their slices of a batch may differ in size, and so in what they draw."""
    if trainer.world_size == 1:
        return [own]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, own)
    return states
