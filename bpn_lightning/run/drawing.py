"""How pictures are drawn: in matplotlib's default style, whatever the user's own is, without pyplot.

No backend is chosen, no window opens, and no figure stays in memory. Pictures can be read in black and
white and by the color-blind, and equal ones are equal bytes. No torch here.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from math import ceil, log10
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps, rc_context, style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bpn_lightning.files.writing import write_atomically
from bpn_lightning.metrics.scores import Calibration
from bpn_lightning.run.moments import Moments

__all__ = [
    "COLORS",
    "DASHES",
    "FEW",
    "FORMATS",
    "MARKERS",
    "VIRIDIS",
    "cell_color",
    "draw_curves",
    "draw_reliability",
    "every_nth",
    "render",
    "save_figure",
]

Format = Literal["png", "svg"]

FORMATS: tuple[Format, ...] = ("png", "svg")
"""The formats that :func:`save_figure` writes."""

FEW = 10
"""Up to so many tasks, each has a line that can be told from the others."""

# Okabe & Ito's colors for the color-blind, without their yellow, which is too pale for a line; their
# orange and light blue are darker here, so that each color has a contrast of 3 to white (WCAG 2.2).
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#B87F00", "#3A94C8")
DASHES = ("-", "--", "-.", (0, (1, 1.2)))
MARKERS = "osD^vP*X<>"

VIRIDIS = colormaps["viridis"]
# Its lightness runs one way, so it keeps its order in gray; its pale end is no color for a line.
_LINES = ListedColormap(VIRIDIS(np.linspace(0, 0.88, 256)))


def cell_color(value: float) -> tuple[str, str]:
    """The color of an accuracy, and "black" or "white" for what is written on it.

    >>> cell_color(1.0)
    ('#fde725', 'black')
    """
    red, green, blue, _ = VIRIDIS(value)
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
    return to_hex((red, green, blue)), "black" if light else "white"


def draw_curves(
    moments: Moments, *, title: str = "", size: tuple[float, float] = (7.5, 4.2)
) -> Figure:
    """Draw each task's accuracy from the moment on that it starts to be learned.

    Dashed lines stand where a task starts. Up to ten tasks have colors, dashes and markers of their
    own; more are colored by their number, from dark to light, with the mean over the tasks learned
    so far. Task k's line has the gid ``task-k``.

    Args:
        moments: of the stream.
        title: stands above the picture.
        size: width and height in inches.
    """
    tasks = len(moments.starts)
    with style.context("default"):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set(ylim=(-0.03, 1.03), xlabel=moments.unit, ylabel="accuracy")
        figure.suptitle(title, parse_math=False)
        axes.set_xlim(0, max(1.0, *moments.at))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="0.92")
        _mark_starts(axes, moments.starts)
        for task in range(tasks):
            known = [
                (x, y)
                for x, row in zip(moments.at, moments.accuracy, strict=True)
                if (y := row[task]) is not None
            ]
            if tasks <= FEW:
                look = _own_look(task, points=len(known))
            else:
                look = {"color": _LINES(task / (tasks - 1)), "linewidth": 0.8}
            axes.plot(
                [x for x, _ in known],
                [y for _, y in known],
                label=f"task {task + 1}",
                gid=f"task-{task + 1}",
                clip_on=False,  # a marker at accuracy 1 or at the last moment stays whole
                **look,
            )
        if 0 < tasks <= FEW:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=3.5)
        elif tasks:
            _add_mean(figure, axes, moments)
    return figure


def draw_reliability(
    gates: Mapping[str, Calibration], *, title: str = "", size: tuple[float, float] = (5.5, 4.5)
) -> Figure:
    """Draw how often the likeliest task is right, over its probability.

    A marker's area grows with the number of test samples of its bin; a calibrated gate lies on the
    diagonal. The markers of the n-th gate have the gid ``bins-n``, from 0.

    Args:
        gates: by the names in the legend.
        title: stands above.
        size: width and height in inches.
    """
    with style.context("default"):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, parse_math=False)
        axes = figure.add_subplot()
        axes.set(
            xlim=(0, 1.02),
            ylim=(0, 1.02),
            xlabel="probability of the likeliest task",
            ylabel="is right",
        )
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=(0, (4, 3)))
        for number, (gate, bins) in enumerate(gates.items()):
            total, color = sum(bins["counts"]), COLORS[number % len(COLORS)]
            kept = [
                (x, y, 20 + 400 * count / total)
                for x, y, count in zip(
                    bins["confidence"], bins["accuracy"], bins["counts"], strict=True
                )
                if x is not None and y is not None
            ]
            x, y, areas = zip(*kept, strict=True) if kept else ((), (), ())
            label = f"{gate}, error {bins['error']:.3f}"
            axes.plot(x, y, color=color, linestyle=DASHES[number % len(DASHES)], linewidth=1.2)
            axes.scatter(x, y, areas, color=color, alpha=0.6, label=label, gid=f"bins-{number}")
        if gates:
            ncols = min(len(gates), 1 if max(map(len, gates)) > 20 else 2)
            legend = figure.legend(loc="outside lower center", ncols=ncols, frameon=False)
            for text in legend.get_texts():
                text.set_parse_math(False)
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


def _add_mean(figure: Figure, axes: Axes, moments: Moments) -> None:
    """A scale of the many tasks' colors, and the mean over those learned so far."""
    scale = ScalarMappable(Normalize(1, len(moments.starts)), _LINES)
    figure.colorbar(scale, ax=axes, label="task", ticks=MaxNLocator(integer=True))
    y = np.array(moments.means, dtype=np.float64)  # None becomes NaN
    (mean,) = axes.plot(moments.ends, y, color="black", linewidth=2.5, label="mean")
    figure.legend([mean], ["mean of the tasks learned so far"], loc="outside lower right")


def _mark_starts(axes: Axes, starts: Sequence[float]) -> None:
    """Dashed lines where tasks start, with the tasks' numbers above them where they fit."""
    every = every_nth(len(starts))
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
        "color": COLORS[task % len(COLORS)],
        "linestyle": DASHES[task % len(DASHES)],
        "marker": MARKERS[task % len(MARKERS)],
        "markersize": 5,
        "markevery": (task % every, every),  # lines that lie on each other show both markers
        "linewidth": 1.5,
        "zorder": 3,
    }


def every_nth(tasks: int) -> int:
    """Which tasks' numbers are written on an axis: all, every tenth, every hundredth ..."""
    return 1 if tasks <= 20 else int(10 ** ceil(log10(tasks / 20)))
