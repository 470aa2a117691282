"""Test samples and correct answers of each task and of each class."""

from collections.abc import Callable

import torch
from torch import Tensor

from bpn_lightning.metrics.scores import ClassCounts

__all__ = ["CountClasses"]


class CountClasses:
    """Counts over the test samples of the learned tasks, in one pass, and one reduction over processes.

    The recall of a class is its accuracy, and the mean of all recalls the balanced accuracy, as in
    scikit-learn. torchmetrics' macro averages also count classes that were answered and have no samples, and
    their state is quadratic in the number of classes.

    Args:
        tasks: how many the stream has.
        classes: output units of the head.
        learned: how many of them are learned; samples of others are ignored.
        device: of the logits.

    State: ``(tasks,)`` and ``(2, classes)`` int64, of this process.
    """

    def __init__(self, tasks: int, classes: int, learned: int, device: torch.device) -> None:
        self.learned = learned
        self._tasks = torch.zeros(tasks, dtype=torch.int64, device=device)
        self._classes = torch.zeros(2, classes, dtype=torch.int64, device=device)

    def update(self, task: int, logits: Tensor, targets: Tensor) -> None:
        """Count a batch of a task's samples, of logits ``(batch, num_classes)``."""
        if task >= self.learned:
            return
        right = logits.argmax(1) == targets
        self._tasks[task] += len(targets)
        # bincount and a selection by a mask would wait for a GPU at every batch.
        self._classes.index_add_(1, targets, torch.stack((torch.ones_like(targets), right.long())))

    def compute(self, all_reduce: Callable[[Tensor], Tensor]) -> ClassCounts:
        """The counts of all processes."""
        samples, right = all_reduce(self._classes).tolist()
        return {"tasks": all_reduce(self._tasks).tolist(), "samples": samples, "right": right}
