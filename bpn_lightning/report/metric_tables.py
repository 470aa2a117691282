"""What the module's own metrics came to, as tables of numbers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bpn_lightning.analysis.record import RunRecord

__all__ = ["MAX_NUMBERS", "MetricTable", "metric_tables"]

MAX_NUMBERS = 50_000
"""Numbers of metrics on one page, about 5 MB."""


@dataclass(frozen=True)
class MetricTable:
    """Numbers with names.

    Args:
        caption: what they are.
        columns: names, that of the rows' names first.
        rows: a name, and a number for each further column; None where there is none.
        folded: whether it is one of many.
    """

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    folded: bool


def metric_tables(runs: Sequence[RunRecord]) -> tuple[list[MetricTable], int]:
    """Tables of all metrics of some runs: first those of single numbers, then those of lists.

    Returns:
        As many as a page holds, and how many are left out.
    """
    tables = [*_of_numbers(runs), *(table for run in runs for table in _of_lists(run))]
    kept, room = list[MetricTable](), MAX_NUMBERS
    for table in tables:
        size = sum(len(values) for _, values in table.rows)
        if size <= room:
            kept.append(table)
            room -= size
    return kept, len(tables) - len(kept)


def _metrics(run: RunRecord) -> dict[str, list[Any]]:
    """By name, a value for each task; what results.json says of other tasks is left out."""
    found: dict[str, list[Any]] = run.at("metrics") or {}
    return {name: values[: run.tasks] for name, values in found.items()}


def _of_numbers(runs: Sequence[RunRecord]) -> Iterator[MetricTable]:
    """For each metric a table: a row for each run, a column for each task, and their mean."""
    for name in dict.fromkeys(name for run in runs for name in _metrics(run)):
        rows = []
        for run in runs:
            values = [_number(value) for value in _metrics(run).get(name, [])]
            known = [value for value in values if value is not None]
            if known:
                rows.append((run.name, [math.fsum(known) / len(known), *values]))
        width = max((len(values) for _, values in rows), default=0)
        if rows:
            columns = ["run", "mean", *(f"task {task}" for task in range(1, width))]
            padded = [(run, [*values, *[None] * (width - len(values))]) for run, values in rows]
            yield MetricTable(f"{name}, after the last task", columns, padded, folded=False)


def _of_lists(run: RunRecord) -> Iterator[MetricTable]:
    """For each task a table of two dimensions; lists of one are the rows of one table."""
    for name, values in _metrics(run).items():
        lists = [
            (f"task {task}", _row(value)) for task, value in enumerate(values, 1) if _row(value)
        ]
        if lists:
            caption = f"{name}, {run.name}"
            yield MetricTable(caption, _numbered("task", lists), _padded(lists), folded=True)
        for task, value in enumerate(values, 1):
            square = [_row(part) for part in value] if isinstance(value, list) else []
            if square and all(square):
                rows = [(str(number), row) for number, row in enumerate(square)]
                caption = f"{name} of task {task}, {run.name}"
                yield MetricTable(caption, _numbered("row", rows), _padded(rows), folded=True)


def _row(value: Any) -> list[float | None]:
    """A list of numbers; empty where it is something else."""
    if not isinstance(value, list) or any(isinstance(part, list | dict) for part in value):
        return []
    return [_number(part) for part in value]


def _numbered(first: str, rows: Sequence[tuple[str, list[float | None]]]) -> list[str]:
    return [first, *map(str, range(max(len(values) for _, values in rows)))]


def _padded(
    rows: Sequence[tuple[str, list[float | None]]],
) -> list[tuple[str, list[float | None]]]:
    width = max(len(values) for _, values in rows)
    return [(name, [*values, *[None] * (width - len(values))]) for name, values in rows]


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value if known and abs(value) < 1e300 else None  # NaN is not below it
