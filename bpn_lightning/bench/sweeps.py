"""Accuracy over a varied setting, and what one method gains over another along it."""

from collections.abc import Mapping

from bpn_lightning.analysis.artifact import Artifact, slug
from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.comparison import SCORES, MethodRow, method_rows, score_title
from bpn_lightning.analysis.pictures import Dots, Line, dot_chart, line_chart
from bpn_lightning.analysis.statistics import Interval, paired
from bpn_lightning.analysis.table import Cell, Table
from bpn_lightning.run.identity import named_value, short

__all__ = ["gains", "sweeps"]

_SCORES = ("first_task", "average", "after_learning", "average_task_agnostic")


def sweeps(collection: Collection) -> list[Artifact]:
    """One picture for each key that a place varies: every score over its values."""
    return [
        _sweep(collection, place, key)
        for place in collection.places()
        for key in _keys(collection, place)
    ]


def gains(collection: Collection) -> list[Artifact]:
    """For each pair of ``compare:``, its difference over the varied key, and at the values chosen on held-out samples."""
    return [
        _gain(collection, place, key, first, second)
        for place in collection.places()
        for key in _keys(collection, place)
        for first, second in collection.compare
        if _values(collection, place, key, first) and _values(collection, place, key, second)
    ]


def _keys(collection: Collection, place: str) -> list[str]:
    return list(dict.fromkeys(key for r in collection.of(place) for key in r.variant))


def _values(collection: Collection, place: str, key: str, method: str) -> dict[object, MethodRow]:
    """The row of each value; other varied keys have their tables elsewhere."""
    rows = ((row, row.records[0]) for row in method_rows(collection.of(place, method)))
    return {one.variant[key]: row for row, one in rows if list(one.variant) == [key]}


def _chosen(found: Mapping[object, MethodRow]) -> object | None:
    """The value with the highest accuracy on held-out samples; None where one has no such accuracy."""
    scores = {value: row.scores["validation"] for value, row in found.items()}
    known = {value: score.mean for value, score in scores.items() if score is not None}
    return max(known, key=lambda value: known[value]) if len(known) == len(scores) else None


def _sweep(collection: Collection, place: str, key: str) -> Artifact:
    body: list[list[Cell]] = []
    titles = {score: score_title(score, collection.of(place)) for score in _SCORES}
    panels: list[tuple[str, list[Line]]] = [(title, []) for title in titles.values()]
    marks: list[tuple[str, Interval | None, Interval | None]] = []
    numeric = True
    held_out = any(row.at("validation", "average") is not None for row in collection.of(place))
    for method in collection.methods(place):
        found = _values(collection, place, key, method)
        if not found:
            continue
        chosen = _chosen(found)
        numeric = numeric and all(type(value) in (int, float) for value in found)
        for value, row in found.items():
            scores = [row.scores[score] for score in _SCORES]
            body.append(
                [
                    method,
                    str(named_value(key, value)[1]),
                    *scores,
                    row.bytes_per_task,
                    len(row.records),
                    *(
                        [row.scores["validation"], "yes" if value == chosen else None]
                        if held_out
                        else []
                    ),
                ]
            )
            marks.append((f"{method}, {named_value(key, value)[1]}", scores[1], scores[3]))
        if numeric:
            x = sorted(value for value in found if isinstance(value, int | float))
            for (_, lines), score in zip(panels, _SCORES, strict=True):
                y = [found[value].scores[score] for value in x]
                lines.append(Line(method, [float(value) for value in x], y))
    title = f"{place}: {short(key)}"
    if numeric:
        shown = [panel for panel in panels if any(v for line in panel[1] for v in line.y)]
        log = all(x > 0 for _, lines in shown for line in lines for x in line.x)
        figure = line_chart(shown, title=title, xlabel=short(key), log=log)
    else:
        dots = [
            Dots(titles["average"], [given for _, given, _ in marks]),
            Dots(titles["average_task_agnostic"], [agnostic for *_, agnostic in marks]),
        ]
        figure = dot_chart([name for name, *_ in marks], dots, title=title)
    columns = (
        "method",
        short(key),
        *titles.values(),
        "bytes per task",
        "seeds",
        *([SCORES["validation"].title, "chosen"] if held_out else []),
    )
    caption = f"{place} at several values of `{key}`; mean and 95 % interval over seeds."
    if held_out:
        caption += (
            " Chosen is each method's value with the highest accuracy on held-out training samples."
        )
    name = f"sweep_{slug(place)}_{slug(short(key))}"
    return Artifact(name, title, caption, Table(columns, body), figure, places=[place])


def _gain(collection: Collection, place: str, key: str, first: str, second: str) -> Artifact:
    ours = _values(collection, place, key, first)
    theirs = _values(collection, place, key, second)
    shared = sorted(v for v in ours if v in theirs and isinstance(v, int | float))
    body: list[list[Cell]] = []
    differences: list[Interval | None] = []
    for value in shared:
        mean = _difference(ours[value], theirs[value])
        differences.append(mean)
        a, b = ours[value].scores["average"], theirs[value].scores["average"]
        relative = 100 * (a.mean / b.mean - 1) if a and b and b.mean else None
        body.append([str(value), a, b, mean, relative])
    caption = (
        f"ACC of {first} and {second} at several values of `{key}`: a gain that is there at one value only, and gone "
        "when both have their best, is a gain of tuning. "
    )
    x = [float(value) for value in shared]
    lines = [
        Line(first, x, [ours[value].scores["average"] for value in shared]),
        Line(second, x, [theirs[value].scores["average"] for value in shared]),
    ]
    chosen = [found[best] for found in (ours, theirs) if (best := _chosen(found)) is not None]
    if len(chosen) == 2:
        a, b = (row.scores["average"] for row in chosen)
        relative = 100 * (a.mean / b.mean - 1) if a and b and b.mean else None
        body.append(["each at its chosen value", a, b, _difference(*chosen), relative])
        if b:
            level = [Interval(b.mean, None, 1) for _ in x]
            lines.append(Line(f"{second}, at its chosen value", x, level))
        caption += "The last row has each method at the value with its highest accuracy on held-out training samples."
    else:
        caption += "These runs held nothing out, so none of the values can be called the best without a look at the test set."
    figure = line_chart(
        [("", lines)],
        title=f"{place}: {first} and {second} over {short(key)}",
        xlabel=short(key),
        ylabel="ACC",
        log=all(value > 0 for value in x),
    )
    columns = (short(key), first, second, "difference", "relative, %")
    name = f"gain_{slug(place)}_{slug(first)}_over_{slug(second)}"
    title, table = f"{first} over {second}, {place}", Table(columns, body)
    return Artifact(name, title, caption, table, figure, places=[place])


def _difference(ours: MethodRow, theirs: MethodRow) -> Interval | None:
    """Seed by seed."""
    found = paired(ours.by_seed("average"), theirs.by_seed("average"))
    return None if found is None else found.interval
