"""How far Lightning's fit loop is, where checkpoints are taken and runs go on."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer

from bpn_lightning.random_state import random_state

__all__ = [
    "begin_epoch_again",
    "gather_random_states",
    "leave_epoch_open",
    "stopped_mid_epoch",
    "unfinished_update",
]


def stopped_mid_epoch(trainer: Trainer) -> bool:
    """Whether max_steps, max_time or should_stop ended the epoch before its last batch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.current.ready > 0 and not progress.is_last_batch


def unfinished_update(trainer: Trainer) -> dict[str, int] | None:
    """Where in an update this is, as ``done`` of ``needed`` batches; None between updates."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    current: Any = progress.current
    done, needed = current.processed, trainer.accumulate_grad_batches
    last = progress.is_last_batch or done == trainer.num_training_batches
    between = done % needed == 0 or (last and done == current.ready)
    if between and current.started == done:  # else half of a step may be done
        return None
    return {"done": done % needed, "needed": needed}


def leave_epoch_open(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Let a checkpoint say that the epoch goes on.

    Lightning counts an epoch that was stopped before its end as done: its rest would be lost on
    resuming. In the middle of an epoch that goes on, this writes what stands there.
    """
    if stopped_mid_epoch(trainer) and "loops" in checkpoint:
        for part in ("current", "total"):
            saved = checkpoint["loops"]["fit_loop"]["epoch_progress"][part]
            saved["processed"] = saved["completed"] = saved["ready"] - 1


def begin_epoch_again(trainer: Trainer) -> None:
    """Where a run resumes from an epoch's last batch: let the next epoch begin like any other.

    Lightning has the next epoch's loader by then, and compares the old count of batches with its
    length; and it takes the next epoch for one that has begun, so that this one would have no start,
    be counted nowhere, and leave checkpoints of its own whose counts contradict each other.
    """
    loop = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress
    if loop.epoch_loop.restarted_on_train_batch_end and batches.is_last_batch:
        batches.current.completed = sys.maxsize
        loop.reset_restart_stage()  # the stage of the epochs; that of the batches stays


def gather_random_states(trainer: Trainer) -> list[dict[str, Any]]:
    """Of every process: their slices of a batch may differ in size, and so in what they draw."""
    own = random_state()
    if trainer.world_size == 1:
        return [own]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, own)
    return states
