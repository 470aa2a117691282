"""What a gate has summed of the task that is being read."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bpn_lightning.errors import DataError
from bpn_lightning.functional.moments import GroupSums, SecondMoments
from bpn_lightning.tasks import Task

__all__ = ["OpenTask"]


@dataclass(eq=False)
class OpenTask:
    """Sums of the samples to fit and of those held out, one group for each class or one for all.

    Attributes:
        task: whose they are.
        fit, held: of its samples.
        by_class: whether a group is a class, in the order of the task's columns.
    """

    task: Task
    fit: GroupSums
    held: GroupSums
    by_class: bool

    @classmethod
    def zero(
        cls,
        task: Task,
        width: int,
        second_moments: SecondMoments,
        device: torch.device,
        by_class: bool,
    ) -> "OpenTask":
        """Nothing yet, of features of a width."""
        groups = task.num_classes if by_class else 1
        fit, held = (GroupSums.zero(groups, width, second_moments, device) for _ in range(2))
        return cls(task, fit, held, by_class)

    def add_(self, features: Tensor, columns: Tensor, held_out: Tensor | None) -> None:
        """Sum samples ``(n, width)`` by their columns ``(n,)``; ``(n,)`` bool says which are held out."""
        groups = columns - self.task.columns[0] if self.by_class else torch.zeros_like(columns)
        chosen = torch.zeros_like(groups, dtype=torch.bool) if held_out is None else held_out
        self.fit.add_(features[~chosen], groups[~chosen])
        if chosen.any():
            self.held.add_(features[chosen], groups[chosen])

    @property
    def row_tasks(self) -> list[int]:
        """The task of each group."""
        return [self.task.id] * len(self.fit.counts)

    @property
    def row_columns(self) -> list[int]:
        """The column of each group's class; -1 where a group is the whole task."""
        return list(range(*self.task.columns)) if self.by_class else [-1]

    def reduced(self, all_reduce: Callable[[Tensor], Tensor]) -> "OpenTask":
        """The sums over all processes."""
        fit, held = self.fit.reduced(all_reduce), self.held.reduced(all_reduce)
        return OpenTask(self.task, fit, held, self.by_class)

    def can_choose(self, least: int) -> bool:
        """Whether samples are held out, and each group has at least so many others."""
        return bool(self.held.counts.sum() > 0 and self.fit.counts.min() >= least)

    def check_counts(self, least: int, name: str) -> None:
        """Refuse groups of too few samples for the gate of a name.

        Raises:
            DataError: with the name of the rarest class.
        """
        count = self.fit.counts + self.held.counts
        if count.min() >= least:
            return
        rarest, task = int(count.argmin()), self.task
        whose = f"class {task.class_names[rarest]!r} of task" if self.by_class else "task"
        raise DataError(
            f"Expected {whose} {task.id} to have at least {least} training samples for gate "
            f"{name}, but got {int(count[rarest])}. Add samples, or leave the gate out."
        )
