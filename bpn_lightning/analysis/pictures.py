"""The kinds of pictures that the report is made of, in the style of :mod:`bpn_lightning.run.drawing`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import EngFormatter

from bpn_lightning.analysis.statistics import Interval
from bpn_lightning.run.drawing import COLORS, DASHES, MARKERS

__all__ = ["Dots", "Line", "Point", "dot_chart", "line_chart", "tradeoff_chart"]


@dataclass(frozen=True)
class Dots:
    """A mark in every row that has a value.

    Args:
        name: for the legend.
        values: one for each row.
        hollow: the paper's numbers are hollow, ours are filled.
    """

    name: str
    values: Sequence[Interval | None]
    hollow: bool = False


def dot_chart(
    rows: Sequence[str],
    dots: Sequence[Dots],
    *,
    title: str,
    xlabel: str = "accuracy",
    limits: tuple[float, float] | None = (0.0, 1.0),
    width: float = 7.5,
) -> Figure:
    """Rows of marks with their intervals; within a row they lie a little below each other.

    The marks of the n-th series that has any are a line with the gid ``dots-n``, from 0.

    Args:
        rows: names, from top to bottom.
        dots: series of marks.
        title: stands above.
        xlabel: of the horizontal axis.
        limits: of the values; None to follow them.
        width: in inches.
    """
    dots = [series for series in dots if any(value is not None for value in series.values)]
    with style.context("default"):
        height = 1.5 + 0.30 * len(rows) * max(1.0, 0.42 * len(dots))
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(title, parse_math=False)
        axes = figure.add_subplot()
        for index, series in enumerate(dots):
            shift = 0.0 if len(dots) == 1 else 0.44 * (index / (len(dots) - 1) - 0.5)
            shown = [(y + shift, v) for y, v in enumerate(series.values) if v is not None]
            marks, *_ = axes.errorbar(
                [value.mean for _, value in shown],
                [y for y, _ in shown],
                xerr=[value.half or 0.0 for _, value in shown],
                fmt="D" if series.hollow else MARKERS[index],
                color=COLORS[2 if series.hollow else index],
                markerfacecolor="white" if series.hollow else COLORS[index],
                markersize=5,
                capsize=2,
                elinewidth=1,
                label=series.name,
                zorder=3,
            )
            marks.set_gid(f"dots-{index}")
        axes.set_yticks(range(len(rows)), list(rows), parse_math=False)
        axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
        axes.set_xlabel(xlabel)
        if limits is not None:
            low, high = limits
            axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        axes.grid(axis="x", color="0.92")
        for y in range(len(rows) - 1):
            axes.axhline(y + 0.5, color="0.92", linewidth=0.6, zorder=0)
        if limits is None:  # differences
            axes.axvline(0.0, color="0.4", linewidth=0.8, zorder=0)
        if len(dots) > 1:
            _plain(
                figure.legend(loc="outside lower center", ncols=min(3, len(dots)), frameon=False)
            )
    return figure


@dataclass(frozen=True)
class Line:
    """A curve over something.

    Args:
        name: for the legend.
        x: where.
        y: means and intervals there; None where nothing was measured.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Interval | None]


def line_chart(
    panels: Sequence[tuple[str, Sequence[Line]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str = "accuracy",
    log: bool = False,
    limits: tuple[float, float] | None = (0.0, 1.0),
    starts: Sequence[Sequence[float]] = (),
    width: float | None = None,
) -> Figure:
    """Panels with the same lines and one legend; up to four lines have the bands of their intervals.

    Args:
        panels: a title and lines for each.
        title: stands above.
        xlabel: of every panel.
        ylabel: of the first.
        log: whether x is drawn in logarithms.
        limits: of the values; None to follow them.
        starts: for each panel, where dashed vertical lines stand.
        width: in inches, of panels below each other; None sets them side by side.
    """
    names = list(dict.fromkeys(line.name for _, lines in panels for line in lines))
    with style.context("default"):
        columns = len(panels) if len(panels) < 4 else (2 if len(panels) == 4 else 3)
        columns, named = (columns, 4) if width is None else (1, 2)
        lines_down = -(-len(panels) // columns)
        width = width or (7.5 if len(panels) == 1 else 3.9 * columns)
        below = 0.25 * (1 + (len(names) - 1) // named)
        height = 3.9 if len(panels) == 1 else 3.1 * lines_down
        figure = Figure(figsize=(width, height + below), layout="constrained")
        figure.suptitle(title, parse_math=False)
        frames = figure.subplots(lines_down, columns, sharey=True, squeeze=False).flatten()
        for unused in frames[len(panels) :]:
            unused.remove()
        every = frames[: len(panels)]
        for index, (axes, (name, lines)) in enumerate(zip(every, panels, strict=True)):
            axes.set_title(name, fontsize="medium", parse_math=False)
            axes.set(xlabel=xlabel, ylabel="" if index % columns else ylabel)
            if log:
                axes.set_xscale("log")
            for start in starts[index] if starts else ():
                axes.axvline(start, color="0.6", linestyle=(0, (4, 3)), linewidth=0.8, zorder=0)
            for line in lines:
                _draw(axes, line, names.index(line.name), band=len(names) <= 4)
            if limits is not None:
                low, high = limits
                axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
            axes.grid(axis="y", color="0.92")
        handles = {
            label: handle
            for axes in every
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        legend = figure.legend(
            [handles[name] for name in names if name in handles],
            [name for name in names if name in handles],
            loc="outside lower center",
            ncols=min(named, len(names)),
            frameon=False,
            handlelength=3.5,
        )
        _plain(legend)
    return figure


@dataclass(frozen=True)
class Point:
    """What a method costs, and what that buys.

    Args:
        name: of the method.
        bytes: at least 0.
        values: one for each series; None where nothing was measured.
    """

    name: str
    bytes: int
    values: Sequence[Interval | None]


def tradeoff_chart(
    points: Sequence[Point],
    series: Sequence[str],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    limits: tuple[float, float] | None = (0.0, 1.0),
    width: float = 7.5,
) -> Figure:
    """Accuracy over bytes, in logarithms; those are named that no other point beats in both.

    The marks of the n-th series are a line with the gid ``dots-n``, from 0.

    Args:
        points: one for each method.
        series: names for the legend; the first decides who is beaten.
        xlabel: of the bytes.
        ylabel: of the values.
        title: stands above.
        limits: of the values; None to follow them.
        width: in inches.
    """
    with style.context("default"):
        figure = Figure(figsize=(width, 0.62 * width), layout="constrained")
        if title:
            figure.suptitle(title, parse_math=False)
        axes = figure.add_subplot()
        smallest = min((point.bytes for point in points if point.bytes), default=1)
        largest = max(smallest, *(point.bytes for point in points))
        axes.set_xscale("symlog", linthresh=smallest, linscale=0.5)  # 0 has a place, too
        axes.set_xlim(-0.3 * smallest, 3 * largest)
        powers = range(math.ceil(math.log10(smallest)), math.floor(math.log10(3 * largest)) + 1)
        axes.set_xticks([0, *(10**power for power in powers)])
        if limits is None:
            axes.margins(y=0.15)  # for the names
        else:
            low, high = limits
            axes.set_yticks([low + quarter * (high - low) / 4 for quarter in range(5)])
            axes.set_ylim(low - 0.03 * (high - low), high + 0.1 * (high - low))
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(color="0.92")
        for number, name in enumerate(series):
            known = [(p.bytes, value) for p in points if (value := p.values[number]) is not None]
            marks, *_ = axes.errorbar(
                [x for x, _ in known],
                [value.mean for _, value in known],
                yerr=[value.half or 0.0 for _, value in known],
                fmt=MARKERS[number],
                color=COLORS[2 - number],
                markerfacecolor="white" if number else COLORS[2],
                label=name,
                zorder=3,
            )
            marks.set_gid(f"dots-{number}")
        for number, (x, y, name) in enumerate(_unbeaten(points)):
            where = (6, 6 if number % 2 else -14)  # names of neighbors do not meet
            text = axes.annotate(name, (x, y), where, textcoords="offset points", fontsize=9)
            text.set_parse_math(False)
        _plain(figure.legend(loc="outside lower center", ncols=len(series), frameon=False))
    return figure


def _unbeaten(points: Sequence[Point]) -> list[tuple[int, float, str]]:
    """From the fewest bytes on, each point that is higher than all before it: x, y and name.

    >>> half, most = Interval(0.5, None, 1), Interval(0.9, None, 1)
    >>> _unbeaten([Point("b", 9, [half]), Point("a", 0, [half]), Point("c", 10, [most])])
    [(0, 0.5, 'a'), (10, 0.9, 'c')]
    """
    known = [
        (point.bytes, -value.mean, point.name) for point in points if (value := point.values[0])
    ]
    found: list[tuple[int, float, str]] = []
    for x, below, name in sorted(known):
        if not found or -below > found[-1][1]:
            found.append((x, -below, name))
    return found


def _plain(legend: Legend) -> None:
    """Show names as they are, dollar signs too."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw(axes: Axes, line: Line, number: int, band: bool) -> None:
    shown = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
    x, means = [x for x, _ in shown], [y.mean for _, y in shown]
    color = COLORS[number % len(COLORS)]
    every = max(1, len(x) // 12)
    axes.plot(
        x,
        means,
        label=line.name,
        color=color,
        linestyle=DASHES[number % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        markevery=(number % every, every),
        linewidth=1.5,
        zorder=3,
    )
    if band and any(y.half for _, y in shown):
        low = [y.mean - (y.half or 0.0) for _, y in shown]
        high = [y.mean + (y.half or 0.0) for _, y in shown]
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
