"""Whether a task had settled when its training ended: its accuracy over its last two epochs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["MAX_FALL", "Settling", "Unsettled"]

MAX_FALL = 0.1
"""Fraction of the samples by which a settled task's accuracy may fall in its last epoch."""


class Unsettled(NamedTuple):
    """A task that lost accuracy in the last epoch of its own training.

    Attributes:
        task: its number, from 0.
        split: the samples that were counted: "train" in the updates themselves, or "val".
        before: accuracy of the last epoch but one, a fraction of 1.
        after: of the last epoch.
    """

    task: int
    split: str
    before: float
    after: float


class Settling:
    """Counts right answers over an epoch, and compares a task's last two epochs.

    The count stays on the device: nothing waits for it before the epoch's end.

    State: one number on the device, and the accuracies of two epochs.
    """

    def __init__(self) -> None:
        self.counting = False
        self.unsettled: list[Unsettled] = []
        self._right: Tensor | None = None  # of this process
        self._right_before = 0  # of all processes, before a checkpoint
        self._seen = 0  # samples of all processes
        self._accuracies: list[float] = []  # of the open task, the last two

    def add(self, right: Tensor, batch_size: int) -> None:
        """Count a batch.

        Args:
            right: ``()`` int64, this process's right answers.
            batch_size: samples of all processes.
        """
        self._right = right if self._right is None else self._right.add_(right)
        self._seen += batch_size

    @property
    def right(self) -> Tensor:
        """This process's right answers since the checkpoint, ``()`` int64."""
        return torch.zeros((), dtype=torch.int64) if self._right is None else self._right

    def accuracy(self, right: int) -> float | None:
        """Of the epoch that was counted, which ends with this; None where nothing was.

        Args:
            right: answers of all processes since the checkpoint.
        """
        right, seen = right + self._right_before, self._seen
        self._right, self._right_before, self._seen = None, 0, 0
        return right / seen if seen else None

    def end_epoch(self, accuracy: float) -> None:
        """Keep the accuracy of an epoch of the open task."""
        self._accuracies = [*self._accuracies, accuracy][-2:]

    def end_task(self, task: int, split: str) -> None:
        """Compare the last two epochs, and forget them."""
        if len(self._accuracies) == 2:
            before, after = self._accuracies
            if before - after > MAX_FALL:
                self.unsettled.append(Unsettled(task, split, before, after))
        self._accuracies = []

    def state(self, right: int) -> dict[str, Any]:
        """What a checkpoint keeps.

        Args:
            right: answers of all processes since the last checkpoint that was loaded.
        """
        return {
            "right": right + self._right_before,
            "seen": self._seen,
            "accuracies": list(self._accuracies),
            "unsettled": [one._asdict() for one in self.unsettled],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state`."""
        self._right, self._right_before, self._seen = None, state["right"], state["seen"]
        self._accuracies = list(state["accuracies"])
        self.unsettled = [Unsettled(**one) for one in state["unsettled"]]
