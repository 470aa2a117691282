"""Fig. 5, regions of the toy, and the drift behind Figs. 1 and 3: made of what probes saw."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from bpn_lightning.analysis.artifact import Artifact, slug
from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.comparison import MethodRow, method_rows
from bpn_lightning.analysis.pictures import Line, line_chart
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.analysis.statistics import Interval, interval
from bpn_lightning.analysis.table import Cell, Table

__all__ = ["drift", "figure_5", "moves"]

_NAMES = {"finetune": "plain GD", "gd+ewc": "GD + EWC", "bd+ewc": "BD + EWC"}

# The clusters of the paper: black is the first class of both tasks.
_CLUSTERS = (("black", "o", "black"), ("#D62728", "s", "red"), ("#7FDBFF", "^", "light blue"))


def figure_5(collection: Collection) -> list[Artifact]:
    """Regions after each task, in the modes of the tasks learned, and the numbers beside them."""
    return [
        _regions(collection, place)
        for place in collection.places()
        if any("regions" in record.probes for record in collection.of(place))
    ]


def _regions(collection: Collection, place: str) -> Artifact:
    methods = collection.methods(place)
    body: list[list[Cell]] = []
    for method in methods:
        records = collection.of(place, method)
        after_1 = interval([record.matrix[1][0] for record in records])
        second = interval([record.matrix[2][1] for record in records])
        name = _NAMES.get(method, method)
        body.append(
            [
                name,
                after_1,
                interval([record.at("accuracy", "first_task") for record in records]),
                second,
            ]
        )
    shown = [
        (_NAMES.get(method, method), record)
        for method in methods
        for record in collection.of(place, method)[:1]
        if "regions" in record.probes
    ]
    columns = ("method", "task 1 after task 1", "task 1 after task 2", "task 2 after task 2")
    seed = shown[0][1].seed
    caption = (
        f"Fig. 5: how sure the network is of black, seed {seed}; the white line is one half. Task 1 "
        "separates black from red, task 2 black from light blue. After task 2 each method is shown in "
        "the mode of task 1, and beside it in that of task 2; without modes they are the same map. "
        "The numbers are means over all seeds, with 95 % intervals. In the paper's picture plain GD "
        "and GD + EWC forget task 1 and BD + EWC keeps it; it prints no numbers."
    )
    table = Table(columns, body)
    return Artifact(f"figure_5_{slug(place)}", "Fig. 5", caption, table, _draw_regions(shown))


def _draw_regions(shown: Sequence[tuple[str, RunRecord]]) -> Figure:
    titles = ("after task 1", "after task 2, mode of task 1", "after task 2, mode of task 2")
    with style.context("default"):
        figure = Figure(figsize=(9.0, 2.7 * len(shown) + 0.9), layout="constrained")
        frames = figure.subplots(len(shown), 3, sharex=True, sharey=True, squeeze=False)
        for number, (row, (name, record)) in enumerate(zip(frames, shown, strict=True)):
            moments: Any = record.probes["regions"]
            maps = (moments[0]["maps"][0], moments[1]["maps"][0], moments[1]["maps"][1])
            for index, (axes, values, title) in enumerate(zip(row, maps, titles, strict=True)):
                sides = moments[0]["sides"]
                image = axes.imshow(
                    np.array(values), origin="lower", extent=sides, aspect="auto",
                    cmap="cividis", vmin=0, vmax=1,
                )  # fmt: skip
                levels = np.array(values)
                if levels.min() < 0.5 < levels.max():
                    x, y = (
                        np.linspace(sides[2 * i], sides[2 * i + 1], len(values)) for i in (0, 1)
                    )
                    axes.contour(x, y, levels, levels=[0.5], colors="white", linewidths=1.5)
                _scatter(axes, moments[0]["points"])
                if number == 0:
                    axes.set_title(title, fontsize="medium")
                if index == 0:
                    axes.set_ylabel(name)
        handles, labels = frames[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, markerscale=2)
        figure.colorbar(image, ax=frames, label="probability of black", shrink=0.8)
    return figure


def _scatter(axes: Any, points: Sequence[Sequence[Sequence[float]]]) -> None:
    """Black of both tasks, then the other cluster of each task."""
    first = min(int(point[2]) for task in points for point in task)
    groups = [[p for task in points for p in task if int(p[2]) == first]]
    groups += [[p for p in task if int(p[2]) != first] for task in points]
    for group, (color, marker, label) in zip(groups, _CLUSTERS, strict=False):
        axes.scatter(
            [p[0] for p in group],
            [p[1] for p in group],
            s=9,
            marker=marker,
            color=color,
            edgecolors="white",
            linewidths=0.3,
            label=label,
            rasterized=True,  # hundreds of marks in nine frames
        )


def drift(collection: Collection) -> list[Artifact]:
    """How far task 1's activations move while later tasks are learned, by layers, with its bias and without."""
    return [
        _drift(place, method, records)
        for place in collection.places()
        for method in collection.methods(place)
        if (records := [r for r in collection.of(place, method) if "drift" in r.probes])
    ]


def _drift(place: str, method: str, records: Sequence[RunRecord]) -> Artifact:
    layers = list(records[0].probes["drift"][0])
    tasks = min(len(record.probes["drift"]) for record in records)
    names = [
        layer if "outputs" in layer else f"layer {index + 1}" for index, layer in enumerate(layers)
    ]
    panels = []
    body: list[list[Cell]] = []
    for name, layer in zip(names, layers, strict=True):
        lines = []
        for key, label in (("without", "without the bias of task 1"), ("with", "with its bias")):
            x = [moment + 1.0 for moment in range(tasks)]
            lines.append(Line(label, x, [_at(records, m, layer, key) for m in range(tasks)]))
        panels.append((name, lines))
        away, back = (line.y[-1] for line in lines)
        share = None
        if away is not None and back is not None and away.mean:
            share = 100 * (1 - back.mean / away.mean)
        body.append([name, away, back, share])
    figure = line_chart(
        panels,
        title=f"{place}, {method}: drift of task 1's activations",
        xlabel="tasks learned",
        ylabel="distance / norm",
        limits=None,
    )
    columns = ("layer", "without its bias", "with its bias", "brought back, %")
    caption = (
        f"The mechanism of Figs. 1 and 3, {method} on {place}: the mean distance between what each "
        "layer computes of task 1's test samples now and what it computed, with its bias, when task 1 "
        "had just been learned, as a fraction of the mean norm then. Table: after the last task. The "
        "distance without the bias has two parts, the drift of the weights and the missing bias "
        "itself: the latter is its height after task 1."
    )
    name = f"drift_{slug(place)}_{slug(method)}"
    return Artifact(name, f"Drift, {method}, {place}", caption, Table(columns, body), figure)


def moves(collection: Collection) -> list[Artifact]:
    """How large M is and how often its signs flip over the updates of a task, by methods."""
    found = []
    for place in collection.places():
        rows = method_rows([r for r in collection.of(place) if "moves" in r.probes], place)
        if rows:
            found.append(_moves(place, rows))
    return found


def _moves(place: str, rows: Sequence[MethodRow]) -> Artifact:
    panels: list[tuple[str, list[Line]]] = []
    ends: list[list[Cell]] = []
    for row in rows:
        lines: list[Line] = []
        cells: list[Cell] = [row.name]
        for key, title in (("size", "root mean square of M"), ("flips", "fraction that flips")):
            y = _over_task(row.records, key)
            means = [Interval(value, None, len(row.records)) for value in y]
            lines.append(Line(title, [100 * (n + 1) / len(y) for n in range(len(y))], means))
            tenth = max(1, len(y) // 10)
            cells += [fmean(y[:tenth]), fmean(y[-tenth:])]
        panels.append((row.name, lines))
        ends.append(cells)
    figure = line_chart(
        panels,
        title=f"{place}: M over the updates of a task",
        xlabel="% of the task's updates",
        ylabel="",
        limits=None,
    )
    columns = ("method", *("M, first tenth", "M, last tenth"), *("flips, first", "flips, last"))
    caption = (
        f"{place}: the root mean square of M over all layers, and the fraction of its entries that move "
        "against their last move, over the updates of a task; means over tasks and seeds. Table: the first and "
        "the last tenth of the updates."
    )
    name = f"moves_{slug(place)}"
    return Artifact(name, f"M over a task, {place}", caption, Table(columns, ends), figure)


def _over_task(records: Sequence[RunRecord], key: str) -> list[float]:
    """Means over tasks and seeds, as far as all have a value."""
    tasks = [task[key] for record in records for task in record.probes["moves"]]
    return [fmean(values) for values in zip(*tasks, strict=False)]


def _at(records: Sequence[RunRecord], moment: int, layer: str, key: str) -> Interval | None:
    return interval([record.probes["drift"][moment][layer][key] for record in records])
