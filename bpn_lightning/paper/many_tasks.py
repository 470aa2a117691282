"""Fig. 7: a hundred tasks; their average on the way, and groups of ten at the end."""

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

from bpn_lightning.analysis.artifact import Artifact, slug
from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.comparison import MethodRow, method_rows
from bpn_lightning.analysis.pictures import Line, line_chart
from bpn_lightning.analysis.statistics import Interval, holm, interval, p_text, paired, two_sample
from bpn_lightning.analysis.table import Cell, Table
from bpn_lightning.paper import published as paper
from bpn_lightning.run.moments import mean_of_known

__all__ = ["averages_so_far", "figure_7", "groups"]

GROUP = 10


def averages_so_far(matrix: Sequence[Sequence[float | None]]) -> list[float | None]:
    """After each task, the mean over the tasks learned so far.

    >>> averages_so_far([[1.0], [0.5, 0.75]])
    [1.0, 0.625]
    """
    return [mean_of_known(row) for row in matrix]


def groups(row: Sequence[float | None], size: int = GROUP) -> list[list[float]]:
    """Accuracies on tasks 1 to 10, 11 to 20 and so on; what is left over is the last group.

    >>> groups([0.1, 0.2, 0.3], size=2)
    [[0.1, 0.2], [0.3]]
    """
    known = [value for value in row if value is not None]
    return [known[start : start + size] for start in range(0, len(known), size)]


def figure_7(collection: Collection) -> list[Artifact]:
    """The average over the tasks so far (a), groups of ten (b), and the t-tests between methods."""
    found = []
    for place in collection.places():
        rows = method_rows(collection.records, place)
        tasks = min(record.tasks for record in collection.of(place))
        found += [_so_far(place, rows, tasks), _grouped(place, rows, tasks)]
        found.append(_tests(place, rows, tasks, collection.compare))
    return found


def _so_far(place: str, rows: Sequence[MethodRow], tasks: int) -> Artifact:
    lines = []
    for row in rows:
        of_seed = [averages_so_far(record.triangle[:tasks]) for record in row.records]
        means = [interval(values) for values in zip(*of_seed, strict=True)]
        lines.append(Line(row.name, [moment + 1.0 for moment in range(tasks)], means))
    figure = line_chart(
        [("", lines)],
        title=f"{place}: average over the tasks so far",
        xlabel="tasks learned",
        ylabel="average accuracy",
    )
    moments = sorted({1, tasks, *range(GROUP, tasks + 1, GROUP)})
    body: list[list[Cell]] = [[line.name, *(line.y[m - 1] for m in moments)] for line in lines]
    last = {line.name: line.y[-1] for line in lines}
    gains = [
        f"{first} over {second}: {_gain(last[first], last[second])} "
        f"(the paper: {theirs:.2f} % after 100 tasks)"
        for (first, second), theirs in paper.FIGURE_7.items()
        if first in last and second in last
    ]
    caption = (
        f"Fig. 7 (a), {len({seed for row in rows for seed in row.seeds})} seed(s). "
        + "; ".join(gains)
        + ". The paper's text does not say whether its percentages are relative or points."
    )
    table = Table(("method", *(f"after {moment}" for moment in moments)), body)
    everything: list[list[Cell]] = [
        [line.name, moment, value]
        for line in lines
        for moment, value in zip(range(1, tasks + 1), line.y, strict=True)
    ]
    data = Table(("method", "tasks learned", "average accuracy"), everything)
    name = f"figure_7a_{slug(place)}"
    return Artifact(name, f"Fig. 7 (a), {place}", caption, table, figure, data, [place])


def _grouped(place: str, rows: Sequence[MethodRow], tasks: int) -> Artifact:
    lines = []
    for row in rows:
        of_seed = [
            [fmean(group) for group in groups(record.matrix[tasks])] for record in row.records
        ]
        means = [interval(values) for values in zip(*of_seed, strict=True)]
        lines.append(Line(row.name, [index + 1.0 for index in range(len(means))], means))
    names = _names(tasks)
    figure = line_chart(
        [("", lines)],
        title=f"{place}: tasks in groups of ten, after the last one",
        xlabel="group of ten tasks, in the order of learning",
        ylabel="average accuracy",
    )
    body: list[list[Cell]] = [[line.name, *line.y] for line in lines]
    caption = (
        "Fig. 7 (b): after the last task, the mean over each ten tasks. The paper draws it without "
        "numbers; its text has BD+EWC above PSP on the first fifty tasks and below it on the last."
    )
    table = Table(("method", *names), body)
    return Artifact(
        f"figure_7b_{slug(place)}", f"Fig. 7 (b), {place}", caption, table, figure, places=[place]
    )


def _tests(
    place: str,
    rows: Sequence[MethodRow],
    tasks: int,
    compare: Sequence[tuple[str, str]],
) -> Artifact:
    """Within a group, two methods have ten accuracies each: over seeds, one mean for each task."""
    of_method = {
        row.name: groups(
            [
                mean_of_known(values)
                for values in zip(*(record.matrix[tasks] for record in row.records), strict=True)
            ]
        )
        for row in rows
    }
    found: list[tuple[str, str, float, float | None, float | None]] = []
    for first, second in compare or combinations(of_method, 2):
        if first not in of_method or second not in of_method:
            continue
        for name, ours, theirs in zip(
            _names(tasks), of_method[first], of_method[second], strict=True
        ):
            matched = paired(dict(enumerate(ours)), dict(enumerate(theirs)))
            difference = fmean(ours) - fmean(theirs)
            p = two_sample(ours, theirs)
            found.append(
                (f"{first} - {second}", name, difference, p, matched.p if matched else None)
            )
    corrected = holm([p for *_, p, _ in found])
    body: list[list[Cell]] = [
        [pair, name, difference, p_text(p), p_text(q), p_text(matched)]
        for (pair, name, difference, p, matched), q in zip(found, corrected, strict=True)
    ]
    columns = ("difference", "tasks", "mean", "p, t-test", "p, corrected", "p, paired")
    pairs = list(dict.fromkeys(pair for pair, *_ in found))
    lines = [
        Line(
            pair,
            [index + 1.0 for index in range(len(_names(tasks)))],
            [Interval(d, None, 1) for one, _, d, _, _ in found if one == pair],
        )
        for pair in pairs
    ]
    figure = line_chart(
        [("", lines)],
        title=f"{place}: differences in groups of ten",
        xlabel="group of ten tasks, in the order of learning",
        ylabel="difference in accuracy",
        limits=None,
    )
    caption = (
        "Student's t-test between the ten accuracies of two methods in each group, as the paper's "
        "figure has one (it does not say of which kind): of independent samples, with Holm's "
        "correction for the number of tests beside it, and paired task by task. These tests are over "
        "tasks, not over seeds."
    )
    name = f"figure_7_tests_{slug(place)}"
    return Artifact(
        name, f"Fig. 7 (b), tests, {place}", caption, Table(columns, body), figure, places=[place]
    )


def _names(tasks: int) -> list[str]:
    return [f"{start}-{min(start + GROUP - 1, tasks)}" for start in range(1, tasks + 1, GROUP)]


def _gain(first: Interval | None, second: Interval | None) -> str:
    if first is None or second is None:
        return "not measured"
    points = 100 * (first.mean - second.mean)
    relative = f"{100 * (first.mean / second.mean - 1):+.2f} % relative, " if second.mean else ""
    return f"{relative}{points:+.2f} points"
