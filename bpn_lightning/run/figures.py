"""The two pictures of a run: each task's accuracy over the stream, and the accuracy matrix.

Both can be read in black and white and by the color-blind. They are drawn in matplotlib's default
style, whatever the user's own is, and without pyplot: no backend is chosen, no window opens, and no
figure stays in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from math import ceil, log10
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps, rc_context, style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from bpn_lightning.files import write_atomically
from bpn_lightning.metrics.accuracy_matrix import tasks_learned

__all__ = [
    "COLOURS",
    "DASHES",
    "FORMATS",
    "MARKERS",
    "accuracy_curves",
    "accuracy_heatmap",
    "render",
    "save_figure",
]

Format = Literal["png", "svg"]
Floats = NDArray[np.float64]

FORMATS: tuple[Format, ...] = ("png", "svg")
"""The formats that :func:`save_figure` writes."""

# Up to so many tasks, each has a line that can be told from the others, or a number in its cell.
_FEW = 10
_NUMBERED = 20

# Okabe & Ito's colors for the color-blind, without their yellow, which is too pale for a line.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", (0, (1, 1.2)))
MARKERS = "osD^vP*X<>"

_VIRIDIS = colormaps["viridis"]
# Its lightness runs one way, so it keeps its order in gray; its pale end is no color for a line.
_LINES = ListedColormap(_VIRIDIS(np.linspace(0, 0.88, 256)))


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
    light, beside the mean over the tasks learned so far.

    Args:
        matrix: ``(tasks + 1, tasks)``, accuracies, NaN where not measured.
        curve: finer moments than the matrix has, as the module keeps them: the "epoch" (how many
            were done), the "task" being learned (from 0), the "accuracy" of each task or None.
        epochs_per_task: how long each task was learned, where there is no curve; without either,
            the horizontal axis counts tasks.
        title: stands above the picture.
    """
    moments = _moments(matrix, curve, epochs_per_task)
    few = len(moments.starts) <= _FEW
    with style.context("default"):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set(ylim=(-0.03, 1.03), xlabel=moments.unit, ylabel="accuracy")
        figure.suptitle(title, parse_math=False)
        axes.set_xlim(0, max(1.0, moments.x.max()))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="0.92")
        _mark_starts(axes, moments.starts)
        for task, start in enumerate(moments.starts):
            y = moments.accuracies[:, task]
            shown = (moments.x >= start) & ~np.isnan(y)
            if few:
                look = _own_look(task, points=int(shown.sum()))
            else:
                look = {"color": _LINES(task / (len(moments.starts) - 1)), "linewidth": 0.8}
            # Not clipped: a marker at accuracy 1 or at the last moment stays whole.
            axes.plot(moments.x[shown], y[shown], label=f"task {task + 1}", clip_on=False, **look)
        if not moments.starts:
            pass  # an empty frame says that nothing was learned
        elif few:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=3.5)
        else:
            scale = ScalarMappable(Normalize(1, len(moments.starts)), _LINES)
            figure.colorbar(scale, ax=axes, label="task", ticks=MaxNLocator(integer=True))
            (mean,) = axes.plot(
                moments.ends, moments.means, color="black", linewidth=2.5, label="mean"
            )
            figure.legend([mean], ["mean of the tasks learned so far"], loc="outside lower right")
    return figure


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
        image = axes.imshow(np.ma.masked_invalid(values), cmap=_VIRIDIS, vmin=0, vmax=1)
        every = _step(tasks)
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
            _write_numbers(axes, values, size=9 if tasks <= _FEW else 8)
        figure.colorbar(image, ax=axes, label="accuracy", shrink=0.8)
    return figure


def render(figure: Figure, form: Format) -> bytes:
    """The bytes of a picture; the same ones for the same picture, today and tomorrow."""
    # Left alone, matplotlib writes its version into both and, into SVG, the date and random ids.
    metadata: dict[Format, dict[str, str | None]] = {
        "png": {"Software": "bpn_lightning"},
        "svg": {"Creator": "bpn_lightning", "Date": None},
    }
    buffer = BytesIO()
    with style.context("default"), rc_context({"svg.hashsalt": "bpn_lightning"}):
        figure.savefig(buffer, format=form, dpi=150, metadata=metadata[form])
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``<path>.png`` and ``<path>.svg``, each in one step."""
    for form in FORMATS:
        write_atomically(path.with_name(f"{path.name}.{form}"), render(figure, form))


@dataclass(frozen=True)
class _Moments:
    """Where in the stream accuracies were measured.

    Attributes:
        x: ``(moments,)``, how far the stream had come.
        accuracies: ``(moments, tasks)``.
        starts: for each task that was begun, how far the stream had come.
        ends: for each task that was learned, how far it had come then.
        means: for each of those moments, the mean over the tasks learned by then.
        unit: what x counts.
    """

    x: Floats
    accuracies: Floats
    starts: list[float]
    ends: list[float]
    means: list[float]
    unit: str


def _moments(
    matrix: Tensor,
    curve: Sequence[Mapping[str, Any]] | None,
    epochs_per_task: Sequence[int] | None,
) -> _Moments:
    rows = matrix.detach().cpu().double().numpy()
    learned = tasks_learned(matrix)
    means = [float(rows[n, :n].mean()) for n in range(1, learned + 1)]
    if curve:
        x = [float(entry["epoch"]) for entry in curve]
        # None becomes NaN.
        accuracies = [np.array(entry["accuracy"], dtype=np.float64) for entry in curve]
        starts = [
            max((float(e["epoch"]) for e in curve if e["task"] < task), default=0.0)
            for task in range(1 + max(entry["task"] for entry in curve))
        ]
        ends = [*starts[1:], x[-1]][:learned]
        means = means[: len(ends)]
        if x[0] > 0:
            x, accuracies = [0.0, *x], [rows[0], *accuracies]
        return _Moments(np.array(x), np.stack(accuracies), starts, ends, means, "epochs")

    unit = "epochs" if epochs_per_task else "tasks learned"
    borders = [0.0, *accumulate(map(float, epochs_per_task or [1] * learned))][: learned + 1]
    return _Moments(np.array(borders), rows[: learned + 1], borders[:-1], borders[1:], means, unit)


def _mark_starts(axes: Axes, starts: Sequence[float]) -> None:
    """Dashed lines where tasks start, with the tasks' numbers above them where they fit."""
    every = _step(len(starts))
    room = 0.025 * axes.get_xlim()[1]
    labeled: dict[float, str] = {}
    for task in range(0, len(starts), every):
        axes.axvline(starts[task], color="0.6", linestyle=(0, (4, 3)), linewidth=0.8, zorder=0)
        if not labeled or starts[task] - max(labeled) > room:
            labeled[starts[task]] = str(task + 1)
    top = axes.secondary_xaxis("top")
    top.set_xticks(list(labeled), list(labeled.values()))
    top.tick_params(length=0)
    top.set_xlabel("start of task")


def _own_look(task: int, points: int) -> dict[str, Any]:
    """Color, dashes and marker by which one of few lines is known."""
    every = max(1, points // 10)
    return {
        "color": COLOURS[task % len(COLOURS)],
        "linestyle": DASHES[task % len(DASHES)],
        "marker": MARKERS[task % len(MARKERS)],
        "markersize": 5,
        "markevery": (task % every, every),  # lines that lie on each other show both markers
        "linewidth": 1.5,
        "zorder": 3,
    }


def _step(tasks: int) -> int:
    """Which tasks' numbers are written on an axis: all, every tenth, every hundredth ..."""
    return 1 if tasks <= _NUMBERED else int(10 ** ceil(log10(tasks / _NUMBERED)))


def _write_numbers(axes: Axes, values: Floats, size: float) -> None:
    for (row, task), value in np.ndenumerate(values):
        if not np.isnan(value):
            red, green, blue, _ = _VIRIDIS(value)
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            axes.text(
                task,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=size,
                color="black" if light else "white",
            )
