"""One normalization for all tasks: what gates and fronts see, whichever task an input is of."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bpn_lightning.preparation import Preparation, Step

__all__ = ["CommonNormalization", "normalization_of"]


class CommonNormalization:
    """Brings inputs from each task's mean and deviation to the first task's, and back.

    Inputs of tasks that do not normalize, or whose stream preprocesses with custom code, are not changed.

    Args:
        preparations: of all tasks of a stream.

    Attributes:
        preparations: the same, but with the first one's mean and deviation, and as one where they are equal
            then. Tasks differ in permutations and rotations only, or by code.
        differs: whether any task normalizes in another way than the first.
    """

    def __init__(self, preparations: Sequence[Preparation]) -> None:
        parts = [normalization_of(one) for one in preparations]
        first = parts[0]
        self.differs = first is not None and any(part != first for part in parts)
        self.preparations = list(preparations)
        if first is None or not self.differs:
            return
        self.preparations = _merged([_with(first, one) for one in preparations])
        of_tasks = [
            part or first
            for part, one in zip(parts, preparations, strict=True)
            for _ in range(one.tasks)
        ]
        # (tasks, channels) each
        self._means, self._deviations = (
            torch.tensor(of_tasks, dtype=torch.float64).float().unbind(1)
        )

    def to_first(self, inputs: Tensor, task: int | Tensor) -> Tensor:
        """Inputs ``(batch, *input_shape)``, normalized as the first task's.

        Args:
            inputs: normalized as their task's.
            task: the common task ID, or ``(batch,)``, one per sample.
        """
        if not self.differs:
            return inputs
        own_mean, own_deviation, mean, deviation = self._numbers(inputs, task)
        return (inputs * own_deviation + (own_mean - mean)) / deviation

    def from_first(self, inputs: Tensor, task: int | Tensor) -> Tensor:
        """The inverse of :meth:`to_first`."""
        if not self.differs:
            return inputs
        own_mean, own_deviation, mean, deviation = self._numbers(inputs, task)
        return (inputs * deviation + (mean - own_mean)) / own_deviation

    def _numbers(self, inputs: Tensor, task: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and deviation of the task and of the first, each of which broadcasts over the inputs."""
        shape = (-1, self._means.shape[1], *(1,) * (inputs.dim() - 2))
        means, deviations = self._means.to(inputs.device), self._deviations.to(inputs.device)
        found = (means[task], deviations[task], means[0], deviations[0])
        own_mean, own_deviation, mean, deviation = (one.view(shape) for one in found)
        return own_mean, own_deviation, mean, deviation


def normalization_of(one: Preparation) -> tuple[list[float], list[float]] | None:
    """Mean and deviation of each channel; None where it does not normalize, or by code."""
    return next(((step[1], step[2]) for step in one.steps or [] if step[0] == "normalize"), None)


def _with(numbers: tuple[list[float], list[float]], one: Preparation) -> Preparation:
    """A preparation with another mean and deviation, if it has any."""

    def changed(step: Step) -> Step:
        return ["normalize", *numbers, step[3]] if step[0] == "normalize" else step

    return replace(one, steps=None if one.steps is None else [changed(step) for step in one.steps])


def _merged(preparations: list[Preparation]) -> list[Preparation]:
    """As one, where all tasks preprocess the same raw input equally."""
    first = preparations[0]
    by_code = any(one.steps is None for one in preparations)
    if by_code or any(
        one.differs_by_task or replace(one, tasks=first.tasks) != first for one in preparations
    ):
        return preparations
    return [replace(first, tasks=sum(one.tasks for one in preparations))]
