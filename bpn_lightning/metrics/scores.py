"""The measures of a stream as plain dictionaries, as in results.json.

Does not import torch, so that results can be read without it.
"""

from typing import TypedDict

__all__ = ["AfterLearning", "Summary", "TaskAgnostic"]


class AfterLearning(TypedDict):
    """Accuracies on each task right after training on it."""

    average: float | None
    per_task: list[float | None]


class TaskAgnostic(TypedDict):
    """Accuracies at the end of the stream without a given task ID (class-incremental)."""

    average: float | None
    first_task: float | None
    per_task: list[float | None]


class Summary(TypedDict):
    """The result of :meth:`AccuracyMatrix.summary`; fractions of 1, None if not measured."""

    average: float | None
    first_task: float | None
    per_task: list[float | None]
    bwt: float | None
    fwt: float | None
    forgetting: float | None
    after_learning: AfterLearning
    task_agnostic: TaskAgnostic | None
