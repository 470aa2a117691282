"""Accuracies of gates if the task ID is not given, and what the modes add to them."""

from collections.abc import Sequence

from bpn_lightning.analysis.artifact import Artifact, seeds_text, slug
from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.comparison import method_rows
from bpn_lightning.analysis.gates import DRAWN, GateRow, draw_over_tasks, gate_rows
from bpn_lightning.analysis.pictures import Dots, dot_chart
from bpn_lightning.analysis.table import Cell, Table
from bpn_lightning.run.drawing import draw_reliability
from bpn_lightning.run.gates import GATE_ACCURACIES

__all__ = ["gates"]


def gates(collection: Collection) -> list[Artifact]:
    """A table of every gate for each experiment, with accuracy over the number of tasks."""
    rows = [
        (place, gate_rows(method_rows(collection.records, place))) for place in collection.places()
    ]
    return [
        artifact
        for place, found in rows
        if found
        for artifact in (
            _accuracies(collection, place, found),
            _over_stream(place, found),
            _calibration(place, found),
        )
    ]


def _accuracies(collection: Collection, place: str, rows: Sequence[GateRow]) -> Artifact:
    body: list[list[Cell]] = [
        [
            one.name,
            *(one.average(key) for key in GATE_ACCURACIES),
            one.modes_given(),
            one.gain(),
            one.bytes_per_task,
            one.bytes_shared,
        ]
        for one in rows
    ]
    columns = [
        "modes, gate",
        *GATE_ACCURACIES.values(),
        "modes, task ID given",
        "gate and modes less own class",
        "bytes per task, gate",
        "bytes shared",
    ]
    picture = dot_chart(
        [one.name for one in rows],
        [Dots(title, [one.average(key) for one in rows]) for key, title in DRAWN.items()],
        title=place,
    )
    caption = (
        f"{place}, {seeds_text(record.seed for record in collection.of(place))}. "
        f"{_scenario(collection, place)}The task ID is not given, unless a column says so. Gate and modes: p(task) p(class | task), summed over the likeliest modes. "
        "Own class: of the gate's likeliest row, without any network. A dash: the gate knows no classes."
    )
    table = Table(columns, body)
    return Artifact(
        f"gates_{slug(place)}", f"{place}: gates", caption, table, picture, places=[place]
    )


def _scenario(collection: Collection, place: str) -> str:
    """In which of the scenarios the task ID is not given, where the runs say so."""
    found = {
        record.at("conditions", "scenarios", "accuracy", "name") for record in collection.of(place)
    }
    if None in found or not found:
        return ""
    return "Domain-incremental. " if found == {"domain-incremental"} else "Class-incremental. "


def _over_stream(place: str, rows: Sequence[GateRow]) -> Artifact:
    lines = {key: [one.over_stream(key) for one in rows] for key in DRAWN}
    body: list[list[Cell]] = [
        [one.name, int(after), *(lines[key][number].y[index] for key in DRAWN)]
        for number, one in enumerate(rows)
        for index, after in enumerate(lines["task_accuracy"][number].x)
    ]
    table = Table(["modes, gate", "tasks learned", *DRAWN.values()], body)
    shown = {float(one.row.records[0].learned) for one in rows} | {1.0}
    ends = [row for row in body if row[1] in shown]
    panels = [(name, lines[key]) for key, name in DRAWN.items()]
    picture = draw_over_tasks(panels, title=place)
    caption = (
        "Means over the tasks learned by then, over the number of tasks; the CSV has all of them."
    )
    return Artifact(
        f"gates_over_tasks_{slug(place)}",
        f"{place}: gates over the number of tasks",
        caption,
        Table(table.columns, ends),
        picture,
        data=table,
    )


def _calibration(place: str, rows: Sequence[GateRow]) -> Artifact:
    body: list[list[Cell]] = [[one.name, one.calibration_error(), one.rejection()] for one in rows]
    known = {one.name: found for one in rows if (found := one.calibration())}
    bins: list[list[Cell]] = [
        [name, *row]
        for name, of in known.items()
        for row in zip(of["counts"], of["confidence"], of["accuracy"], strict=True)
    ]
    caption = (
        "Calibration error: the mean distance between how likely a gate takes its likeliest task to be and "
        "how often that is right. Rejection: the area under the ROC curve by which its largest score tells "
        "learned tasks from those still to come, a mean over the moments at which some were tested. The "
        "picture and the CSV have the samples of all seeds in 15 bins."
    )
    return Artifact(
        f"gates_calibration_{slug(place)}",
        f"{place}: calibration and rejection of gates",
        caption,
        Table(["modes, gate", "calibration error", "rejection, AUROC"], body),
        draw_reliability(known, title=place) if known else None,
        data=Table(["modes, gate", "samples", "mean probability", "fraction right"], bins),
    )
