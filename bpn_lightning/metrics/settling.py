"""Whether training on a task has converged, by comparing the accuracies of its last two epochs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["MAX_FALL", "Settling", "Unsettled"]

MAX_FALL = 0.1
"""The drop in accuracy in the last epoch, as a fraction of the samples, that still counts as converged."""


class Unsettled(NamedTuple):
    """A task that has not converged: its accuracy dropped in the last epoch of its training.

    Attributes:
        task: the task ID.
        split: the samples that are counted: "train" (during the updates) or "val".
        before: accuracy of the second-last epoch, a fraction of 1.
        after: accuracy of the last epoch.
    """

    task: int
    split: str
    before: float
    after: float


class Settling:
    """Counts correct predictions over an epoch, and compares a task's last two epochs.

    The count stays on the device, without synchronization before the end of the epoch.

    State: one number on the device, and the accuracies of two epochs.
    """

    def __init__(self) -> None:
        self.counting = False
        self.unsettled: list[Unsettled] = []
        self._right: Tensor | None = None  # of this process
        self._right_before = 0  # of all processes, before a checkpoint
        self._seen = 0  # samples of all processes
        self._accuracies: list[float] = []  # of the current task, the last two

    def add(self, right: Tensor, batch_size: int) -> None:
        """Count a batch.

        Args:
            right: ``()`` int64, the number of this process's correct predictions.
            batch_size: number of samples over all processes.
        """
        self._right = right if self._right is None else self._right.add_(right)
        self._seen += batch_size

    @property
    def right(self) -> Tensor:
        """The number of this process's correct predictions since the checkpoint, ``()`` int64."""
        return torch.zeros((), dtype=torch.int64) if self._right is None else self._right

    def accuracy(self, right: int) -> float | None:
        """End the epoch and return its accuracy; None if no batch was counted.

        Args:
            right: number of correct predictions of all processes since the checkpoint.
        """
        right, seen = right + self._right_before, self._seen
        self._right, self._right_before, self._seen = None, 0, 0
        return right / seen if seen else None

    def end_epoch(self, accuracy: float) -> None:
        """Store the accuracy of an epoch of the current task."""
        self._accuracies = [*self._accuracies, accuracy][-2:]

    def end_task(self, task: int, split: str) -> None:
        """Compare the last two epochs, and reset."""
        if len(self._accuracies) == 2:
            before, after = self._accuracies
            if before - after > MAX_FALL:
                self.unsettled.append(Unsettled(task, split, before, after))
        self._accuracies = []

    def state(self, right: int) -> dict[str, Any]:
        """The state to save in a checkpoint.

        Args:
            right: number of correct predictions of all processes since the last loaded checkpoint.
        """
        return {
            "right": right + self._right_before,
            "seen": self._seen,
            "accuracies": list(self._accuracies),
            "unsettled": [one._asdict() for one in self.unsettled],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state`."""
        self._right, self._right_before, self._seen = None, state["right"], state["seen"]
        self._accuracies = list(state["accuracies"])
        self.unsettled = [Unsettled(**one) for one in state["unsettled"]]
