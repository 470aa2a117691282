"""The figures of a stream, as plain dictionaries.

What an accuracy matrix says, results.json keeps and reports show. No torch here, so that a result can
be read without it.
"""

from typing import TypedDict

__all__ = ["AfterLearning", "Summary", "TaskAgnostic"]


class AfterLearning(TypedDict):
    """Accuracies on each task right after it was learned."""

    average: float | None
    per_task: list[float | None]


class TaskAgnostic(TypedDict):
    """Accuracies at the stream's end where no task id is given (class-incremental)."""

    average: float | None
    first_task: float | None
    per_task: list[float | None]


class Summary(TypedDict):
    """What :meth:`AccuracyMatrix.summary` returns; fractions of 1, None where not measured."""

    average: float | None
    first_task: float | None
    per_task: list[float | None]
    bwt: float | None
    fwt: float | None
    forgetting: float | None
    after_learning: AfterLearning
    task_agnostic: TaskAgnostic | None
