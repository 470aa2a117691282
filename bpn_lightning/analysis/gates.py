"""What the gates of a row's runs gave, over seeds."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bpn_lightning.analysis.comparison import MethodRow
from bpn_lightning.analysis.pictures import Line, line_chart
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.analysis.statistics import Interval, interval
from bpn_lightning.metrics.scores import Calibration
from bpn_lightning.run.gates import GATE_ACCURACIES, shared_bytes

__all__ = ["DRAWN", "GateRow", "draw_over_tasks", "gate_rows"]

#: The accuracies in pictures.
DRAWN = {key: GATE_ACCURACIES[key] for key in ("task_accuracy", "own_class", "mixture")}


class GateRow(NamedTuple):
    """A gate of a row's runs."""

    row: MethodRow
    gate: str

    @property
    def name(self) -> str:
        """``psp, slda on patches``, with what sets the runs apart; ``slda on patches`` of a gate alone."""
        record = self.row.records[0]
        front = record.at("front", "name")
        named = self.gate + (f" on {front}" if front else "")
        alone = record.method == self.gate
        return ", ".join([*([] if alone else [record.method]), named, *record.variation])

    @property
    def bytes_per_task(self) -> int:
        """Of the gate."""
        return int(self.row.records[0].gates[self.gate]["bytes_per_task"])

    @property
    def bytes_shared(self) -> int:
        """What tasks share: the rest of the gate, and the front."""
        record = self.row.records[0]
        return shared_bytes(record.gates[self.gate]) + (record.at("front", "bytes") or 0)

    def average(self, key: str) -> Interval | None:
        """Of an accuracy after the last task, over seeds."""
        return interval(self._averages(key))

    def modes_given(self) -> Interval | None:
        """ACC of the modes where the task ID is given; None where there are none."""
        return self.row.scores["average"] if self.row.records[0].gates[self.gate]["modes"] else None

    def gain(self) -> Interval | None:
        """By how much gate and modes exceed the gate's own class, seed by seed."""
        pairs = zip(self._averages("mixture"), self._averages("own_class"), strict=True)
        return interval([None if a is None or b is None else a - b for a, b in pairs])

    def calibration_error(self) -> Interval | None:
        """After the last task."""
        return interval([one.at("gates", self.gate, "calibration", "error") for one in self._runs])

    def rejection(self) -> Interval | None:
        """The mean area under the ROC curve over the moments at which tasks were still to come."""
        known = [
            [value for moment in self._moments(one) if (value := moment["rejection"]) is not None]
            for one in self._runs
        ]
        return interval([fmean(values) if values else None for values in known])

    def calibration(self) -> Calibration | None:
        """The bins of all seeds together, with the mean of their errors; None where one has none."""
        found = [one.at("gates", self.gate, "calibration") for one in self._runs]
        error = self.calibration_error()
        if error is None:
            return None
        counts = np.array([one["counts"] for one in found], dtype=np.float64)
        total = counts.sum(0)

        def mean(key: str) -> list[float | None]:
            values = np.array([one[key] for one in found], dtype=np.float64)  # None becomes NaN
            sums = np.nansum(values * counts, axis=0)
            return [float(a / n) if n else None for a, n in zip(sums, total, strict=True)]

        return Calibration(
            error=error.mean,
            counts=[int(count) for count in total],
            confidence=mean("confidence"),
            accuracy=mean("accuracy"),
        )

    def over_stream(self, key: str) -> Line:
        """An average over the number of tasks learned."""
        moments = [{one["after"]: one for one in self._moments(record)} for record in self._runs]
        x = [after for after in sorted(moments[0]) if all(after in one for one in moments)]
        y = [interval([one[after][key] for one in moments]) for after in x]
        return Line(self.name, [float(after) for after in x], y)

    @property
    def _runs(self) -> Sequence[RunRecord]:
        return self.row.records

    def _averages(self, key: str) -> list[float | None]:
        return [one.at("gates", self.gate, key, "average") for one in self._runs]

    def _moments(self, record: RunRecord) -> list[dict[str, Any]]:
        moments: list[dict[str, Any]] = record.gates[self.gate]["over_stream"]
        return moments


def gate_rows(rows: Sequence[MethodRow]) -> list[GateRow]:
    """Each gate of each row, in order."""
    return [GateRow(row, gate) for row in rows for gate in row.records[0].gates]


def draw_over_tasks(
    panels: Sequence[tuple[str, Sequence[Line]]], *, title: str = "", width: float | None = None
) -> Figure:
    """Accuracies over the number of tasks learned.

    Args:
        panels: a title and lines for each.
        title: stands above.
        width: in inches, of panels below each other; None sets them side by side.
    """
    figure = line_chart(panels, title=title, xlabel="tasks learned", width=width)
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
