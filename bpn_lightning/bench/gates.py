"""Accuracies of gates if the task ID is not given, and what the modes add to them."""

from collections.abc import Sequence
from typing import NamedTuple

from bpn_lightning.analysis.artifact import Artifact, seeds_text, slug
from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.comparison import MethodRow, method_rows
from bpn_lightning.analysis.pictures import Dots, Line, dot_chart, line_chart
from bpn_lightning.analysis.statistics import Interval, interval
from bpn_lightning.analysis.table import Cell, Table
from bpn_lightning.run.gates import GATE_ACCURACIES, shared_bytes

__all__ = ["gates"]

#: The accuracies in pictures.
_DRAWN = {key: GATE_ACCURACIES[key] for key in ("task_accuracy", "own_class", "mixture")}


class _GateRow(NamedTuple):
    """A gate of a row's runs."""

    row: MethodRow
    gate: str

    @property
    def name(self) -> str:
        """``psp, slda on patches``."""
        record = self.row.records[0]
        front = record.at("front", "name")
        return f"{record.method}, {self.gate}" + (f" on {front}" if front else "")

    def average(self, key: str) -> Interval | None:
        """Of an accuracy, over seeds."""
        return interval([one.at("gates", self.gate, key, "average") for one in self.row.records])

    def gain(self) -> Interval | None:
        """By how much gate and modes exceed the gate's own class, seed by seed."""
        pairs = [
            [one.at("gates", self.gate, key, "average") for key in ("mixture", "own_class")]
            for one in self.row.records
        ]
        known = [both - own for both, own in pairs if both is not None and own is not None]
        return interval(known) if len(known) == len(pairs) else None

    def bytes(self) -> tuple[int, int]:
        """Of gate and modes for each task, and what tasks share: the rest of the gate, and the front."""
        record = self.row.records[0]
        gate = record.gates[self.gate]
        return gate["bytes_per_task"], shared_bytes(gate) + (record.at("front", "bytes") or 0)

    def over_stream(self, key: str) -> Line:
        """An average over the number of tasks learned."""
        learned = self.row.records[0].learned
        moments = [
            {one["after"]: one for one in record.gates[self.gate]["over_stream"]}
            for record in self.row.records
        ]
        x = [after for after in range(1, learned + 1) if all(after in one for one in moments)]
        y = [interval([one[after][key] for one in moments]) for after in x]
        return Line(self.name, [float(after) for after in x], y)


def gates(collection: Collection) -> list[Artifact]:
    """A table of every gate for each experiment, with accuracy over the number of tasks."""
    rows = [(place, _rows(collection, place)) for place in collection.places()]
    return [
        artifact
        for place, found in rows
        if found
        for artifact in (_accuracies(collection, place, found), _over_stream(place, found))
    ]


def _rows(collection: Collection, place: str) -> list[_GateRow]:
    return [
        _GateRow(row, gate)
        for row in method_rows(collection.records, place)
        for gate in row.records[0].gates
    ]


def _accuracies(collection: Collection, place: str, rows: Sequence[_GateRow]) -> Artifact:
    body: list[list[Cell]] = [
        [
            one.name,
            *(one.average(key) for key in GATE_ACCURACIES),
            one.row.scores["average"],
            one.gain(),
            *one.bytes(),
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
        [Dots(title, [one.average(key) for one in rows]) for key, title in _DRAWN.items()],
        title=place,
    )
    caption = (
        f"{place}, {seeds_text(record.seed for record in collection.of(place))}. The task ID is not given, "
        "unless a column says so. Gate and modes: p(task) p(class | task), summed over the likeliest modes. "
        "Own class: of the gate's likeliest row, without any network. A dash: the gate knows no classes."
    )
    return Artifact(
        f"gates_{slug(place)}", f"{place}: gates", caption, Table(columns, body), picture
    )


def _over_stream(place: str, rows: Sequence[_GateRow]) -> Artifact:
    lines = {key: [one.over_stream(key) for one in rows] for key in _DRAWN}
    body: list[list[Cell]] = [
        [one.name, int(after), *(lines[key][number].y[index] for key in _DRAWN)]
        for number, one in enumerate(rows)
        for index, after in enumerate(lines["task_accuracy"][number].x)
    ]
    table = Table(["modes, gate", "tasks learned", *_DRAWN.values()], body)
    shown = {float(one.row.records[0].learned) for one in rows} | {1.0}
    ends = [row for row in body if row[1] in shown]
    picture = line_chart(
        [(name, lines[key]) for key, name in _DRAWN.items()],
        title=place,
        xlabel="tasks learned",
    )
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
