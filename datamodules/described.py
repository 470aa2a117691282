"""Descriptions of a stream's preprocessing, compared with what the stream does."""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from bpn_lightning.preparation import Preparation
from bpn_lightning.tasks import Batch

__all__ = ["MAX_VERIFIED", "verified"]

MAX_VERIFIED = 64
"""The number of evenly spaced tasks on which a described preprocessing is verified."""


class _Described(Protocol):
    @property
    def first_task(self) -> int: ...
    def raw_samples(self, task_id: int) -> Tensor: ...
    def prepare(self, batch: Batch, augment: bool = False) -> Batch: ...


def verified(stream: _Described, described: list[Preparation]) -> list[Preparation]:
    """Drop the steps of descriptions that do not reproduce ``prepare`` on the stream's own tasks."""
    found, first = [], 0
    for one in described:
        stride = -(-one.tasks // MAX_VERIFIED)
        own = range(max(stream.first_task - first, 0), one.tasks, stride)
        if not all(_is_right(stream, one, first, task) for task in own):
            one = replace(one, steps=None, code=f"{type(stream).__name__}.prepare")
        found.append(one)
        first += one.tasks
    return found


def _is_right(stream: _Described, one: Preparation, first: int, task: int) -> bool:
    raw = stream.raw_samples(first + task)
    targets = torch.zeros(len(raw), dtype=torch.long)
    prepared = stream.prepare(Batch(raw, targets, first + task, len(raw))).inputs
    return one.steps is not None and torch.equal(prepared, one.apply(raw, task))
