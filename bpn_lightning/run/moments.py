"""Where in a stream accuracies were measured: what curves over the stream are drawn from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

__all__ = ["Matrix", "Moments", "Row", "mean_of_known", "moments", "tasks_learned"]

Row = Sequence[float | None]
Matrix = Sequence[Row]


@dataclass(frozen=True)
class Moments:
    """Accuracies over a stream; None stands where one was not measured.

    Args:
        unit: what ``at``, ``starts`` and ``ends`` count: "epochs" or "tasks learned".
        at: ``(moments,)``, how far the stream had come.
        accuracy: ``(moments, tasks)``; None before a task starts, too.
        starts: for each task that was begun, how far the stream had come.
        ends: for each task that was learned, how far it had come then.
        means: for each of those moments, the mean over the tasks learned by then.
    """

    unit: str
    at: list[float]
    accuracy: list[list[float | None]]
    starts: list[float]
    ends: list[float]
    means: list[float | None]


def tasks_learned(matrix: Matrix) -> int:
    """How many tasks had been learned at the last measured moment.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, None where not measured.

    >>> tasks_learned([[0.5, 0.5], [0.9, 0.4], [None, None]])
    1
    """
    measured = (n for n, row in enumerate(matrix) if any(value is not None for value in row))
    return max(measured, default=0)


def mean_of_known(values: Row) -> float | None:
    """The mean; None where a value, or all of them, are missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def moments(
    matrix: Matrix,
    curve: Sequence[Mapping[str, Any]] | None = None,
    epochs_per_task: Sequence[int] | None = None,
) -> Moments:
    """The moments of a curve where there is one, else those of the matrix.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, None where not measured.
        curve: finer moments than the matrix has, as the module keeps them: the "epoch" (how many
            were done), the "task" being learned (from 0), the "accuracy" of each task or None.
        epochs_per_task: how long each task was learned, where there is no curve; without either,
            tasks are counted.
    """
    learned = tasks_learned(matrix)
    means = [mean_of_known(matrix[n][:n]) for n in range(1, learned + 1)]
    if curve:
        at = [float(point["epoch"]) for point in curve]
        rows = [list(point["accuracy"]) for point in curve]
        starts = [
            max((float(point["epoch"]) for point in curve if point["task"] < task), default=0.0)
            for task in range(1 + max(point["task"] for point in curve))
        ]
        ends = [*starts[1:], at[-1]][:learned]
        if at[0] > 0:
            at, rows = [0.0, *at], [list(matrix[0]), *rows]
        return Moments("epochs", at, _begun(at, rows, starts), starts, ends, means[: len(ends)])
    unit = "epochs" if epochs_per_task else "tasks learned"
    borders = [0.0, *accumulate(map(float, epochs_per_task or [1] * learned))][: learned + 1]
    rows = [list(row) for row in matrix[: learned + 1]]
    accuracy = _begun(borders, rows, borders[:-1])
    return Moments(unit, borders, accuracy, borders[:-1], borders[1:], means)


def _begun(
    at: Sequence[float], rows: Sequence[Row], starts: Sequence[float]
) -> list[list[float | None]]:
    """Rows without the accuracies on tasks that were still to come."""
    unbegun = [float("inf")] * (max(map(len, rows), default=0) - len(starts))
    return [
        [
            value if x >= start else None
            for value, start in zip(row, [*starts, *unbegun], strict=True)
        ]
        for x, row in zip(at, rows, strict=True)
    ]
