"""Fig. 6: accuracies over the epochs of a stream, and task 1 over its tasks."""

from collections.abc import Sequence
from itertools import accumulate

from bpn_lightning.analysis.artifact import Artifact, slug
from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.comparison import MethodRow, method_rows
from bpn_lightning.analysis.pictures import Line, line_chart
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.analysis.statistics import Interval, interval
from bpn_lightning.analysis.table import Cell, Table

__all__ = ["figure_6", "over_epochs"]

# Those of the figure come first; the control, the tuned ablation and references come from us.
_SHOWN = ("stl", "bd+ewc", "bd+psp", "psp", "gd+ewc", "ewc", "gem_256", "gem_10", "ewc_task_mask")

_MANY = 10  # tasks: a panel for each is too much, and the paper shows task 1 alone


def figure_6(collection: Collection) -> list[Artifact]:
    """For each experiment: every task over epochs (a, b), and task 1 over tasks (c)."""
    found = []
    for place in collection.places():
        every = method_rows(collection.records, place)
        rows = [row for row in every if row.name in _SHOWN or len(every) < len(_SHOWN)]
        rows.sort(key=lambda row: _SHOWN.index(row.name) if row.name in _SHOWN else len(_SHOWN))
        tasks = min(record.tasks for row in rows for record in row.records)
        if tasks < _MANY:
            found.append(_over_epochs(place, rows, tasks))
        found.append(_first_task(place, rows, tasks))
    return found


def over_epochs(record: RunRecord, task: int) -> list[tuple[float, float]]:
    """Epochs done and accuracy on a task (from 0), since that task began to be learned."""
    over_stream = record.moments
    if task >= len(over_stream.starts):
        return []
    return [
        (x, value)
        for x, row in zip(over_stream.at, over_stream.accuracy, strict=True)
        if x > over_stream.starts[task] and (value := row[task]) is not None
    ]


def _over_epochs(place: str, rows: Sequence[MethodRow], tasks: int) -> Artifact:
    panels = []
    body: list[list[Cell]] = []
    for task in range(tasks):
        lines = []
        for row in rows:
            x, y = _together([over_epochs(record, task) for record in row.records])
            lines.append(Line(row.name, x, y))
            body += [[task + 1, row.name, epoch, value] for epoch, value in zip(x, y, strict=True)]
        panels.append((f"task {task + 1}", lines))
    ends = accumulate(map(float, rows[0].records[0].epochs))
    starts = [[0.0, *ends][:tasks]] * tasks
    figure = line_chart(
        panels, title=f"{place}: accuracy on each task", xlabel="epochs", starts=starts
    )
    table = Table(("task", "method", "epochs", "accuracy"), body)
    caption = (
        "Fig. 6 (a, b): accuracy on each task from the epoch on in which it begins to be learned; "
        "dashed lines: a new task begins. In the paper, too, EWC and GD+EWC fall to 0 and BD+EWC "
        "stays; it prints no numbers. Means over seeds; the CSV has every point and its interval."
    )
    ends_only = Table(
        ("method", *(f"task {task + 1} after task {tasks}" for task in range(tasks))),
        [[row.name, *(_last(panels[task][1], row.name) for task in range(tasks))] for row in rows],
    )
    return Artifact(
        f"figure_6_{slug(place)}", f"Fig. 6, {place}", caption, ends_only, figure, table, [place]
    )


def _first_task(place: str, rows: Sequence[MethodRow], tasks: int) -> Artifact:
    lines = []
    body: list[list[Cell]] = []
    for row in rows:
        values = [
            interval([record.matrix[moment][0] for record in row.records])
            for moment in range(1, tasks + 1)
        ]
        lines.append(Line(row.name, [moment + 1.0 for moment in range(tasks)], values))
        body.append([row.name, *values])
    figure = line_chart(
        [("", lines)],
        title=f"{place}: what is left of task 1",
        xlabel="tasks learned",
        ylabel="accuracy on task 1",
    )
    columns = ("method", *(f"after task {moment + 1}" for moment in range(tasks)))
    caption = (
        "Fig. 6 (c): accuracy on task 1 as later tasks are learned. Of its ends, the paper prints those "
        "in Table I."
    )
    name, table = f"figure_6c_{slug(place)}", Table(columns, body)
    return Artifact(name, f"Fig. 6 (c), {place}", caption, table, figure, places=[place])


def _together(
    seeds: Sequence[Sequence[tuple[float, float]]],
) -> tuple[list[float], list[Interval | None]]:
    """Means over the seeds at those moments that all of them have."""
    of_seed = [dict(points) for points in seeds]
    moments = sorted(set.intersection(*(set(points) for points in of_seed)))
    return moments, [interval([points[x] for points in of_seed]) for x in moments]


def _last(lines: Sequence[Line], name: str) -> Interval | None:
    (line,) = (line for line in lines if line.name == name)
    return line.y[-1] if line.y else None
