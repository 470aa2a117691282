"""The measures of a stream as plain dictionaries, as in results.json.

Does not import torch, so that results can be read without it.
"""

from typing import TypedDict

__all__ = ["BINS", "AfterLearning", "Calibration", "ClassCounts", "Summary", "TaskAgnostic"]

BINS = 15
"""Of task probabilities, equally wide from 0 to 1."""


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


class ClassCounts(TypedDict):
    """Test samples of the tasks learned."""

    tasks: list[int]
    """Of each task; 0 where it was not tested."""
    samples: list[int]
    """Of each class, by its column of the head."""
    right: list[int]
    """Of these, how many were answered with their class."""


class Calibration(TypedDict):
    """Task probabilities in :data:`BINS` bins, by how large the largest is."""

    error: float
    """The expected calibration error, a fraction (Guo et al., 2017, eq. 3)."""
    counts: list[int]
    """Samples of each bin."""
    confidence: list[float | None]
    """Mean of their largest task probabilities; None for an empty bin."""
    accuracy: list[float | None]
    """Fraction of them whose likeliest task is theirs; None for an empty bin."""
