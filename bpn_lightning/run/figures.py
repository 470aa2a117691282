"""The pictures of a run: accuracies over the stream, the accuracy matrix, and what its gates give."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from bpn_lightning.run.drawing import (
    COLORS,
    DASHES,
    FEW,
    MARKERS,
    VIRIDIS,
    cell_color,
    draw_curves,
    draw_reliability,
    every_nth,
)
from bpn_lightning.run.gates import GATE_ACCURACIES
from bpn_lightning.run.moments import moments
from bpn_lightning.run.schema import GateResults

__all__ = ["accuracy_curves", "accuracy_heatmap", "gate_calibration", "gates_over_stream"]

Floats = NDArray[np.float64]

_NUMBERED = 20  # tasks up to which each cell has its number


def accuracy_curves(
    matrix: Tensor,
    *,
    curve: Sequence[Mapping[str, Any]] | None = None,
    epochs_per_task: Sequence[int] | None = None,
    title: str = "",
) -> Figure:
    """Draw each task's accuracy from the moment on that it starts to be learned.

    In the manner of Fig. 6 of Wen et al.: dashed lines stand where a task starts. Up to ten tasks
    have colors, dashes and markers of their own; more are colored by their number, from dark to
    light, with the mean over the tasks learned so far.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, NaN where not measured.
        curve: finer moments than the matrix has, as the module keeps them: the "epoch" (how many
            were done), the "task" being learned (from 0), the "accuracy" of each task or None.
        epochs_per_task: how long each task was learned, where there is no curve; without either,
            the horizontal axis counts tasks.
        title: stands above the picture.
    """
    return draw_curves(moments(_rows(matrix), curve, epochs_per_task), title=title)


def accuracy_heatmap(matrix: Tensor, *, title: str = "") -> Figure:
    """Draw the accuracy matrix: a row per moment, a column per task; hatched where not measured.

    Right of the stepped line stand accuracies on tasks that were still to come. Up to twenty tasks,
    the cells hold their numbers.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, NaN where not measured.
        title: stands above the picture.
    """
    values = matrix.detach().cpu().double().numpy()
    tasks = values.shape[1]
    numbered = tasks <= _NUMBERED
    with style.context("default"):
        cell = min(0.8, max(0.5, 2.2 / tasks)) if numbered else 6.0 / tasks
        size = (max(4.5, cell * tasks + 2.3), cell * (tasks + 1) + 1.0)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, parse_math=False)
        axes = figure.add_subplot()
        axes.patch.set(facecolor="0.93", edgecolor="0.7", hatch="////")
        image = axes.imshow(np.ma.masked_invalid(values), cmap=VIRIDIS, vmin=0, vmax=1)
        every = every_nth(tasks)
        labels = range(every, tasks + 1, every)
        axes.set_xticks([task - 1 for task in labels], [str(task) for task in labels])
        axes.set_yticks([0, *labels], ["before", *(str(task) for task in labels)])
        axes.set(xlabel="accuracy on task", ylabel="after learning task")
        edges = np.arange(tasks + 1) - 0.5
        for color, width in (("white", 3.0), ("black", 1.2)):  # seen on dark and on light cells
            axes.step(
                edges,
                np.minimum(edges + 1, edges[-1]),
                where="post",
                color=color,
                linewidth=width if numbered else width / 2,
            )
        if numbered:
            _write_numbers(axes, values, size=9 if tasks <= FEW else 8)
        figure.colorbar(image, ax=axes, label="accuracy", shrink=0.8)
    return figure


def gates_over_stream(gates: Mapping[str, GateResults], *, title: str = "") -> Figure:
    """Draw what gates give over the number of tasks learned: a color for each, a marker for each figure.

    Args:
        gates: by name, as in results.json.
        title: stands above the picture.
    """
    shown = {key: name for key, name in GATE_ACCURACIES.items() if key != "own_class_task_given"}
    with style.context("default"):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        figure.suptitle(title, parse_math=False)
        axes = figure.add_subplot()
        axes.set(
            ylim=(-0.03, 1.03), xlabel="tasks learned", ylabel="mean accuracy over these tasks"
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="0.92")
        for number, (gate, results) in enumerate(gates.items()):
            ends = {one["after"]: one for one in results["over_stream"]}  # the last of each task
            for place, (key, name) in enumerate(shown.items()):
                points = [(after, cast(Any, one)[key]) for after, one in ends.items()]
                known = [(after, value) for after, value in points if value is not None]
                if known:
                    axes.plot(
                        *zip(*known, strict=True),
                        label=f"{gate}: {name}" if len(gates) > 1 else name,
                        color=COLORS[number if len(gates) > 1 else place],
                        linestyle=DASHES[place % len(DASHES)],
                        marker=MARKERS[place],
                        markersize=5,
                        clip_on=False,
                    )
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=3.5)
    return figure


def gate_calibration(gates: Mapping[str, GateResults], *, title: str = "") -> Figure:
    """Draw the reliability of task probabilities; see :func:`bpn_lightning.run.drawing.draw_reliability`.

    Args:
        gates: by name, as in results.json.
        title: stands above the picture.
    """
    known = {name: bins for name, gate in gates.items() if (bins := gate["calibration"])}
    return draw_reliability(known, title=title)


def _rows(matrix: Tensor) -> list[list[float | None]]:
    """The matrix in plain numbers, None for NaN."""
    rows = matrix.detach().cpu().double().tolist()
    return [[None if math.isnan(value) else value for value in row] for row in rows]


def _write_numbers(axes: Axes, values: Floats, size: float) -> None:
    for (row, task), value in np.ndenumerate(values):
        if not np.isnan(value):
            _, ink = cell_color(value)
            axes.text(task, row, f"{value:.2f}", ha="center", va="center", fontsize=size, color=ink)
